# SPDX-License-Identifier: Apache-2.0
"""`slowfast eval`: a checkpoint on a task, in a folder that resumes; two runs compared."""

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import jax

from slowfast_jax import distributed
from slowfast_jax.cli.main import PREEMPTED
from slowfast_jax.cli.progress import Progress
from slowfast_jax.config import load_config
from slowfast_jax.errors import UsageError
from slowfast_jax.eval.compare import compare_runs, describe
from slowfast_jax.eval.compare_page import write_comparison
from slowfast_jax.eval.judge import judge
from slowfast_jax.eval.runner import evaluate
from slowfast_jax.eval.table import summarize

HELP = "evaluate a checkpoint"

EXAMPLES = """examples:
  slowfast eval --config=configs/eval_jsonl.py --config.questions=test.jsonl \\
      --config.videos=videos/ --checkpoint=runs/mine/export --workdir=runs/mine/eval
  slowfast eval --config=configs/eval_paper.py:mlvu --config.questions=/data/mlvu \\
      --checkpoint=CHECKPOINT --workdir=runs/mlvu
  slowfast eval --compare runs/mlvu runs/mlvu_other --html flipped.html

Questions of one's own are one JSON object a line:

  {"video": "a.mp4", "question": "What falls?", "options": ["a cup", "a book"], "answer": "A"}

Public benchmarks are read from a local copy of their release, videos unpacked; nothing is
downloaded. configs/eval_paper.py:TASK asks as the paper did, configs/eval_upstream.py:TASK as
lmms-eval 0.7.3 does. Tasks: videomme, videomme_w_subtitle, mlvu, mvbench, egoschema,
egoschema_subset, longvideobench, perceptiontest, nextqa_mc, activitynetqa,
tempcompass_{multi_choice,yes_no,caption_matching,captioning}.

WORKDIR gets predictions.jsonl, a line for every question, results.json, and report.html with what
went wrong. The same command again resumes where a killed run stopped; SIGTERM stops it, with exit
code 42. Questions whose video cannot be read count as wrong, and as errors;
--config.retry_errors=true asks them again.

On several hosts start the same command on each, with one WORKDIR that all of them share: they
divide the videos. On Cloud TPU they find each other; elsewhere set
JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

ActivityNetQA and TempCompass have replies that a language model must judge. That is a second
command, on finished predictions, with any OpenAI-compatible endpoint (key: OPENAI_API_KEY):

  slowfast eval --config=configs/eval_paper.py:activitynetqa --config.questions=/data/anetqa \\
      --workdir=runs/anetqa --judge=http://localhost:8000/v1 --judge_model=NAME
"""

ACCEPTS_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--config", metavar="FILE", help="the evaluation, e.g. configs/eval_jsonl.py")
  add("--checkpoint", metavar="DIR", help="the export of a training run, or a released checkpoint")
  add("--workdir", metavar="DIR", help="folder to write or to resume")
  add("--judge", metavar="URL", help="have the replies in WORKDIR judged through this endpoint")
  add("--judge_model", metavar="NAME", help="the judge's name there")
  add("--compare", nargs=2, metavar="DIR", help="compare the runs in two such folders")
  add("--html", metavar="FILE", help="write the comparison as a page, with what flipped")


def run(args: argparse.Namespace) -> int:
  if args.compare:
    first, second = map(Path, args.compare)
    return _compare(first, second, args.html)
  _check_given(args, "config", "workdir", *(["judge_model"] if args.judge else ["checkpoint"]))
  config = load_config(args.config, args.overrides)
  title = ("Judging", "replies") if args.judge else ("Evaluating", "questions")
  if not args.judge:  # That needs no devices.
    distributed.initialize()
  leads = bool(args.judge) or jax.process_index() == 0
  with _stopped_by_sigterm(), Progress(*title, enabled=leads) as progress:
    if args.judge:
      results = judge(config, args.workdir, args.judge, args.judge_model, progress)
    else:
      results = evaluate(config, args.checkpoint, args.workdir, progress)
  if not leads:
    return 0
  for task, row in results.items():
    print(summarize(task, row))
  print(f"{args.workdir}/results.json\n{args.workdir}/report.html")
  return 0


def _compare(first: Path, second: Path, html: str | None) -> int:
  count, differences = compare_runs(first, second)
  print(describe(first, second, count, differences))
  if html:
    write_comparison(first, second, differences, Path(html))
    print(html)
  return 0


def _check_given(args: argparse.Namespace, *names: str) -> None:
  if missing := [f"--{name}" for name in names if not getattr(args, name)]:
    raise UsageError(f"the following arguments are required: {', '.join(missing)}")


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
