# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn
from rich.progress import Progress as RichProgress

# Seconds between the lines of a log: few enough to read, frequent enough to see it is alive.
_LINE_INTERVAL = 10.0


class Progress:
  """How far work has come, how fast, how long it will take, and what went wrong so far.

  `with Progress("Preparing", "videos") as progress: progress(done, total, errors)`

  Args:
    title: what is being done.
    unit: what is counted, in the plural.
    enabled: False on all processes but the first, which show nothing.
  """

  def __init__(self, title: str, unit: str, enabled: bool = True):
    self._title, self._unit, self._enabled = title, unit, enabled
    self._pace = _Pace()
    self._last = (0, 0, 0, "")
    self._next_line = time.monotonic() + _LINE_INTERVAL
    self._bar: RichProgress | None = None

  def __enter__(self) -> "Progress":
    if self._enabled and sys.stdout.isatty():
      columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
      self._bar = RichProgress(
        TextColumn("{task.description}"), *columns, console=Console(file=sys.stdout)
      )
      self._bar.start()
      self._bar.add_task(self._title, total=None, pace="")
    return self

  def __exit__(
    self,
    exception_type: type[BaseException] | None,
    exception: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._enabled and exception_type is None:
      self._print_line()

  def __call__(self, done: int, total: int, errors: int = 0, text: str = "") -> None:
    """Tells how much of the work is done; the first call, what was done before it began."""
    self._last = (done, total, errors, text)
    self._pace.update(done)
    if self._bar is not None:
      task: Task = self._bar.tasks[0]
      self._bar.update(task.id, completed=done, total=total, pace=self._describe_pace())
    elif self._enabled and time.monotonic() >= self._next_line:
      self._print_line()
      self._next_line = time.monotonic() + _LINE_INTERVAL

  def say(self, line: str) -> None:
    """Prints a line; on a terminal, above the bar."""
    if self._enabled:
      print(line, flush=True)

  def _print_line(self) -> None:
    done, total, _, _ = self._last
    print(f"{self._title}: {done}/{total} {self._describe_pace()}", flush=True)

  def _describe_pace(self) -> str:
    done, total, errors, text = self._last
    rate = self._pace.rate()
    parts = [f"{self._unit}, {rate:.3g} a second" if rate else self._unit]
    if rate and done < total:
      parts.append(f"{_duration((total - done) / rate)} left")
    if errors:
      parts.append(f"{errors} errors" if errors > 1 else "1 error")
    if text:
      parts.append(text)
    return ", ".join(parts)


class _Pace:
  """The rate since the first call: what a resumed run found done does not count."""

  def __init__(self):
    self._first: tuple[float, int] | None = None
    self._now = (0.0, 0)

  def update(self, done: int) -> None:
    self._now = (time.monotonic(), done)
    self._first = self._first or self._now

  def rate(self) -> float:
    if self._first is None or self._now[0] <= self._first[0]:
      return 0.0
    return (self._now[1] - self._first[1]) / (self._now[0] - self._first[0])


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
