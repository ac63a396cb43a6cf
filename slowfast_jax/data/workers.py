# SPDX-License-Identifier: Apache-2.0
"""Worker processes for work that may fail in every way: results in order, failures as values.

Decoding strangers' videos can raise, hang or crash the process. The parent watches every job: one
that takes too long or takes its worker down becomes a `Failure`, a new worker takes over, and the
other jobs never notice. Standard pools lose all jobs to one crash and cannot time out one job.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from slowfast_jax.errors import UserError

# Finished results that wait for an earlier one. Generous, so that one long video stalls nobody.
_MAX_WAITING_BYTES = 512 * 2**20

_SPAWN = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why a job has no result."""

  reason: str


@dataclasses.dataclass(frozen=True)
class _Outcome:
  job: int
  value: Any
  num_bytes: int = 0


@dataclasses.dataclass
class _Worker:
  process: multiprocessing.process.BaseProcess
  connection: Connection
  ready: bool = False
  job: int | None = None
  deadline: float = float("inf")


class Workers:
  """Runs `function(job)` for many jobs in worker processes, which end with this process.

  Args:
    function: picklable. What it raises becomes a Failure.
    count: worker processes.
    timeout: seconds that one job may take.
  """

  def __init__(self, function: Callable[[Any], Any], count: int, timeout: float):
    self._function, self._count, self._timeout = function, count, timeout
    self._workers: list[_Worker] = []

  def __enter__(self) -> "Workers":
    self._workers = [self._start() for _ in range(self._count)]
    return self

  def __exit__(self, *_) -> None:
    for worker in self._workers:
      _stop(worker)
    self._workers = []

  def map(self, jobs: Iterable) -> Iterator[Any]:
    """Yields what became of every job, its result or a Failure, in the order of the jobs."""
    jobs = list(jobs)
    ended: dict[int, _Outcome] = {}
    started = waiting = 0
    for position in range(len(jobs)):
      while position not in ended:
        for worker in list(self._workers):
          idle = worker.ready and worker.job is None
          if idle and started < len(jobs) and waiting < _MAX_WAITING_BYTES:
            started += self._give(worker, started, jobs[started])
        for outcome in self._collect():
          ended[outcome.job] = outcome
          waiting += outcome.num_bytes
      outcome = ended.pop(position)
      waiting -= outcome.num_bytes
      yield outcome.value

  def _start(self) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, self._function), daemon=True)
    process.start()
    theirs.close()  # Only the worker holds it now, so its death reads as the end of the pipe.
    return _Worker(process, ours)

  def _give(self, worker: _Worker, number: int, job) -> bool:
    """Starts a job; False if the worker has died idle, which is not the job's fault."""
    try:
      worker.connection.send(job)
    except OSError:
      self._replace(worker)
      return False
    worker.job, worker.deadline = number, time.monotonic() + self._timeout
    return True

  def _collect(self) -> Iterator[_Outcome]:
    """Waits until something happens; yields what has ended, well or badly."""
    deadline = min(worker.deadline for worker in self._workers)
    patience = None if deadline == float("inf") else max(deadline - time.monotonic(), 0)
    answered = wait([worker.connection for worker in self._workers], patience)
    for worker in list(self._workers):
      if worker.connection in answered:
        yield from self._receive(worker)
      elif worker.job is not None and time.monotonic() >= worker.deadline:
        reason = f"took longer than {self._timeout:g} seconds (--timeout)"
        yield _Outcome(worker.job, Failure(reason))
        self._replace(worker)

  def _receive(self, worker: _Worker) -> Iterator[_Outcome]:
    try:
      answer = worker.connection.recv_bytes()
    except (EOFError, OSError):
      if not worker.ready:
        raise RuntimeError(
          "a worker process could not start; its error stands above. A script that prepares "
          'records needs `if __name__ == "__main__":` around what it runs'
        ) from None
      if worker.job is not None:
        yield _Outcome(worker.job, Failure(_cause_of_death(worker.process)))
      self._replace(worker)
      return
    if worker.job is not None:
      yield _Outcome(worker.job, pickle.loads(answer), len(answer))
    worker.ready, worker.job, worker.deadline = True, None, float("inf")

  def _replace(self, worker: _Worker) -> None:
    _stop(worker)
    self._workers[self._workers.index(worker)] = self._start()


def _stop(worker: _Worker) -> None:
  worker.process.kill()  # It only computes: there is nothing that it could leave half done.
  worker.process.join()
  worker.connection.close()


def _cause_of_death(process: multiprocessing.process.BaseProcess) -> str:
  process.join(timeout=5)
  code = process.exitcode
  if code is not None and code < 0:
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"crashed its worker process: {signal.Signals(-code).name}{hint}"
  return f"crashed its worker process: exit code {code}"


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
  follow_parent()
  with contextlib.suppress(EOFError, OSError):  # The parent is gone.
    connection.send(None)  # Ready: imports are done, so they do not count against a job's time.
    while True:
      connection.send(_attempt(function, connection.recv()))


def _attempt(function: Callable[[Any], Any], job) -> Any:
  try:
    return function(job)
  except (UserError, OSError) as error:
    return Failure(str(error))
  except Exception as error:
    return Failure(f"{type(error).__name__}: {error}")


def follow_parent() -> None:
  """To be called in a worker process: it ends when its parent does, and only then."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent acts.
  threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
  """Ends the worker even in the middle of a job, however the parent ended."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    wait([parent.sentinel])
    os._exit(1)
