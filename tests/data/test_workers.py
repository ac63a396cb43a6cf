# SPDX-License-Identifier: Apache-2.0
"""Worker processes: order, and jobs that raise, hang or take their process down."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from slowfast_jax.data.workers import Failure, Workers


def work(job: str) -> str:
  """What the tests let workers do, as "NAME ARGUMENT"."""
  name, _, argument = job.partition(" ")
  if name == "raise":
    raise KeyError(argument)
  if name == "crash":
    os.kill(os.getpid(), int(argument))
  if name == "exit":
    os._exit(int(argument))
  if name == "sleep":
    time.sleep(float(argument))
  return job


def test_results_come_in_order_and_failures_are_values():
  jobs = [
    "sleep 0.3",
    "a",
    "raise x",
    f"crash {int(signal.SIGSEGV)}",
    "b",
    "sleep 60",
    "exit 3",
    "c",
  ]
  with Workers(work, count=2, timeout=2.0) as workers:
    results = list(workers.map(jobs))
  assert results == [
    "sleep 0.3",
    "a",
    Failure("KeyError: 'x'"),
    Failure("crashed its worker process: SIGSEGV"),
    "b",
    Failure("took longer than 2 seconds (--timeout)"),
    Failure("crashed its worker process: exit code 3"),
    "c",
  ]


def test_a_worker_that_dies_idle_costs_no_job():
  with Workers(work, count=1, timeout=30.0) as workers:
    assert list(workers.map(["a"])) == ["a"]
    for child in psutil.Process().children():
      if "spawn_main" in " ".join(child.cmdline()):
        child.kill()
        child.wait()
    assert list(workers.map(["b", "c"])) == ["b", "c"]


def finish(seconds: float) -> tuple[float, bytes]:
  time.sleep(seconds)
  return time.monotonic(), bytes(400)


def test_memory_that_waits_for_its_turn_is_bounded(monkeypatch):
  monkeypatch.setattr("slowfast_jax.data.workers._MAX_WAITING_BYTES", 1000)
  with Workers(finish, count=2, timeout=30.0) as workers:
    first, *others = [when for when, _ in workers.map([1.0] + 9 * [0.0])]
  assert sum(when < first for when in others) == 3


class Unpicklable:
  def __reduce__(self):
    return os._exit, (1,)

  def __call__(self, job):
    return job


def test_workers_that_cannot_start_are_an_error():
  with (
    pytest.raises(RuntimeError, match="could not start"),
    Workers(Unpicklable(), count=1, timeout=30.0) as workers,
  ):
    list(workers.map([1]))


def test_workers_end_with_a_parent_that_is_killed():
  code = (
    "from tests.data.test_workers import Workers, work\n"
    "with Workers(work, count=2, timeout=60.0) as workers:\n"
    "  for job in workers.map(['a', 'b', 'sleep 60', 'sleep 60']): print(job, flush=True)\n"
  )
  with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
    assert [parent.stdout.readline() for _ in range(2)] == ["a\n", "b\n"]
    children = psutil.Process(parent.pid).children()
    assert len(children) >= 2
    parent.kill()
  _, alive = psutil.wait_procs(children, timeout=10)
  assert not alive
