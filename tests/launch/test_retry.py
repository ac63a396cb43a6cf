# SPDX-License-Identifier: Apache-2.0
"""The babysitter against a cloud in a folder: real processes, the hosts' scripts as they are."""

import json
import os
from pathlib import Path

import pytest
from launch.fake_cloud import Cloud

from slowfast_jax.launch import retry
from slowfast_jax.launch.main import main
from slowfast_jax.launch.retry import judge_hosts

ROOT = Path(__file__).parents[2]
NASTY = 'It\'s "fine"; $HOME `id` & *.py'
COMMAND = ["train", "--config=configs/my own.py", f"--config.system={NASTY}"]
QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
FAST = ("poll_seconds=0.01", "backoff_seconds=0", "patience=3", "max_restarts=5")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """Makes the cloud of a test, in a working folder with a space and a quote in its name."""
  desk = tmp_path / "the desk's"
  desk.mkdir()
  monkeypatch.chdir(desk)
  monkeypatch.setenv("PATH", f"{tmp_path / 'cloud/bin'}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("FAKE_CLOUD", str(tmp_path / "cloud"))
  return lambda **facts: Cloud(tmp_path / "cloud", **facts)


def launch(verb: str, example: str = "queued_spot", *more: str) -> int:
  sets = [f"retry.{field}" for field in FAST] + [f"job.command={json.dumps(COMMAND)}", *more]
  if example != "gke_xpk":
    sets.append("records.bucket=''")  # No gcsfuse here.
  words = [word for field in sets for word in ("--set", field)]
  return main([verb, str(ROOT / f"launch/examples/{example}.toml"), *words])


def test_preempted_slice_is_recreated_and_the_job_goes_on(cloud, capsys):
  lives = [[*QUEUE, "ACTIVE", "ACTIVE", "SUSPENDED"], QUEUE]
  fake = cloud(lives=lives, exits=[["hangs", "hangs"], [0, 0]])
  assert launch("retry") == 0
  assert fake.verbs("create", "delete") == ["create", "delete", "create", "delete"]
  assert len(fake.jobs()) == 4  # Twice on two hosts.
  said = capsys.readouterr().out
  events = ["machines waiting", "machines active", "taken away", "machines active", "job is done"]
  places = [said.index(events[0])]
  for event in events[1:]:
    places.append(said.index(event, places[-1] + 1))
  log = Path("runs/launch/sft-64f/retry.log").read_text(encoding="utf-8")
  assert [line for line in log.splitlines() if line] == [x for x in said.splitlines() if x]


def test_words_of_the_job_reach_every_host_as_they_are(cloud):
  fake = cloud(lives=[QUEUE], exits=[[0, 0]])
  assert launch("retry") == 0
  for words in fake.jobs():
    assert words[words.index("--") + 1 :] == COMMAND
    assert "--env=JAX_COMPILATION_CACHE_DIR=gs://my-bucket/cache" in words


def test_exit_42_runs_again_on_the_same_machines(cloud, capsys):
  fake = cloud(lives=[QUEUE], exits=[[42, 42], [143, 42], [0, 0]])
  assert launch("retry") == 0
  assert fake.verbs("create", "delete") == ["create", "delete"]
  assert len(fake.jobs()) == 6
  assert "restart 2 of 5" in capsys.readouterr().out


def test_exit_1_ends_it_with_the_log(cloud, capsys):
  fake = cloud(lives=[QUEUE], exits=[[1, "hangs"]])
  assert launch("retry") == 1
  assert len(fake.jobs()) == 2
  assert fake.verbs("create", "delete") == ["create", "delete"]  # Given back all the same.
  assert "a line of the job's log" in capsys.readouterr().out


def test_error_of_a_job_whose_machines_were_being_taken_away_does_not_count(cloud):
  fake = cloud(lives=[[*QUEUE, "ACTIVE", "ACTIVE", "SUSPENDING"], QUEUE], exits=[[1, 1], [0, 0]])
  assert launch("retry") == 0
  assert fake.verbs("create") == ["create", "create"]


def test_job_that_hangs_on_some_hosts_is_ended_and_run_again(cloud, monkeypatch):
  monkeypatch.setattr(retry, "UNEVEN_LOOKS", 2)
  fake = cloud(lives=[QUEUE], exits=[[42, "hangs"], [0, 0]])
  assert launch("retry") == 0
  assert fake.verbs("create") == ["create"]
  assert any("stop.sh" in word and word.endswith(" kill") for call in fake.calls for word in call)


def test_calls_that_fail_now_and_then_are_borne(cloud, capsys):
  failing = {str(call): "UNAVAILABLE: try again" for call in (1, 2, 5, 7, 10)}
  cloud(lives=[QUEUE], exits=[[0, 0]], failing=failing)
  assert launch("retry") == 0
  assert "failed (2 of 3 in a row)" in capsys.readouterr().out


def test_calls_that_always_fail_are_given_up_and_the_cost_is_told(cloud, capsys):
  cloud(failing={str(call): "UNAVAILABLE: try again" for call in range(1, 99)})
  assert launch("retry") == 1
  assert "may still cost money" in capsys.readouterr().err


@pytest.mark.parametrize(
  "refusal", ["PERMISSION_DENIED: no", "You do not currently have an active account selected."]
)
def test_refusal_ends_it_at_once(cloud, capsys, refusal):
  fake = cloud(failing={"2": refusal})
  assert launch("retry") == 1
  assert len(fake.calls) == 2
  assert f"this will not pass by itself: ERROR: (gcloud) {refusal}" in capsys.readouterr().err


def test_restarts_have_a_limit(cloud, capsys):
  cloud(lives=[QUEUE], exits=[[42, 42]] * 9)
  assert launch("retry", "queued_spot", "retry.max_restarts=1") == 1
  assert "retry.max_restarts = 1 restarts are used up" in capsys.readouterr().err


def test_code_stays_the_same_while_a_run_goes_on(cloud, capsys):
  cloud(lives=[QUEUE], exits=[[0, 0]])
  assert [launch("up"), launch("run")] == [0, 0]
  wheel = Path("runs/launch/sft-64f/ship/slowfast_jax-0.1.0-py3-none-any.whl")
  wheel.write_text("as it was")
  assert launch("retry") == 0
  assert wheel.read_text() == "as it was"
  assert "without that folder it is built anew" in capsys.readouterr().out


def test_stop_ends_the_babysitter_and_keeps_the_machines(cloud, capsys):
  fake = cloud(lives=[QUEUE], exits=[["hangs", "hangs"]])
  assert [launch("up"), launch("run"), launch("stop")] == [0, 0, 0]
  for host in range(2):  # The job has saved and ended.
    state = fake.folder / "hosts" / str(host) / "slowfast-sft-64f"
    os.kill(int((state / "pid").read_text()), 9)
    (state / "exit").write_text("42\n")
  assert launch("retry") == 0
  assert fake.verbs("delete") == []
  assert "the job is stopped" in capsys.readouterr().out


def test_up_twice_rents_once(cloud, capsys):
  fake = cloud(lives=[QUEUE])
  assert [launch("up"), launch("up")] == [0, 0]
  assert fake.verbs("create") == ["create"]
  assert "cost money until: python launch/tpu.py down" in capsys.readouterr().out


def test_up_of_a_request_that_failed_says_so(cloud, capsys):
  cloud(lives=[["WAITING_FOR_RESOURCES", "FAILED"]])
  assert launch("up") == 1
  assert "the machines are FAILED" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["Completed", "Failed"])
