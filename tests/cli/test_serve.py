# SPDX-License-Identifier: Apache-2.0
"""`slowfast serve`: flags, keys and what is said when the extra is not installed."""

import socket
import subprocess
import sys

import pytest

from slowfast_jax.cli import serve as verb
from slowfast_jax.cli.main import VERBS, main


def test_its_help_is_that_of_the_list():
  assert VERBS["serve"] == verb.HELP


def test_help_needs_no_extra(tmp_path):
  hidden = f"import sys; sys.modules.update(dict.fromkeys({list(verb._MODULES)!r}))\n"
  program = hidden + "from slowfast_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"

  def run(*words):
    command = [sys.executable, "-c", program, "serve", *words]
    return subprocess.run(command, capture_output=True, text=True)

  helped = run("--help")
  assert (helped.returncode, helped.stderr) == (0, "")
  assert "OpenAI" in helped.stdout
  missing = run(f"--checkpoint={tmp_path}")
  assert missing.returncode == 1
  assert 'pip install ".[serve]"' in missing.stderr
  assert "Traceback" not in missing.stderr


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--slots=0", "--slots must be at least 1, got 0"),
    ("--mesh=data", "--mesh must name axes and their sizes, such as data=2,tensor=4, got 'data'"),
    ("--mesh=data=2,data=4", "--mesh must name each axis once, got 'data=2,data=4'"),
    ("--max-queue=-1", "--max-queue must be positive, got -1"),
    ("--max-body-mb=nan", "--max-body-mb must be positive, got nan"),
    ("--allow-folder=none", "--allow-folder none: there is no such folder"),
  ],
)
def test_wrong_flags_are_told(flag, message, tmp_path, capsys):
  assert main(["serve", f"--checkpoint={tmp_path}", flag]) == 2
  assert message in capsys.readouterr().err


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
  file = tmp_path / "keys"
  file.write_text("one\n\n two \n")
  assert verb._keys(str(file)) == ["one", "two"]
  monkeypatch.setenv("SLOWFAST_API_KEY", "three")
  assert verb._keys(None) == ["three"]
  monkeypatch.delenv("SLOWFAST_API_KEY")
  assert verb._keys(None) == []
  file.write_text("\n")
  assert main(["serve", f"--checkpoint={tmp_path}", f"--api-key-file={file}"]) == 2
  assert main(["serve", f"--checkpoint={tmp_path}", "--api-key-file=none"]) == 1


def test_a_taken_port_and_a_missing_checkpoint_are_told(tmp_path, capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert main(["serve", f"--checkpoint={tmp_path}", f"--port={port}"]) == 1
  assert "choose another" in capsys.readouterr().err
  assert main(["serve", f"--checkpoint={tmp_path}", "--port=0"]) == 1
  assert "not an export" in capsys.readouterr().err
