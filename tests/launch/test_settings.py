# SPDX-License-Identifier: Apache-2.0
"""Everything that is wrong with a launch file is told before anything is rented, by its field."""

from pathlib import Path

import pytest

from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.launch.settings import load_settings

ROOT = Path(__file__).parents[2]
SPOT = ROOT / "launch/examples/queued_spot.toml"
GKE = ROOT / "launch/examples/gke_xpk.toml"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("cloud.zone=us-west4", r"cloud\.zone: expected a zone such as us-west4-a, got 'us-west4'"),
    ("cloud.route=slurm", r"cloud\.route: expected one of queued, vm, gke, got 'slurm'"),
    ("cloud.capacity=cheap", r"cloud\.capacity: expected one of spot"),
    ("cloud.accelerator=v5e-256", r"cloud\.accelerator: expected a TPU type, one of v4-N"),
    ("cloud.accelerator=v5p-7", r"cloud\.accelerator: .* two cores a chip"),
    ("cloud.accelerator=tpu7x-8", r"cloud\.route: tpu7x-8 exists in GKE only"),
    ("cloud.slices=0", r"cloud\.slices: expected 1 or more, got 0"),
    ("cloud.slices=two", r"cloud\.slices: expected a whole number, got 'two'"),
    ("cloud.slices=true", r"cloud\.slices: expected a whole number, got True"),
    ("cloud.slise=2", r"slise: no such field of \[cloud\]\. Did you mean 'slices'\?"),
    ("clout.slices=2", r"clout: no such section\. Did you mean 'cloud'\?"),
    ("cloud.image=x", r"cloud\.image: route 'queued' has no such thing"),
    ("cloud.reservation=x", r"cloud\.reservation: route 'queued' has no such thing"),
    ("cloud.project=My Project", r"cloud\.project: expected a project id"),
    ("job.name=My Job", r"job\.name: expected lower-case letters"),
    ("job.command=[]", r"job\.command\[0\]: expected one of train, got ''"),
    ("job.command=train", r"job\.command: expected a list of words, got 'train'"),
    ('job.command=["train", "--workdir=x"]', r"job\.command\[1\]: .* is job\.workdir"),
    ('job.command=["train", "a\\nb"]', r"job\.command\[1\]: expected one line of text"),
    ("job.workdir=/home/me", r"job\.workdir: expected gs://BUCKET"),
    ("job.env.HF_TOKEN=hf_123", r"job\.env\.HF_TOKEN: this looks like a secret"),
    ("job.env.1A=x", r"--set|job\.env\.1A: expected the name of an environment variable"),
    ("secrets.WANDB_API_KEY=a b", r"secrets\.WANDB_API_KEY: expected the name of a secret"),
    ("records.bucket=gs://x", r"records\.bucket: expected its name alone, without gs://"),
    ("records.mount=data", r"records\.mount: expected an absolute folder"),
    ("retry.max_restarts=-1", r"retry\.max_restarts: expected 0 or more, got -1"),
    ("retry.delete_at_end=1", r"retry\.delete_at_end: expected true or false, got 1"),
  ],
)
def test_wrong_field_is_named(change, message):
  with pytest.raises(UserError, match=message):
    load_settings(SPOT, [change])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["cloud.image="], r'cloud\.image: route "gke" needs it'),
    (["cloud.internal_ips=true"], r"cloud\.internal_ips: route 'gke' has no such thing"),
    (["cloud.valid_for=6h"], r"cloud\.valid_for: route 'gke' has no such thing"),
    (["cloud.capacity=reserved"], r"cloud\.reservation: in GKE it goes with"),
    (["cloud.route=vm", "cloud.slices=2"], r"cloud\.slices: a plain TPU VM is one slice, got 2"),
  ],
)  # fmt: skip
def test_fields_that_do_not_go_together(changes, message):
  with pytest.raises(UserError, match=message):
    load_settings(GKE, changes)


def test_missing_field_and_file_are_named(tmp_path):
  with pytest.raises(UserError, match=r"none\.toml: there is no such launch file"):
    load_settings(tmp_path / "none.toml")
  file = tmp_path / "my.toml"
  file.write_text('[cloud]\nproject = "p"\n')
  with pytest.raises(UserError, match=r"my\.toml: cloud\.zone: expected a value, found none"):
    load_settings(file)
  with pytest.raises(UserError, match=r"Is a directory"):
    load_settings(tmp_path)
  file.write_text("[cloud\n")
  with pytest.raises(UserError, match=r"my\.toml: not valid TOML: .*line 1"):
    load_settings(file)


def test_change_without_a_value_is_wrong_usage():
  with pytest.raises(UsageError, match=r"--set: expected SECTION\.FIELD=VALUE, got 'slices'"):
    load_settings(SPOT, ["slices"])


def test_changes_have_the_types_of_the_file():
  settings = load_settings(SPOT, ["cloud.slices=2", "job.env.A=b c", "retry.poll_seconds=5"])
  assert settings.cloud.slices == 2
  assert settings.job.env["A"] == "b c"
  assert settings.retry.poll_seconds == 5.0
