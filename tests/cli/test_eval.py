# SPDX-License-Identifier: Apache-2.0
"""`slowfast eval`: what it writes and says, and exit codes."""

import json
import os
import signal

import pytest

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.cli import eval as verb
from slowfast_jax.cli.main import VERBS, main
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

DOC = {"video": "a.mp4", "question": "What?", "options": ["a cup", "a book"], "answer": "B"}


@pytest.fixture
def arguments(tmp_path):
  write_video(tmp_path / "a.mp4", VideoSpec(num_frames=8))
  (tmp_path / "test.jsonl").write_text(json.dumps({**DOC, "kind": "object"}) + "\n")
  save_export(tmp_path / "export", make_export())
  paths = {"checkpoint": "export", "workdir": "run"}
  fields = {"questions": "test.jsonl", "videos": "."}
  return [
    "eval",
    "--config=configs/eval_jsonl.py",
    *(f"--{name}={tmp_path / path}" for name, path in paths.items()),
    *(f"--config.{name}={tmp_path / path}" for name, path in fields.items()),
    "--config.batch_size=1",
    "--config.max_new_tokens=4",
  ]


def test_it_evaluates_and_says_what_came_out(arguments, tmp_path, capsys):
  assert main(arguments) == 0
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  shown = capsys.readouterr().out
  assert "Evaluating: 1/1 questions" in shown
  assert "jsonl (prompts: letter)\n" in shown
  table = [line.split() for line in shown.splitlines()]
  assert ["accuracy", f"{results['jsonl']['accuracy']:.3f}"] in table
  assert any(line[:2] == ["accuracy_by_kind", "object"] for line in table)
  assert ["n", "1"] in table
  assert f"{tmp_path}/run/results.json\n" in shown
  assert main([*arguments, "--config.zero_slow=true"]) == 1
  assert "zero_slow was False and is True" in capsys.readouterr().err


def test_errors_have_no_traceback(arguments, tmp_path, capsys):
  assert main([*arguments, "--config.questions=none.jsonl"]) == 1
  assert "slowfast eval: none.jsonl: there is no such file" in capsys.readouterr().err
  assert main([*arguments, "--config.task=mmlu"]) == 1
  assert "There is no task 'mmlu'" in capsys.readouterr().err
  assert main([*arguments, "--config.batchsize=2"]) == 2
  assert main(["eval"]) == 2
  assert not (tmp_path / "run").exists()


def test_two_runs_are_compared(arguments, tmp_path, capsys):
  assert main(arguments) == 0
  assert main(["eval", f"--compare={tmp_path / 'run'}"]) == 2
  assert main(["eval", "--compare", str(tmp_path / "run"), str(tmp_path / "run")]) == 0
  shown = capsys.readouterr().out
  assert "B - A   +0.00   [0.00, 0.00]" in shown
  assert "McNemar's exact p = 1\n" in shown
  assert main(["eval", "--compare", str(tmp_path / "run"), str(tmp_path)]) == 1
  assert "there is no predictions.jsonl in it" in capsys.readouterr().err


def test_what_is_missing_is_named(arguments, capsys):
  assert main(["eval", "--config=configs/eval_jsonl.py"]) == 2
  assert "required: --workdir, --checkpoint" in capsys.readouterr().err
  assert main([*arguments, "--judge=http://localhost:1/v1"]) == 2
  assert "required: --judge_model" in capsys.readouterr().err
  assert main([*arguments, "--judge=http://localhost:1/v1", "--judge_model=x"]) == 1
  assert "Task jsonl needs no judge" in capsys.readouterr().err


def test_sigterm_stops_it(arguments, monkeypatch, capsys):
  monkeypatch.setattr(verb, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
  before = signal.getsignal(signal.SIGTERM)
  assert main(arguments) == 42
  assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == before


def test_its_help_is_that_of_the_list():
  assert VERBS["eval"] == verb.HELP
