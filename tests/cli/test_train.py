# SPDX-License-Identifier: Apache-2.0
"""The train verb: flags in, one call out; the runs themselves are tested in tests/train."""

import pytest

from slowfast_jax.cli import main as cli
from slowfast_jax.cli.progress import Progress
from slowfast_jax.train import loop


@pytest.fixture
def calls(monkeypatch):
  """Stands in for training: records what it is asked for, tells one step, returns a code."""
  seen = []

  def train(config, workdir, progress, say, evaluate, preemption):
    say("8 parameters")
    progress(0, 2, "")
    progress(2, 2, "loss 0.5000")
    seen.append((config, workdir))
    return 42 if "stopped" in workdir else 0

  monkeypatch.setattr(loop, "train", train)
  return seen


def test_flags_reach_the_run(calls, capsys):
  words = ["--config=configs/demo.py:fast_only", "--workdir=runs/x", "--config.seed=7"]
  assert cli.main(["train", *words]) == 0
  ((config, workdir),) = calls
  assert (config.seed, config.model.slow, workdir) == (7, False, "runs/x")
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first == "8 parameters"
  assert last.startswith("Training: 2/2 steps")
  assert last.endswith("loss 0.5000")


def test_a_stopped_run_exits_with_42_and_says_so(calls, capsys):
  assert cli.main(["train", "--config=configs/demo.py", "--workdir=stopped"]) == 42
  assert "the same command goes on" in capsys.readouterr().out


def test_only_the_first_process_shows_anything(capsys):
  with Progress("Training", "steps", enabled=False) as progress:
    progress.say("hello")
    progress(1, 1, text="loss")
  assert capsys.readouterr().out == ""
