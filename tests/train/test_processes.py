# SPDX-License-Identifier: Apache-2.0
"""Two processes of two devices are one run: same losses, same step at which both stop."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from slowfast_jax import distributed
from slowfast_jax.errors import UserError
from slowfast_jax.train.lines import read_lines
from tests.data.video_files import VideoSpec, write_video
from tests.train.tiny_run import TINY, overrides, write_data

STEPS, LONG_ENOUGH = 32, 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def started(data, workdir, *more, processes=1, devices=1):
  """`slowfast train` in several processes."""
  # A rate that stays what it is: it does not depend on the number of steps.
  same = ("optimizer.final_fraction=1.0", "train.checkpoint_every=1000")
  words = overrides(data, f"train.steps={STEPS}", *same, *more)
  argv = ["-m", "slowfast_jax.cli.main", "train", f"--config={TINY}", f"--workdir={workdir}"]
  with together([[*argv, *words]] * processes, devices) as running:
    yield running


@contextlib.contextmanager
def together(commands, devices=1):
  """Processes of Python that can meet, if there are several."""
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
  several = len(commands) > 1
  who = (f"localhost:{free_port()}", str(len(commands))) if several else ("", "")
  running = [
    subprocess.Popen(
      [sys.executable, *words],
      env=environment | dict(zip(distributed.VARIABLES, (*who, str(i) if several else ""))),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i, words in enumerate(commands)
  ]
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.communicate()


def finish(running):
  shown = [process.communicate(timeout=120)[0] for process in running]
  return [process.returncode for process in running], shown


def lines_of(workdir, name):
  lines = read_lines(epath.Path(workdir / "metrics.jsonl"))
  return {line["step"]: line[name] for line in lines if name in line}


def losses(workdir):
  return lines_of(workdir, "loss")


def questions(folder):
  """Options of an evaluation of four questions of two videos, at step 24 and every 24 steps."""
  (folder / "videos").mkdir()
  for i in range(2):
    write_video(folder / f"videos/{i}.mp4", VideoSpec(num_frames=8))
  docs = [
    {"video": f"{i % 2}.mp4", "question": "Which?", "options": ["a", "b"], "answer": "A"}
    for i in range(4)
  ]
  (folder / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  return (
    "eval.every=24", f"eval.questions={folder / 'test.jsonl'}", f"eval.videos={folder / 'videos'}"
  )  # fmt: skip


def wait_for_step(running, workdir, step):
  for _ in range(6000):
    if max(losses(workdir), default=0) >= step:
      return
    assert running[0].poll() is None, running[0].communicate()[0]
    time.sleep(0.02)
  raise AssertionError(f"no step {step} in two minutes")


def test_two_processes_are_one_run_and_one_process_goes_on_with_it(data, tmp_path):
  with started(data, tmp_path / "alone") as running:
    codes, shown = finish(running)
    assert codes == [0], shown
  more = ("mesh.fsdp=2", "train.steps=1000", *questions(tmp_path))
  with started(data, tmp_path / "two", *more, processes=2, devices=2) as running:
    wait_for_step(running, tmp_path / "two", LONG_ENOUGH)
    running[1].send_signal(signal.SIGTERM)
    codes, shown = finish(running)
  assert codes == [42, 42], shown
  assert "4 cpu (data 2, fsdp 2)" in shown[0]
  both = losses(tmp_path / "two")
  (saved,) = [int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir()]
  assert max(both) == saved, "both stop after one step, and that is saved"
  assert lines_of(tmp_path / "two", "n")[24] == 4, "each has answered the questions of its videos"
  alone = losses(tmp_path / "alone")
  common = sorted(set(alone) & set(both))
  assert len(common) >= LONG_ENOUGH
  # Sums over devices have another order.
  np.testing.assert_allclose(
    [both[step] for step in common], [alone[step] for step in common], rtol=0, atol=1e-4
  )
  with started(data, tmp_path / "two", f"train.steps={saved + 2}") as running:
    codes, shown = finish(running)
  assert codes == [0], shown
  assert f"resumed after step {saved}" in shown[0]
  assert list(losses(tmp_path / "two")) == list(range(1, saved + 3))


def test_a_process_that_must_leave_while_compiling_takes_the_others_along(data, tmp_path):
  with started(data, tmp_path, processes=2, devices=2) as running:
    for line in running[0].stdout:
      if line.startswith("compiling"):
        break
    running[1].send_signal(signal.SIGTERM)
    codes, shown = finish(running)
  assert codes == [42, 42], shown
  assert "nothing new to save" in shown[0] + shown[1] or not losses(tmp_path)


BUSY = """
import sys, time
from slowfast_jax import distributed
from slowfast_jax.train.preemption import Preemption

with Preemption(print) as preemption:
  with preemption.nothing_to_lose():
    distributed.initialize()
  print("met", flush=True)
  time.sleep(float(sys.argv[1]))
  with preemption.nothing_to_lose():
    time.sleep(60)
"""


def test_who_leaves_waits_for_one_that_has_something_to_lose():
  """Without the first process, the coordinator, JAX would abort the other."""
  with together([["-c", BUSY, seconds] for seconds in ("0", "4")]) as running:
    for process in running:
      assert any("met" in line for line in process.stdout)
    running[0].send_signal(signal.SIGTERM)
    codes, shown = finish(running)
  assert codes == [42, 42], shown


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (("localhost:1", "", "0"), "JAX_NUM_PROCESSES is not"),
    (("localhost", "2", "0"), "must be HOST:PORT, got 'localhost'"),
    (("localhost:1", "2", "2"), "must be a number below JAX_NUM_PROCESSES"),
    (("localhost:1", "two", "0"), "got '0' of 'two'"),
  ],
)
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, given, words):
  for name, value in zip(distributed.VARIABLES, given):
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=words):
    distributed.initialize()
