# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: the machine is about to be taken away, in half a minute or so.

While there is something to lose the signal is only noted, and the loop saves after its step. At all
other times (set-up, compiling, evaluation, export) the process leaves at once: Python would answer
the signal only after the compiler has finished, and that can take minutes.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from slowfast_jax.distributed import is_first, someone_leaves, tell_leaving, wait_for_leavers

PREEMPTED = 42

_POLL_SECONDS = 0.5  # Between two looks at whether another process leaves.
# The others have to see it before they miss this process. Half of the time between SIGTERM and the
# end of the machine.
_FAREWELL_SECONDS = 15
# The coordinator leaves last: a process that it leaves behind is aborted by JAX.
_COORDINATOR_SECONDS = 1


class Preemption:
  """Whether the process has been asked to stop, from `with` on.

  Only the main thread may handle signals: elsewhere nothing is ever asked for.

  Args:
    say: is told why the process leaves.
    leave: ends the process; for tests.
  """

  def __init__(self, say: Callable[[str], Any], leave: Callable[[int], Any] = os._exit):
    self._say, self._leave = say, leave
    self._asked = False
    self._may_leave, self._may_follow = False, False
    self._lock = threading.Lock()
    self._before: list[tuple[int, Any]] = []

  def __enter__(self) -> "Preemption":
    if threading.current_thread() is threading.main_thread():
      self._ours, theirs = socket.socketpair()
      for end in (self._ours, theirs):
        end.setblocking(False)
      self._theirs = theirs
      # A byte for each signal, from the handler in C: it comes even while the compiler is at work.
      self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
      self._before = [(signal.SIGTERM, signal.signal(signal.SIGTERM, self._note))]
      self._watcher = threading.Thread(target=self._watch, daemon=True, name="preemption")
      self._watcher.start()
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before:
      signal.signal(number, handler)
      signal.set_wakeup_fd(self._wakeup)
      self._theirs.close()  # Ends the watcher.
      self._watcher.join()
      self._ours.close()

  @property
  def asked(self) -> bool:
    return self._asked

  @contextlib.contextmanager
  def nothing_to_lose(self) -> Iterator[None]:
    """Inside, the process leaves with 42 as soon as it is asked to, or was before."""
    with self._leaving(of_itself=True):
      yield

  @contextlib.contextmanager
  def waiting_for_others(self) -> Iterator[None]:
    """Inside, it leaves only if another process has; one that has arrived here counts on all."""
    with self._leaving(of_itself=False):
      yield

  @contextlib.contextmanager
  def _leaving(self, *, of_itself: bool) -> Iterator[None]:
    with self._lock:
      self._may_leave, self._may_follow = of_itself, True
      if self._may_leave and self._asked:
        self._say_goodbye()
    try:
      yield
    finally:
      with self._lock:
        self._may_leave = self._may_follow = False

  def _note(self, number: int, frame: object) -> None:
    del number, frame
    self._asked = True

  def _watch(self) -> None:
    while True:
      ready, _, _ = select.select([self._ours], [], [], _POLL_SECONDS)
      numbers = self._ours.recv(64) if ready else b""
      if ready and not numbers:
        return
      with self._lock:
        if signal.SIGTERM in numbers:
          self._asked = True
        asked = self._may_leave and self._asked
        if asked or (self._may_follow and someone_leaves()):
          self._say_goodbye()

  def _say_goodbye(self) -> None:
    if self._asked:
      self._say("stopped by SIGTERM with nothing new to save; the same command goes on")
      tell_leaving()
    if jax.distributed.is_initialized():
      wait_for_leavers(_FAREWELL_SECONDS)
      if is_first():
        time.sleep(_COORDINATOR_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    self._leave(PREEMPTED)
