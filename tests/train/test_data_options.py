# SPDX-License-Identifier: Apache-2.0
"""Training on mixtures, packed rows and steps of several shapes, as the config asks for them."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from etils import epath

from slowfast_jax.errors import UserError
from slowfast_jax.train.loop import train
from slowfast_jax.train.metrics import read_metrics
from slowfast_jax.train.setup import open_setup
from tests.train.tiny_run import record, tiny_config, write_data, write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Videos in `records`, texts in `texts`, and a mixture of both."""
  folder = write_data(tmp_path_factory.mktemp("data"))
  turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]
  text = dataclasses.replace(record(0, num_frames=0), conversations=[turns])
  write_records(folder / "texts", [dataclasses.replace(text, id=f"text{i}") for i in range(8)])
  sources = [{"path": "records", "weight": 1}, {"path": "texts", "weight": 3}]
  (folder / "mix.json").write_text(json.dumps(sources))
  return folder


def config_of(data, *overrides):
  return tiny_config(data, "data.records=", f"data.mixture={data / 'mix.json'}", *overrides)


def test_a_mixture_is_what_the_batches_hold(data):
  setup = open_setup(config_of(data))
  batches = list(itertools.islice(setup.pipeline.iterate(), 25))
  videos = np.concatenate([batch.frame_segments.any(axis=1) for batch in batches])
  assert videos.mean() == pytest.approx(0.25, abs=0.02)
  assert setup.fingerprint["weights"] == [1.0, 3.0]
  assert setup.fingerprint["records"] == setup.pipeline.num_samples == 20


def test_several_folders_are_one_by_size(data):
  both = f"data.records={data / 'records'},{data / 'texts'}"
  setup = open_setup(tiny_config(data, both))
  batches = list(itertools.islice(setup.pipeline.iterate(), 25))
  videos = np.concatenate([batch.frame_segments.any(axis=1) for batch in batches])
  assert videos.mean() == pytest.approx(12 / 20, abs=0.03)


def test_a_run_whose_steps_have_several_shapes(data, tmp_path):
  buckets = "data.buckets=((1,64,56,8),)"  # Texts fit into it, videos do not.
  config = config_of(data, "data.pack=true", buckets, "train.steps=6")
  setup = open_setup(config)
  batches = list(itertools.islice(setup.pipeline.iterate(), 6))
  shapes = {batch.frames.shape for batch in batches}
  assert {shape[1] for shape in shapes} == {1, 4}
  small = next(batch for batch in batches if batch.frames.shape[1] == 1)
  assert small.segments.max() > 1, "texts share rows"
  said = []
  assert train(config, tmp_path / "run", say=said.append) == 0
  assert sum("compiled in" in line for line in said) == 2
  losses = [line["loss"] for line in read_metrics(epath.Path(tmp_path / "run/metrics.jsonl"))]
  assert len(losses) == 6
  assert np.isfinite(losses).all()


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("data.records=here", "data.records and data.mixture are both given"),
    ("data.mixture=/nowhere/mix.json", "mix.json: cannot be read"),
    ("data.mixture=", "data.records is empty"),
    ("data.buckets=((1,2),)", "data.buckets: each must be .*, got \\(1, 2\\)"),
    ("data.buckets=((1,64,56,3),)", "must be a multiple of mesh.data x mesh.fsdp = 8, got 3"),
  ],
)
def test_what_does_not_fit_is_named(data, override, words):
  with pytest.raises(UserError, match=words):
    open_setup(config_of(data, override))
