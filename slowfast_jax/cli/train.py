# SPDX-License-Identifier: Apache-2.0
"""`slowfast train`: trains what a config file describes."""

import argparse
import os
import signal
from collections.abc import Callable
from typing import Any

HELP = "train a model; the same command again resumes"
ACCEPTS_OVERRIDES = True

EXAMPLES = """examples:
  slowfast train --config=configs/demo.py --workdir=runs/mine
  slowfast train --config=configs/demo.py --workdir=runs/mine --export latest
  slowfast train --config=configs/demo.py:fast_only --workdir=runs/fast \\
      --config.data.records=records/train --config.optimizer.learning_rate=3e-4

The same command again resumes from the newest checkpoint in WORKDIR/checkpoints. After SIGTERM the
run saves and exits with 42. WORKDIR/metrics.jsonl has the metrics, WORKDIR/telemetry.jsonl what the
clock says, WORKDIR/export the trained model, for `slowfast eval` and `slowfast chat`.

WORKDIR/report.html has the curves. --config.eval.every=N evaluates every N steps on
--config.eval.questions and --config.eval.videos. SIGUSR1 has the next three steps profiled.

On several hosts start the same command on each. On Cloud TPU they find each other; elsewhere set
JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

_PREEMPTED = 42


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="a Python file with get_config(); ARG goes to it. Fields: --config.SECTION.FIELD=VALUE",
  )
  parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
  parser.add_argument(
    "--export",
    metavar="latest|best|STEP",
    help="write that checkpoint of the run to WORKDIR/export, and do not train",
  )


def run(args: argparse.Namespace) -> int:
  # Until `Preemption` takes over; importing takes seconds, so that comes after it.
  before = signal.signal(signal.SIGTERM, lambda *_: os._exit(_PREEMPTED))
  try:
    return _train(args)
  finally:
    signal.signal(signal.SIGTERM, before)


def _train(args: argparse.Namespace) -> int:
  from slowfast_jax import distributed
  from slowfast_jax.cli.progress import Progress
  from slowfast_jax.config import load_config
  from slowfast_jax.train import loop
  from slowfast_jax.train.preemption import Preemption

  config = load_config(args.config, args.overrides)
  # From before the processes meet: they wait for each other, and for one that leaves in vain.
  with Preemption(print) as preemption:
    with preemption.nothing_to_lose():
      distributed.initialize()
      if args.export:
        loop.export(config, args.workdir, args.export, print)
        return loop.DONE
    with Progress("Training", "steps", enabled=distributed.is_first()) as progress:

      def show(done: int, total: int, text: str) -> None:
        progress(done, total, text=text)

      evaluation = _evaluation(config)
      code = loop.train(config, args.workdir, show, progress.say, evaluation, preemption)
    if code == loop.PREEMPTED:
      print("stopped by SIGTERM and saved; the same command goes on")
      return code
    with preemption.nothing_to_lose():
      distributed.part()
  return code


def _evaluation(config: Any) -> Callable[[Any, Any], dict[str, float]] | None:
  """What the loop calls every `eval.every` steps; its questions are read now, to find faults."""
  if not config.get("eval", {}).get("every", 0):
    return None
  from slowfast_jax.config import load_config
  from slowfast_jax.eval.runner import evaluate, read_questions

  given = {name: config.eval[name] for name in ("questions", "videos") if config.eval[name]}
  asked = load_config(
    config.eval.config, [f"--config.{name}={value}" for name, value in given.items()]
  )
  read_questions(asked)

  def run_evaluation(export: Any, workdir: Any) -> dict[str, float]:
    (results,) = evaluate(asked, export, workdir).values()
    return {name: value for name, value in results.items() if isinstance(value, int | float)}

  return run_evaluation
