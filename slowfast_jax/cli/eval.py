# SPDX-License-Identifier: Apache-2.0
"""`slowfast eval`: a checkpoint on a task, in a folder that resumes."""

import argparse
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from slowfast_jax.cli.main import PREEMPTED
from slowfast_jax.cli.progress import Progress
from slowfast_jax.config import load_config
from slowfast_jax.eval.runner import evaluate

HELP = "evaluate a checkpoint"

EXAMPLES = """examples:
  slowfast eval --config=configs/eval_jsonl.py --config.questions=test.jsonl \\
      --config.videos=videos/ --checkpoint=runs/mine/export --workdir=runs/mine/eval

Questions are one JSON object a line:

  {"video": "a.mp4", "question": "What falls?", "options": ["a cup", "a book"], "answer": "A"}

WORKDIR gets predictions.jsonl, a line for every question, and results.json. The same command again
resumes where a killed run stopped; SIGTERM stops it, with exit code 42. Questions whose video
cannot be read count as wrong, and as errors; --config.retry_errors=true asks them again.
"""

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--config", required=True, metavar="FILE", help="the evaluation, e.g. configs/eval_jsonl.py")
  add("--checkpoint", required=True, metavar="DIR", help="the export of a training run")
  add("--workdir", required=True, metavar="DIR", help="folder to write or to resume")


def run(args: argparse.Namespace) -> int:
  config = load_config(args.config, args.overrides)
  with _stopped_by_sigterm(), Progress("Evaluating", "questions") as progress:
    results = evaluate(config, args.checkpoint, args.workdir, progress)
  for task, metrics in results.items():
    print(_summary(task, metrics))
  print(f"{args.workdir}/results.json")
  return 0


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
  """Leaves at once: every answer so far is on the disk."""

  def leave(number: int, frame: FrameType | None) -> None:
    print("stopped by SIGTERM; the same command goes on")
    raise SystemExit(PREEMPTED)

  before = signal.signal(signal.SIGTERM, leave)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _summary(task: str, metrics: dict[str, Any]) -> str:
  lines = [f"{task} (prompts: {metrics['prompt_set']})"]
  for name, value in metrics.items():
    if isinstance(value, dict):
      lines += [f"  {name} {key}: {_number(part)}" for key, part in value.items()]
    elif name != "prompt_set":
      lines.append(f"  {name}: {_number(value)}")
  return "\n".join(lines)


def _number(value: Any) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)
