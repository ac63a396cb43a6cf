# SPDX-License-Identifier: Apache-2.0
"""Two processes of four devices are one run: same losses, same step at which both stop."""

import contextlib
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
  argv = [sys.executable, "-m", "slowfast_jax.cli.main", "train", f"--config={TINY}"]
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiling is most of a run that is so short.
    "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}" if processes > 1 else "",
    "JAX_NUM_PROCESSES": str(processes) if processes > 1 else "",
  }
  running = [
    subprocess.Popen(
      [*argv, f"--workdir={workdir}", *words],
      env=environment | {"JAX_PROCESS_ID": str(i) if processes > 1 else ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(processes)
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


def losses(workdir):
  return {line["step"]: line["loss"] for line in read_lines(epath.Path(workdir / "metrics.jsonl"))}


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
  mesh = ("mesh.fsdp=2", "train.steps=1000")
  with started(data, tmp_path / "two", *mesh, processes=2, devices=4) as running:
    wait_for_step(running, tmp_path / "two", LONG_ENOUGH)
    running[1].send_signal(signal.SIGTERM)
    codes, shown = finish(running)
  assert codes == [42, 42], shown
  assert "8 cpu (data 4, fsdp 2)" in shown[0]
  together = losses(tmp_path / "two")
  (saved,) = [int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir()]
  assert max(together) == saved, "both stop after one step, and that is saved"
  alone = losses(tmp_path / "alone")
  common = sorted(set(alone) & set(together))
  assert len(common) >= LONG_ENOUGH
  # Sums over devices have another order.
  np.testing.assert_allclose(
    [together[step] for step in common], [alone[step] for step in common], rtol=0, atol=1e-4
  )
  with started(data, tmp_path / "two", f"train.steps={saved + 2}") as running:
    codes, shown = finish(running)
  assert codes == [0], shown
  assert f"resumed after step {saved}" in shown[0]
  assert list(losses(tmp_path / "two")) == list(range(1, saved + 3))


def test_a_process_that_must_leave_while_compiling_takes_the_others_along(data, tmp_path):
  with started(data, tmp_path, processes=2, devices=4) as running:
    for line in running[0].stdout:
      if line.startswith("compiling"):
        break
    running[1].send_signal(signal.SIGTERM)
    codes, shown = finish(running)
  assert codes == [42, 42], shown
  assert "nothing new to save" in shown[0] + shown[1] or not losses(tmp_path)


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
