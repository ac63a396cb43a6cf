# SPDX-License-Identifier: Apache-2.0
"""Kills training runs at random moments, also while they save, and compares how they end.

  python -m tests.train.crash_matrix --kills 20 --terms 10 --processes 1 --seed 0

An unbroken run comes first. Then runs are started, and after a random time, at most as long as the
unbroken run took, they get a SIGKILL (all processes) or a SIGTERM (one of them). The same command
goes on, until a run comes through: its parameters must be those of the unbroken run, bit for bit,
and so must metrics.jsonl. A checkpoint that cannot be restored would be told as torn.
"""

import argparse
import collections
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from slowfast_jax.checkpoints.store import flatten, load_export
from tests.train.tiny_run import TINY, overrides, write_data

STEPS = 40


@dataclasses.dataclass(frozen=True)
class Runs:
  """Starts the run in one or several processes, which share two devices.

  Attributes:
    folder: has the data, and gets a folder for each run.
    processes: of every run.
    steps: of every run.
    checkpoint_every: so many of them.
  """

  folder: Path
  processes: int
  steps: int = STEPS
  checkpoint_every: int = 2

  def start(self, workdir: Path) -> list[subprocess.Popen]:
    every = f"train.checkpoint_every={self.checkpoint_every}"
    words = overrides(self.folder, f"train.steps={self.steps}", every)
    argv = [sys.executable, "-m", "slowfast_jax.cli.main", "train", f"--config={TINY}"]
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(2 // self.processes),
      # A run of seconds, of which most would be compiling.
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    alone = self.processes == 1
    address = "" if alone else f"localhost:{_free_port()}"
    started = []
    for i in range(self.processes):
      names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
      values = ("", "", "") if alone else (address, str(self.processes), str(i))
      log = (workdir.parent / f"{workdir.name}-{i}.log").open("a")
      with log:
        started.append(
          subprocess.Popen(
            [*argv, f"--workdir={workdir}", *words],
            env=environment | dict(zip(names, values)),
            stdout=log,
            stderr=log,
          )
        )
    return started


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def wait(running: list[subprocess.Popen], seconds: float) -> bool:
  """Whether all end within so many seconds."""
  until = time.monotonic() + seconds
  for process in running:
    try:
      process.wait(max(until - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      return False
  return True


def outcome_of(workdir: Path) -> tuple[dict[str, np.ndarray], bytes]:
  params = flatten(load_export(workdir / "export").params)
  arrays = {name: np.asarray(value) for name, value in params.items()}
  return arrays, (workdir / "metrics.jsonl").read_bytes()


def logs_of(workdir: Path) -> list[str]:
  """What each process has said, the lives of a run one after the other."""
  return [path.read_text() for path in sorted(workdir.parent.glob(f"{workdir.name}-*.log"))]


def moment_of(workdir: Path, running: list[subprocess.Popen]) -> str:
  """What a run is doing, as far as its folder tells."""
  if all(process.poll() is not None for process in running):
    return "already done"
  checkpoints = workdir / "checkpoints"
  names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
  if any("tmp" in name for name in names):
    return "saving"
  return "between saves" if names else "before the first save"


def interrupt(runs: Runs, workdir: Path, how: signal.Signals, delay: float, chance: random.Random):
  """Starts, interrupts and waits. Returns what the run was doing, and its exit codes."""
  running = runs.start(workdir)
  wait(running, delay)
  moment = moment_of(workdir, running)
  victims = running if how == signal.SIGKILL else [chance.choice(running)]
  for process in victims:
    process.send_signal(how)
  if not wait(running, 90):
    # One left before it had met the others, and they wait for it: as long as JAX says, 300 s.
    words = f"{workdir}: {how.name} after {delay:.2f} s"
    assert moment == "before the first save", f"{words}: {logs_of(workdir)}"
    moment = "before all had met"
    for process in running:
      process.kill()
    wait(running, 60)
  return moment, [process.returncode for process in running]


def finish(runs: Runs, workdir: Path) -> float:
  began = time.monotonic()
  running = runs.start(workdir)
  if not wait(running, 300):
    for process in running:
      process.kill()
    raise AssertionError(f"{workdir}: it hangs: {logs_of(workdir)}")
  codes = [process.returncode for process in running]
  assert codes == [0] * runs.processes, f"{workdir}: exit codes {codes}: {logs_of(workdir)}"
  return time.monotonic() - began


def check_same(workdir: Path, expected: tuple[dict[str, np.ndarray], bytes]) -> None:
  params, metrics = outcome_of(workdir)
  assert params.keys() == expected[0].keys()
  for name, value in expected[0].items():
    np.testing.assert_array_equal(params[name], value, err_msg=f"{workdir}: {name}")
  assert metrics == expected[1], f"{workdir}: metrics.jsonl is another"
  assert "torn" not in "".join(logs_of(workdir)), f"{workdir}: a checkpoint could not be restored"


def run_matrix(
  folder: Path, kills: int, terms: int, processes: int, seed: int, steps: int = STEPS
) -> dict[str, int]:
  """Runs everything. Returns how often each thing has happened.

  Raises:
    AssertionError: a run does not end as the unbroken one.
  """
  write_data(folder)
  runs, chance = Runs(folder, processes, steps), random.Random(seed)
  finish(runs, folder / "warm")  # Fills the compilation cache.
  seconds = finish(runs, folder / "whole")
  expected = outcome_of(folder / "whole")
  todo = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
  chance.shuffle(todo)
  told: collections.Counter[str] = collections.Counter()
  for i, how in enumerate(todo):
    # Two interruptions a run: one of the rerun, too.
    workdir = folder / f"broken{i // 2}"
    moment, codes = interrupt(runs, workdir, how, chance.uniform(0, seconds), chance)
    told[f"{how.name} {moment}: exit {codes}"] += 1
    if how == signal.SIGTERM and moment not in ("already done", "before all had met"):
      # Python itself takes a moment to start, and has no handler until then.
      assert set(codes) <= {42, 0} or -signal.SIGTERM in codes, (
        f"{workdir}: {codes}: {logs_of(workdir)}"
      )
    if i % 2 or i == len(todo) - 1:
      finish(runs, workdir)
      check_same(workdir, expected)
      told["runs that ended as the unbroken one"] += 1
    print(f"{i + 1}/{len(todo)} {how.name} {moment} {codes}", flush=True)
  return dict(told)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name, default in {"kills": 20, "terms": 10, "processes": 1, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    for what, count in sorted(run_matrix(Path(folder), **vars(args)).items()):
      print(f"{count:4d}  {what}")


if __name__ == "__main__":
  main()
