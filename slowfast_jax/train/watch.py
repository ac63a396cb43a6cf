# SPDX-License-Identifier: Apache-2.0
"""Signs of life, and a look inside: heartbeats, stacks of a step that hangs, the profiler.

Every process writes WORKDIR/hosts/INDEX.json now and then. A step that takes longer than
train.hang_seconds writes where all threads are to WORKDIR/hosts/INDEX.stacks.txt.
"""

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import jax
from etils import epath

from slowfast_jax.files import replace_json

_HEARTBEAT_SECONDS = 10.0
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
    # faulthandler needs a file of this machine.
    remote = "://" in hosts.as_posix()
    name = f"{jax.process_index()}.stacks.txt"
    self._stacks: TextIO = sys.stderr if remote else open(hosts / name, "w")  # noqa: SIM115
    self._before: Any = None

  def __enter__(self) -> "Watch":
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGUSR1, self._ask)
    return self

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGUSR1, self._before)
    faulthandler.cancel_dump_traceback_later()
    if self._stop_at is not None:
      self._stop_profile()
    self._beat("left")
    if self._stacks is not sys.stderr:
      self._stacks.close()

  def before(self, step: int) -> None:
    """A step is about to begin: the one before it did not hang."""
    if self._hang_seconds > 0:
      faulthandler.dump_traceback_later(self._hang_seconds, repeat=True, file=self._stacks)
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
