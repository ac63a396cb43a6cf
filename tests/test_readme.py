# SPDX-License-Identifier: Apache-2.0
"""Every command and every Python block of the README runs as it stands there.

The `slowfast` commands run for real, in their order, in one temporary folder: `slowfast demo
--fast` has filled its `runs/demo`, as `make demo` does in a checkout. What would install packages
is checked against pyproject.toml and the Makefile instead. A command that no rule covers fails.
"""

import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shell

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = "slowfast demo --workdir runs/demo"
# Enough to see that the command works; the README's own words come first.
CHEAPER = {"demo": "--fast", "train": "--config.train.steps=4"}
WRITES = ("--workdir", "--output", "--html", "--json", "--report")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
  """(language, content) of every fenced block, also of those that belong to a list item."""
  found, language, content = [], None, []
  for line in text.splitlines():
    fence = re.fullmatch(r" *```(\w*)", line)
    if not fence:
      content.append(line)
    elif language is None:
      language, content = fence[1], []
    else:
      found.append((language, textwrap.dedent("\n".join(content))))
      language = None
  assert language is None, "README.md: a fenced block is not closed."
  return found


def blocks(language: str) -> list[str]:
  return [content for name, content in fenced_blocks(README) if name == language]


def commands() -> list[str]:
  lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
  return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


COMMANDS = commands()


@dataclasses.dataclass
class Folder:
  """The folder in which the README's commands run; each at most once, after those before it."""

  demo: Any  # conftest.DemoRun
  done: dict[str, subprocess.CompletedProcess] = dataclasses.field(default_factory=dict)

  @property
  def path(self) -> Path:
    return self.demo.shell.path

  @property
  def shell(self) -> Shell:
    return Shell(self.path)  # What comes after the demo compiles for longer than it computes.

  def run_up_to(self, command: str) -> subprocess.CompletedProcess:
    """Later commands need what earlier ones wrote, also when a test is run alone."""
    before = COMMANDS[: COMMANDS.index(command)] if command in COMMANDS else []
    for line in [DEMO, *(line for line in before if line.startswith("slowfast ")), command]:
      if line not in self.done:
        cheap = f"{line} {CHEAPER.get(line.split()[1], '')}".strip()
        is_demo = cheap == self.demo.command
        self.done[line] = self.demo.outcome if is_demo else self.shell.slowfast(cheap)
      outcome = self.done[line]
      assert outcome.returncode == 0, f"{line}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-4000:]}"
    return self.done[command]


@pytest.fixture(scope="session")
def folder(demo_run):
  return Folder(demo_run)


def check_slowfast(command: str, folder: Folder) -> None:
  outcome = folder.run_up_to(command)
  assert outcome.stdout.strip()
  words = shlex.split(command.replace("=", " "))
  for option, value in itertools.pairwise(words):
    if option in WRITES:
      assert (folder.path / value).exists(), f"{command}: {value} was not written"


def check_make(command: str, folder: Folder) -> None:
  """The target exists, installs, and ends in the command that the rest of the README counts on."""
  target = command.split()[1]
  last = {
    "demo": DEMO,
    "test": "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder",
    "lint": "mypy",
  }[target]
  plan = subprocess.run(
    # Started by `make test`, this make is an inner one and would say which folder it enters.
    ["make", "--no-print-directory", "-n", f"VENV={folder.path}/venv", target],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert plan.returncode == 0, plan.stderr
  assert "-m venv" in plan.stdout
  assert "-m pip install" in plan.stdout
  assert plan.stdout.strip().endswith(last)


def check_pip(command: str, folder: Folder) -> None:
  """What is installed is this checkout, with extras that it has."""
  match = re.fullmatch(r"pip install (?:\.|\"\.\[([\w,]+)\]\")", command)
  assert match, f'{command}: expected `pip install .` or `pip install ".[EXTRA]"`'
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["scripts"] == {"slowfast": "slowfast_jax.cli.main:main"}
  for extra in filter(None, (match[1] or "").split(",")):
    assert extra in project["optional-dependencies"]


def check_activate(command: str, folder: Folder) -> None:
  folder_of_make = re.search(r"^VENV \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
  assert folder_of_make
  assert command == f"source {folder_of_make[1]}/bin/activate"


RULES = {
  "slowfast ": check_slowfast,
  "make ": check_make,
  "pip install ": check_pip,
  "source ": check_activate,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_works(command, folder):
  rules = [check for start, check in RULES.items() if command.startswith(start)]
  assert rules, f"No rule of this test covers {command!r}: add one."
  rules[0](command, folder)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_works(block, folder):
  folder.run_up_to(DEMO)
  outcome = folder.shell.python("-c", block)
  assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("block", blocks("json"))
def test_json_block_is_valid(block):
  json.loads(block)


def test_no_command_hides_from_these_tests():
  """A block of another language, or of none, would be one that nothing checks."""
  languages = {name for name, _ in fenced_blocks(README)}
  assert languages <= {"bash", "python", "json", ""}
  for block in blocks(""):
    assert not re.search(r"^\W*(slowfast|make|pip|python) ", block, re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^):#]+)\)", README))
def test_link_into_the_checkout_leads_somewhere(target):
  assert (ROOT / target).exists()
