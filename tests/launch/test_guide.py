# SPDX-License-Identifier: Apache-2.0
"""The guide's commands are real: launch commands make a plan, others have flags that exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from slowfast_jax.cli import main as slowfast
from slowfast_jax.launch.main import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/pod.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture
def desk(tmp_path, monkeypatch):
  """A folder with the guide's own launch file and the examples."""
  (tmp_path / "my.toml").write_text(re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[1])
  (tmp_path / "launch").symlink_to(ROOT / "launch")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python ")])
def test_launch_command_makes_a_plan(line, desk, capsys):
  program, script, *words = shlex.split(line)
  assert (program, script) == ("python", "launch/tpu.py")
  assert main([word for word in words if word != "--dry-run"] + ["--dry-run"]) == 0
  assert capsys.readouterr().out.count("\n#") >= ("retry" in words)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("slowfast ")])
def test_slowfast_command_has_flags_that_exist(line, desk):
  _, verb, *words = shlex.split(line)
  for config in re.findall(r"configs/\w+\.py", line):
    assert Path(config).is_file()
  if verb in slowfast.VERBS:
    slowfast._parse(verb, import_module(f"slowfast_jax.cli.{verb}"), words)


def test_no_other_program_is_used():
  assert {line.split()[0] for line in LINES} == {"slowfast", "python", "gcloud", "docker"}


def test_every_config_of_an_example_exists():
  files = sorted((ROOT / "launch/examples").glob("*.toml"))
  named = [name for file in files for name in re.findall(r"configs/\w+\.py", file.read_text())]
  assert len(named) == len(files)
  assert [name for name in named if not (ROOT / name).is_file()] == []
