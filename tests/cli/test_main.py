# SPDX-License-Identifier: Apache-2.0
"""The console command: verbs, help without JAX, exit codes, overrides handed through."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from slowfast_jax.cli import main as cli
from slowfast_jax.errors import UsageError, UserError


@pytest.fixture
def verb(monkeypatch):
  """Puts a stand-in for the module of `slowfast train`; its `run` can be replaced."""
  module = ModuleType("train")
  module.HELP = "train"
  module.ACCEPTS_OVERRIDES = True
  module.add_arguments = lambda parser: parser.add_argument("--config", required=True)
  module.run = lambda args: 0
  monkeypatch.setitem(sys.modules, "slowfast_jax.cli.train", module)
  return module


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_listed_verb_exists_and_its_help_agrees(name, capsys):
  module = importlib.import_module(f"slowfast_jax.cli.{name}")
  assert cli.VERBS[name] == module.HELP
  assert cli.main([name, "--help"]) == 0
  shown = capsys.readouterr().out
  assert f"slowfast {name}" in shown
  assert "examples:" in shown


def test_help_lists_the_verbs_and_does_not_wait_for_jax():
  code = (
    "import sys; from slowfast_jax.cli.main import main; code = main(['--help'])\n"
    "print(sorted({'jax', 'numpy', 'ml_collections'} & set(sys.modules)), code)"
  )
  shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert shown.stdout.splitlines()[-1] == "[] 0"
  for name, text in cli.VERBS.items():
    assert f"{name:<10}{text}" in shown.stdout


def test_version(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out.startswith("slowfast-jax ")


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    ([], "usage: slowfast"),
    (["--nope"], "--nope"),
    (["trian"], "Did you mean 'train'?"),
    (["train"], "--config"),
    (["train", "--conf=x"], "--conf"),
    (["train", "--config=x", "--steps=1"], "--steps=1"),
    (["train", "--config=x", "--config.steps", "1"], "--config.SECTION.FIELD=VALUE"),
    (["train", "--config=x", "more"], "more"),
  ],
)
def test_wrong_usage_is_2(verb, argv, words, capsys):
  assert cli.main(argv) == 2
  assert words in capsys.readouterr().err


def test_only_verbs_that_ask_for_them_get_overrides(verb, capsys):
  verb.ACCEPTS_OVERRIDES = False
  assert cli.main(["train", "--config=x", "--config.steps=1"]) == 2
  assert "--config.steps=1" in capsys.readouterr().err


def test_overrides_are_handed_through_in_order(verb):
  seen = []
  verb.run = lambda args: seen.append((args.config, args.overrides)) or 0
  words = ["--config.a.b=1", "--config.note=two words = more", "--config.a.b=2"]
  assert cli.main(["train", words[0], "--config=x.py", *words[1:]]) == 0
  assert seen == [("x.py", words)]


@pytest.mark.parametrize("code", [0, 1, 42])
def test_the_verbs_code_is_the_commands_code(verb, code):
  verb.run = lambda args: code
  assert cli.main(["train", "--config=x"]) == code


@pytest.mark.parametrize(
  ("error", "code", "shown"),
  [
    (UserError("x.json:3: no media"), 1, "slowfast train: x.json:3: no media\n"),
    (UsageError("no field"), 2, "slowfast train: no field\n"),
    (FileNotFoundError(2, "No such file", "a.mp4"), 1, "slowfast train: a.mp4: No such file\n"),
    (KeyboardInterrupt(), 130, "slowfast train: stopped by Ctrl-C\n"),
  ],
)
def test_errors_of_the_user_are_one_line_and_a_code(verb, error, code, shown, capsys):
  def fail(args):
    raise error

  verb.run = fail
  assert cli.main(["train", "--config=x"]) == code
  assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
  "error", [RuntimeError("bug"), OSError("no file named"), ValueError("bug")]
)
def test_bugs_keep_their_traceback(verb, error):
  def fail(args):
    raise error

  verb.run = fail
  with pytest.raises(type(error), match=str(error)):
    cli.main(["train", "--config=x"])


@pytest.mark.parametrize("words", [["doctor", "--json"], ["compile", "--help"]], ids=" ".join)
def test_a_reader_that_stops_early_is_no_error(words):
  process = subprocess.Popen(
    [sys.executable, "-m", "slowfast_jax.cli.main", *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  assert "Traceback" not in process.stderr.read()
  assert process.wait() == 0
