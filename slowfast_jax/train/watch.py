# SPDX-License-Identifier: Apache-2.0
"""Signs of life, and a look inside: heartbeats, stacks of a step that hangs, the profiler.

Every process writes WORKDIR/hosts/INDEX.json now and then. A step that takes longer than
train.hang_seconds writes where all threads are to WORKDIR/hosts/INDEX.stacks.txt.
"""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from slowfast_jax.files import replace_json

_HEARTBEAT_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # Between two looks at whether a step hangs, at most.
_STEPS_ON_DEMAND = 3


class Watch:
  """To be told of every step before it begins.

  Args:
    folder: of the run.
    hang_seconds: a step that takes longer is taken to hang; 0: none ever does.
    profile: the first step that is profiled, and how many are. SIGUSR1 has three more profiled.
    settle: waits for the steps so far, before a profile begins or ends.
    say: is told of profiles.
  """

  def __init__(
    self,
    folder: epath.Path,
    hang_seconds: float,
    profile: tuple[int, int],
    settle: Callable[[], Any],
    say: Callable[[str], Any],
  ):
    self._folder, self._hang_seconds, self._settle, self._say = folder, hang_seconds, settle, say
    self._first, self._count = profile
    self._stop_at: int | None = None  # The step before which the profile ends; None: there is none.
    self._asked = False
    self._beaten = 0.0
    hosts = folder / "hosts"
    hosts.mkdir(parents=True, exist_ok=True)
    self._heartbeat = hosts / f"{jax.process_index()}.json"
    self._stacks = hosts / f"{jax.process_index()}.stacks.txt"
    self._since: float | None = None  # When the step began; None: there is none to hang.
    self._left = threading.Event()
    self._before: Any = None

  def __enter__(self) -> "Watch":
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGUSR1, self._ask)
    if self._hang_seconds > 0:
      threading.Thread(target=self._look, daemon=True, name="watch").start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGUSR1, self._before)
    self._left.set()
    if self._stop_at is not None:
      self._stop_profile()
    self._beat("left")

  def before(self, step: int) -> None:
    """A step is about to begin: the one before it did not hang."""
    self._since = time.monotonic()
    if time.monotonic() - self._beaten > _HEARTBEAT_SECONDS:
      self._beat(f"step {step}")
    if step == self._stop_at:
      self._settle()
      self._stop_profile()
    wanted = self._count if step == self._first else _STEPS_ON_DEMAND if self._asked else 0
    if wanted and self._stop_at is None:
      self._asked, self._stop_at = False, step + wanted
      self._settle()
      jax.profiler.start_trace(str(self._folder / "profile" / f"step-{step}"))

  def rest(self) -> None:
    """The step is done, and what comes now may take its time."""
    self._since = None

  def _look(self) -> None:
    # A thread of Python's own: faulthandler's would look at frames that are running, and may crash.
    told: float | None = None
    while not self._left.wait(min(self._hang_seconds / 2, _LOOK_SECONDS)):
      since = self._since
      if since is not None and since != told and time.monotonic() - since > self._hang_seconds:
        told = since
        self._stacks.write_text(_all_stacks())
        self._say(f"a step takes longer than {self._hang_seconds:g} s: see {self._stacks}")

  def _stop_profile(self) -> None:
    self._stop_at = None
    jax.profiler.stop_trace()
    self._say(f"profiled: see {self._folder / 'profile'}")

  def _beat(self, doing: str) -> None:
    self._beaten = time.monotonic()
    replace_json(self._heartbeat, {"doing": doing, "time": time.time()})

  def _ask(self, number: int, frame: object) -> None:
    del number, frame
    self._asked = True


def _all_stacks() -> str:
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  return "\n".join(
    f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
    for ident, frame in sys._current_frames().items()
  )