def test_gke_restarts_by_itself_and_retry_waits_for_the_end(cloud, end):
  jobsets = [{}, {"restarts": 1}, {"conditions": [{"type": end, "status": "True"}]}]
  fake = cloud(jobsets=jobsets, failing={"4": "UNAVAILABLE: try again"})
  assert launch("retry", "gke_xpk") == (end == "Failed")
  (submitted,) = [call for call in fake.calls if call[:3] == ["xpk", "workload", "create"]]
  assert "--max-restarts=5" in submitted


@pytest.mark.parametrize(
  ("states", "expected"),
  [
    (["running", "running"], "RUNNING"),
    (["running", "exit 42"], "UNEVEN"),
    (["running", "exit 1"], "FAILED"),
    (["exit 0", "exit 0"], "DONE"),
    (["exit 0", "gone"], "AGAIN"),
    (["exit 134", "exit 143"], "AGAIN"),
    (["exit 42", "exit 2"], "FAILED"),
    (["stopped", "exit 42"], "STOPPED"),
    (["absent", "absent"], "ABSENT"),
    (["absent", "exit 0"], "AGAIN"),
  ],
)
def test_what_hosts_say_together(states, expected):
  noise = "Using ssh batch size of 1.\nSSH: Attempting to connect to worker 0...\n"
  assert judge_hosts(noise + "".join(f"slowfast-host: {state}\n" for state in states)) == expected
