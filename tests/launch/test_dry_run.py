# SPDX-License-Identifier: Apache-2.0
"""`--dry-run` prints what would run, word for word, and needs nothing but Python."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch.golden_file import EXAMPLES, golden, text_of

from slowfast_jax.launch.main import main

ROOT = Path(__file__).parents[2]
SPOT = ROOT / "launch/examples/queued_spot.toml"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_verb_prints_what_it_printed_before(example):
  """After a change that was meant: python tests/launch/golden_file.py"""
  assert text_of(example) == golden(example).read_text(encoding="utf-8")


def test_five_setups_are_shown():
  names = {example.stem for example in EXAMPLES}
  assert names == {"queued_spot", "queued_reserved", "tpu_vm", "gke_xpk", "multislice"}
  assert {path.stem for path in golden(SPOT).parent.iterdir()} == names


def test_no_program_and_no_package_is_needed(tmp_path):
  words = [sys.executable, "-I", "-S", str(ROOT / "launch/tpu.py"), "retry", str(SPOT), "--dry-run"]
  shown = subprocess.run(
    words, cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True
  )
  assert shown.returncode == 0, shown.stderr
  assert "queued-resources create sft-64f" in shown.stdout
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_quoting_survives_a_shell(example, capsys):
  nasty = 'It\'s "fine"; $HOME `id` & *.py'
  words = ["run", str(example), "--dry-run", "--set", "job.env.TITLE=" + nasty]
  assert main(words) == 0
  lines = [line for line in capsys.readouterr().out.splitlines() if "TITLE=" in line]
  assert len(lines) == 1
  (command,) = [word for word in shlex.split(lines[0]) if word.startswith("--command=")]
  assert f"--env=TITLE={nasty}" in shlex.split(command.partition("=")[2])


def test_value_of_a_secret_is_on_no_command_line(monkeypatch, capsys):
  monkeypatch.setenv("WANDB_API_KEY", "hunter2-hunter2")
  for example in EXAMPLES:
    for verb in ("up", "run", "retry"):
      assert main([verb, str(example), "--dry-run"]) == 0
  assert "hunter2" not in capsys.readouterr().out
  assert main(["run", str(SPOT), "--dry-run", "--set", "job.env.WANDB_API_KEY=hunter2"]) == 1
  refused = capsys.readouterr()
  assert "hunter2" not in refused.out + refused.err


def test_wheel_is_built_of_a_path_and_never_of_a_name(monkeypatch, capsys):
  """pip takes a bare word for a package of that name, and downloads it."""
  monkeypatch.chdir(ROOT.parent)
  assert main(["run", str(SPOT), "--dry-run"]) == 0
  (line,) = [x for x in capsys.readouterr().out.splitlines() if " pip wheel " in x]
  assert shlex.split(line)[-1] == os.path.join(".", ROOT.name)


def test_wrong_file_is_exit_1_and_wrong_usage_2(tmp_path, capsys):
  assert main(["up", str(tmp_path / "none.toml")]) == 1
  assert main(["up", str(SPOT), "--set", "slices"]) == 2
  assert "tpu.py up: --set: expected" in capsys.readouterr().err


def test_program_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert main(["down", str(SPOT)]) == 1
  assert "gcloud: there is no such program on PATH" in capsys.readouterr().err


def test_shell_scripts_are_clean():
  scripts = sorted((ROOT / "launch/host").glob("*.sh"))
  assert len(scripts) == 4
  subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], check=True)
