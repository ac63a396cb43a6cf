# SPDX-License-Identifier: Apache-2.0
"""`slowfast demo`: from raw video to an answer and a report, on any machine."""

import argparse
from pathlib import Path

from slowfast_jax.errors import UsageError

HELP = "make a small video question set, train on it, evaluate, answer a question"

EXAMPLES = """examples:
  slowfast demo                             # minutes on two cores; runs/demo/report.html
  slowfast demo --fast --workdir=runs/fast  # the same path with hardly any training
  slowfast demo --seed=1 --workdir=runs/seed1

It writes real mp4 files with questions about them, prepares them as records, trains a slow-fast
model and its fast-only baseline alike, asks both about videos that they have not seen, and shows
where in the video the answers came from. The same command goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", default="runs/demo", metavar="DIR", help="default: runs/demo")
  parser.add_argument("--fast", action="store_true", help="hardly any training: only the path")
  parser.add_argument("--seed", type=int, default=0, help="of videos, questions and models")


def run(args: argparse.Namespace) -> int:
  from slowfast_jax.cli.progress import Progress
  from slowfast_jax.demo.questions import NUM_SEEDS
  from slowfast_jax.demo.run import FAST, FULL, STAGES, Demo

  if not 0 <= args.seed < NUM_SEEDS:
    raise UsageError(f"--seed must be from 0 to {NUM_SEEDS - 1}, got {args.seed}.")
  demo = Demo(Path(args.workdir), FAST if args.fast else FULL, args.seed, Progress)
  demo.make_data()
  demo.prepare()
  demo.align()
  for stage in STAGES:
    demo.train(stage)
  data = demo.report()
  print(
    f"\nslow-fast {data.slow_fast.accuracy:.1%}, fast-only {data.fast_only.accuracy:.1%}, "
    f"chance {data.chance:.1%} on {data.num_questions} questions about unseen videos\n"
    f"the moment that counted most shows the event in {data.attention_hits:.1%} of the answers "
    "that are right\n"
    f"asked: {data.chat.question!r}\nanswered: {data.chat.answer!r}\n  {data.chat.command}\n"
    f"report: {demo.root / 'report.html'}"
  )
  return 0
