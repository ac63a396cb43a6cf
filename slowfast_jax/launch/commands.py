# SPDX-License-Identifier: Apache-2.0
"""A command as a list of words: printed, quoted, by `--dry-run`, or run; never a line of text."""

import dataclasses
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slowfast_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Command:
  """One program to run.

  Attributes:
    argv: its words.
    why: what it is for, in a few words.
    until: run it again and again until its output is this.
    save_to: file that gets its output.
  """

  argv: tuple[str, ...]
  why: str
  until: str = ""
  save_to: Path | None = None

  def render(self) -> str:
    """What `--dry-run` prints: the reason as a comment, and a line for a shell."""
    again = f", again and again until it prints {self.until}" if self.until else ""
    target = f" > {shlex.quote(str(self.save_to))}" if self.save_to else ""
    return f"# {self.why}{again}\n{shlex.join(self.argv)}{target}"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a command ended; code 127 where there is no such program."""

  code: int
  output: str
  errors: str

  @property
  def text(self) -> str:
    """What it said that matters, for a message: from the error on, or else the end."""
    lines = (self.errors or self.output).strip().splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
    return "\n".join(lines[errors[0] :][:5] if errors else lines[-5:])


def capture(command: Command) -> Outcome:
  """Runs a command and keeps what it prints."""
  try:
    done = subprocess.run(
      command.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
  except FileNotFoundError:
    return Outcome(127, "", f"{command.argv[0]}: there is no such program on PATH.")
  if command.save_to and done.returncode == 0:
    command.save_to.write_text(done.stdout, encoding="utf-8")
  return Outcome(done.returncode, done.stdout, done.stderr)


def run_shown(command: Command) -> None:
  """Runs a command on the user's terminal.

  Raises:
    UserError: it failed, with the command.
  """
  if command.save_to:
    outcome = capture(command)
    code, said = outcome.code, f"\n{outcome.text}"
  else:
    try:
      code, said = subprocess.run(command.argv).returncode, ""
    except FileNotFoundError:
      code, said = 127, f"\n{command.argv[0]}: there is no such program on PATH."
  if code:
    raise UserError(f"to {command.why}: exit code {code} of\n{shlex.join(command.argv)}{said}")


def flags(**values: str | int | bool) -> list[str]:
  """`--name=value` for what is set, `--name` for True; nothing for what is empty or False."""
  words = []
  for name, value in values.items():
    flag = "--" + name.rstrip("_").replace("_", "-")
    if value is True:
      words.append(flag)
    elif value:
      words.append(f"{flag}={value}")
  return words


def command(why: str, *words: str | Sequence[str], until: str = "") -> Command:
  """A command of words and lists of words."""
  argv: list[str] = []
  for part in words:
    argv += [part] if isinstance(part, str) else part
  return Command(tuple(argv), why, until)
