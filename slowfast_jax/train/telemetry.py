# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes and what of the machine it uses: telemetry.jsonl.

Unlike metrics.jsonl these lines are never the same twice. docs/training.md defines every number.
"""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from slowfast_jax.train.flops import peak_flops
from slowfast_jax.train.lines import LineFile, read_lines

_GIB = 2**30
_STATM = Path("/proc/self/statm")  # Linux only.


@dataclasses.dataclass
class _Sums:
  """What has come together since the last line."""

  steps: int = 0
  samples: int = 0
  tokens: int = 0
  frames: int = 0
  flops: float = 0.0
  stalled: float = 0.0
  aside: float = 0.0


class Telemetry:
  """Sums over steps, and writes means of them; the clock runs from `start` on.

  Args:
    file: telemetry.jsonl.
    step: steps that were done before; later lines of the file are dropped.
    tell: is given the step and all numbers of every line, those of metrics.jsonl included.
  """

  def __init__(
    self, file: epath.Path, step: int, tell: Callable[[int, dict[str, Any]], Any] = lambda *_: None
  ):
    self._tell = tell
    before = [line for line in read_lines(file) if line["step"] <= step]
    self._began = before[0]["time"] if before else time.time()
    self._productive = sum(_productive(line) for line in before)
    self._file = LineFile(file, step)
    self._file.write({"step": step, "event": "start", "time": time.time()})
    self.start()

  def start(self) -> None:
    """Starts the clock anew: what came before, compiling above all, belongs to no step."""
    self._since, self._sums = time.monotonic(), _Sums()

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the seconds inside as a stall of the data."""
    began = time.monotonic()
    yield
    self._sums.stalled += time.monotonic() - began

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """The seconds inside belong to no step."""
    began = time.monotonic()
    yield
    self._sums.aside += time.monotonic() - began

  def count(self, values: dict[str, Any], flops: float) -> None:
    """Adds a step, by what its metrics say of its batch."""
    sums = self._sums
    sums.steps += 1
    sums.samples += values.get("samples", 0)
    sums.tokens += values.get("tokens", 0)
    sums.frames += values.get("frames", 0)
    sums.flops += flops

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes the means over the steps since the last line."""
    sums, now, chips = self._sums, time.monotonic(), jax.device_count()
    seconds = max(now - self._since - sums.aside, 1e-9)
    line: dict[str, Any] = {
      "step": step,
      "time": time.time(),
      "steps": sums.steps,
      "step_seconds": seconds / sums.steps,
      "data_stall_seconds": sums.stalled / sums.steps,
      "samples_per_second": sums.samples / seconds,
      "tokens_per_second_per_chip": sums.tokens / seconds / chips,
      "frames_per_second_per_chip": sums.frames / seconds / chips,
      "tflops_per_second_per_chip": sums.flops / seconds / chips / 1e12,
    }
    if (peak := peak_flops(jax.devices()[0].device_kind)) is not None:
      line["mfu"] = sums.flops / seconds / chips / peak
    self._productive += _productive(line)
    line["goodput"] = self._productive / max(line["time"] - self._began, 1e-9)
    line |= memory()
    self._since, self._sums = now, _Sums()
    self._file.write({name: _rounded(value) for name, value in line.items()})
    self._tell(step, metrics | line)

  def close(self) -> None:
    self._file.close()


def memory() -> dict[str, float]:
  """GiB, where they are known: of this process; of its fullest device, now and at its peak."""
  found = {}
  if _STATM.exists():
    pages = int(_STATM.read_text().split()[1])
    found["host_gib"] = pages * resource.getpagesize() / _GIB
  stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  if stats:
    found["device_gib"] = max(one["bytes_in_use"] for one in stats) / _GIB
    found["device_peak_gib"] = max(one.get("peak_bytes_in_use", 0) for one in stats) / _GIB
  return found


def _productive(line: dict[str, Any]) -> float:
  """Seconds in steps, without those in which the device waited for data."""
  return line.get("steps", 0) * (line.get("step_seconds", 0) - line.get("data_stall_seconds", 0))


def _rounded(value: Any) -> Any:
  """To six digits; times to a millisecond."""
  if not isinstance(value, float):
    return value
  return round(value, 3) if value > 1e6 else float(f"{value:.6g}")
