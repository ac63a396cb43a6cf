# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench NAME`: runs a benchmark of the checkout's folder `benchmarks`.

A benchmark is a module `benchmarks/NAME.py` with `HELP`, `add_arguments(parser)` and
`run(args) -> int`, as a verb is.
"""

import argparse
import importlib
import sys
from pathlib import Path

import slowfast_jax
from slowfast_jax.errors import UserError

HELP = "run a benchmark of the checkout"
EXAMPLES = """examples:
  slowfast bench data                                        records beside mp4: two minutes
  slowfast bench evaluate                                    videos encoded once: a minute
  slowfast bench flops                                       from compiled programs: half a minute
  slowfast bench generate                                    beside PyTorch: three minutes
  slowfast bench kernel --static                             all chips and shapes: takes hours
  slowfast bench kernel --static --chips=v5e --queries=512   a few minutes
  slowfast bench serve                                       64 clients, hostile requests
  slowfast bench train_cpu                                   beside PyTorch: a minute
"""
NAMES = ("data", "evaluate", "flops", "generate", "kernel", "serve", "train_cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares one command for each benchmark."""
  root = Path(slowfast_jax.__file__).parent.parent
  if not (root / "benchmarks" / f"{NAMES[0]}.py").is_file():
    raise UserError(
      f"{root / 'benchmarks'}: expected the folder of benchmarks, found none. Benchmarks belong to "
      "the checkout of the repository: install it from there with `pip install -e .`."
    )
  if str(root) not in sys.path:
    sys.path.insert(0, str(root))
  names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
  for name in NAMES:
    module = importlib.import_module(f"benchmarks.{name}")
    one = names.add_parser(name, help=module.HELP, description=module.HELP)
    module.add_arguments(one)
    one.set_defaults(benchmark=module)


def run(args: argparse.Namespace) -> int:
  """Runs the benchmark that was named."""
  return args.benchmark.run(args)
