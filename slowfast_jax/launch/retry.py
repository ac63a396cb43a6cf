# SPDX-License-Identifier: Apache-2.0
"""`retry`: keeps a job going until it is done, through preemptions, restarts and a flaky cloud.

It looks, acts, waits, and remembers nothing that the cloud does not know, so it can itself be
stopped and started again. A spot slice that was taken away is deleted and asked for anew; the job
goes on from its checkpoint.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable

from slowfast_jax.errors import UserError
from slowfast_jax.launch.commands import Command, Outcome, capture
from slowfast_jax.launch.gke import Gke
from slowfast_jax.launch.machines import STATES, Machines
from slowfast_jax.launch.settings import Settings

# Looks at a job that has ended on some hosts only before the others are stopped; JAX itself needs
# some minutes to notice that a host is gone.
UNEVEN_LOOKS = 10

# Errors that are the same the next time.
REFUSED = (
  "PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|unrecognized arguments|Invalid choice"
  "|active account selected"
  "|there is no such program on PATH"
)

Say = Callable[[str], None]


class FlakyError(Exception):
  """A command of the cloud failed in a way that may pass."""


def may_restart(code: int) -> bool:
  """The rule that xpk has too: preempted and saved (42), or ended by a signal (127 to 255)."""
  return code == 42 or 127 <= code <= 255


def judge_hosts(output: str) -> str:
  """What a job does, of what launch/host/state.sh printed on every host.

  Returns:
    ABSENT, RUNNING, UNEVEN (ended on some hosts), DONE, FAILED, STOPPED (by `stop`) or AGAIN.
  """
  states = re.findall(r"slowfast-host: (\w+(?: \d+)?)", output)
  codes = [int(state.split()[1]) for state in states if state.startswith("exit ")]
  running = states.count("running")
  if not states:
    raise FlakyError(f"no host answered: {output.strip()[-300:]!r}")
  if any(code != 0 and not may_restart(code) for code in codes):
    return "FAILED"
  if running:
    return "RUNNING" if running == len(states) else "UNEVEN"
  if "stopped" in states:
    return "STOPPED"
  if set(states) == {"exit 0"}:
    return "DONE"
  return "ABSENT" if set(states) == {"absent"} else "AGAIN"


def judge_jobset(output: str) -> str:
  """What a job does, of its JobSet in JSON. GKE starts it again by itself."""
  status = json.loads(output).get("status", {})
  ended = {item["type"]: item["status"] == "True" for item in status.get("conditions", [])}
  for kind, state in (("Completed", "DONE"), ("Failed", "FAILED")):
    if status.get("terminalState") == kind or ended.get(kind):
      return state
  return "RUNNING"


class LostError(Exception):
  """Machines were taken away, and have to be asked for anew."""


@dataclasses.dataclass
class Babysitter:
  """One job, and what has happened to it since `retry` began.

  Attributes:
    say: gets one line for each event.
    sleep: waits that many seconds.
  """

  settings: Settings
  route: Machines | Gke
  say: Say
  sleep: Callable[[float], None] = time.sleep
  restarts: int = 0
  failures: int = 0
  uneven: int = 0
  counted: bool = False  # The machines that are lost now are among the restarts.
  last: str = ""

  def watch(self) -> int:
    """Returns 0 when the job is done or was stopped on purpose, 1 when it failed.

    Raises:
      UserError: the cloud refuses or keeps failing, or the restarts are used up.
    """
    while True:
      try:
        end = self._look()
        self.failures = 0
        if end is not None:
          return self._finish(end)
      except LostError:
        self._recreate()
      except FlakyError as problem:
        self._bear(problem)
      self.sleep(self.settings.retry.poll_seconds)

  def _bear(self, problem: FlakyError) -> None:
    self.failures += 1
    patience = self.settings.retry.patience
    self.say(f"failed ({self.failures} of {patience} in a row): {problem}")
    if self.failures >= patience:
      raise UserError(
        f"the cloud failed {patience} times in a row; the last time: {problem}\nThe machines may "
        "still cost money: see `status`, and `down` gives them back."
      )
    self.sleep(self._pause(self.failures))

  def _look(self) -> str | None:
    """One look and what follows from it. Returns how the job ended, if it did."""
    if isinstance(self.route, Machines) and not self._machines_are_there(self.route):
      return None
    job = self._job()
    self._tell(f"job {job.lower()}")
    self.uneven = self.uneven + 1 if job == "UNEVEN" else 0
    if job in ("DONE", "STOPPED"):
      return job
    if job == "FAILED" and self._really_failed():
      return job
    if job == "AGAIN":
      self._count_restart("the job ended and may go on")
    if job in ("ABSENT", "AGAIN"):
      self.say("starting the job")
      self._do_all(self.route.ship())
    if isinstance(self.route, Machines) and self.uneven >= UNEVEN_LOOKS:
      self.say("the job has ended on some hosts only")
      self._do_all([self.route.kill()])
    return None

  def _machines_are_there(self, route: Machines) -> bool:
    machines = self._machines(route)
    self._tell(f"machines {machines.lower()}")
    if machines == "ABSENT":
      self._do(route.up()[0], "ALREADY_EXISTS")
    if machines == "LOST":
      raise LostError
    self.counted = False
    return machines == "ACTIVE"

  def _machines(self, route: Machines) -> str:
    outcome = self._ask(route.describe())
    if outcome is None:
      return "ABSENT"
    state = outcome.output.strip()
    for name, words in STATES.items():
      if state in words:
        return name
    raise FlakyError(f"the machines are in a state that is not known: {state!r}")

  def _job(self) -> str:
    outcome = capture(self.route.job_state())
    if isinstance(self.route, Gke):
      if _not_found(outcome):
        return "ABSENT"
      _need(outcome)
      return judge_jobset(outcome.output)
    if outcome.code and self._a_node_is_lost(self.route):
      raise LostError
    _need(outcome)
    return judge_hosts(outcome.output)

  def _a_node_is_lost(self, route: Machines) -> bool:
    asked = [self._ask(command) for command in route.describe_nodes()]
    return any(one is None or one.output.strip() in STATES["LOST"] for one in asked)

  def _really_failed(self) -> bool:
    """A preemption can look like an error of the job for a moment: look at the machines again."""
    if not isinstance(self.route, Machines):
      return True
    self.sleep(self.settings.retry.poll_seconds)
    if self._machines(self.route) != "ACTIVE" or self._a_node_is_lost(self.route):
      self.say("the machines were lost, so the job's error does not count")
      raise LostError
    for command in self.route.logs("all", follow=False):
      self.say(f"the end of the log:\n{capture(command).output}")
    return True

  def _recreate(self) -> None:
    assert isinstance(self.route, Machines)
    if not self.counted:
      self._count_restart("the machines were taken away")
      self.counted = True
    try:
      self._do_all(self.route.down())
    except FlakyError as problem:
      self._bear(problem)

  def _count_restart(self, why: str) -> None:
    self.restarts += 1
    limit = self.settings.retry.max_restarts
    if self.restarts > limit:
      raise UserError(
        f"{why}, and retry.max_restarts = {limit} restarts are used up. The machines may still "
        "cost money: `down` gives them back."
      )
    pause = self._pause(self.restarts)
    self.say(f"{why}: restart {self.restarts} of {limit} in {pause:g} s")
    self.sleep(pause)

  def _pause(self, times: int) -> float:
    retry = self.settings.retry
    return min(retry.backoff_seconds * 2.0 ** min(times - 1, 30), retry.max_backoff_seconds)

  def _finish(self, end: str) -> int:
    """The end: machines that nobody needs any more are given back."""
    code = 1 if end == "FAILED" else 0
    self.say(f"the job is {end.lower()}, after {self.restarts} restarts")
    if not isinstance(self.route, Machines):
      return code
    if end == "STOPPED" or not self.settings.retry.delete_at_end:
      self.say("the machines still cost money: `down` gives them back")
      return code
    for command in self.route.down():
      outcome = capture(command)
      if outcome.code and not _not_found(outcome):
        self.say(f"NOT given back: {outcome.text}; run `down`")
        return 1
    self.say("the machines are given back")
    return code

  def _tell(self, event: str) -> None:
    if event != self.last:
      self.say(event)
    self.last = event

  def _ask(self, command: Command) -> Outcome | None:
    """The outcome, or None where there is no such thing."""
    outcome = capture(command)
    if _not_found(outcome):
      return None
    _need(outcome)
    return outcome

  def _do_all(self, commands: list[Command]) -> None:
    for command in commands:
      self._do(command, "NOT_FOUND")

  def _do(self, command: Command, fine: str) -> None:
    """Runs a command that changes something. What is as it should be already is no error."""
    self.say(command.why)
    outcome = capture(command)
    if outcome.code and fine not in outcome.errors:
      _need(outcome)


def _not_found(outcome: Outcome) -> bool:
  return bool(outcome.code) and bool(re.search(r"NOT_FOUND|\(NotFound\)|not found", outcome.errors))


def _need(outcome: Outcome) -> None:
  """Raises FlakyError for what may pass, and UserError for what waiting does not mend."""
  if not outcome.code:
    return
  if re.search(REFUSED, outcome.errors):
    raise UserError(f"this will not pass by itself: {outcome.text}")
  raise FlakyError(outcome.text)
