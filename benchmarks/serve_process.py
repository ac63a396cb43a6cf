# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, as users start it, for measurements and tests."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil

_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class ServerProcess:
  """A server that answers.

  Attributes:
    url: where.
    process: its process.
  """

  url: str
  process: subprocess.Popen

  def metric(self, name: str) -> float:
    """A value of /metrics, summed over its labels."""
    lines = httpx.get(f"{self.url}/metrics").text.splitlines()
    found = [line for line in lines if line.split("{")[0].split(" ")[0] == f"slowfast_{name}"]
    return sum(float(line.rpartition(" ")[2]) for line in found)

  def wait_for(self, name: str, value: float, seconds: float = 30.0) -> None:
    """Waits until a metric has a value."""
    end = time.monotonic() + seconds
    while self.metric(name) != value:
      if time.monotonic() > end:
        raise TimeoutError(f"{name} is {self.metric(name):g}, expected {value:g}.")
      time.sleep(0.02)

  def memory(self) -> float:
    """Megabytes of the process and its workers."""
    family = [psutil.Process(self.process.pid)]
    family += family[0].children(recursive=True)
    return sum(process.memory_info().rss for process in family) / 1e6

  def terminate(self, seconds: float = 60.0) -> int:
    """Sends SIGTERM and returns the exit code."""
    self.process.send_signal(signal.SIGTERM)
    return self.process.wait(seconds)


@contextlib.contextmanager
def serving(checkpoint: Path, *flags: str, log: Path) -> Iterator[ServerProcess]:
  """Starts `slowfast serve` on a free port and waits until it is ready; stops it at the end."""
  words: Sequence[str] = ("-m", "slowfast_jax.cli.main", "serve", f"--checkpoint={checkpoint}")
  environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
  with log.open("w") as out:
    process = subprocess.Popen(
      [sys.executable, *words, "--port=0", "--name=tiny", *flags],
      env=environment,
      stdout=out,
      stderr=subprocess.STDOUT,
    )
  try:
    yield ServerProcess(_address(process, log), process)
  finally:
    process.kill()
    process.wait()


def _address(process: subprocess.Popen, log: Path) -> str:
  while process.poll() is None:
    for line in log.read_text().splitlines():
      if line.startswith("Serving "):
        return line.rpartition(" ")[2]
    time.sleep(0.05)
  raise RuntimeError(f"The server did not start:\n{log.read_text()[-4000:]}")
