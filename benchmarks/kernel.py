# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench kernel`: the slow cross-attention kernel beside JAX's own for TPU."""

import argparse

from benchmarks import kernel_blocks, kernel_static
from benchmarks.tpu_schedule import CHIPS
from slowfast_jax.errors import UsageError
from slowfast_jax.kernels.cross_attention.shapes import TEXT_LENGTHS

HELP = "slow cross-attention beside JAX's flash and splash attention, by the TPU compiler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  parser.add_argument(
    "--static", action="store_true", help="the compiler's estimates for chips that are not here"
  )
  parser.add_argument(
    "--blocks", action="store_true", help="try block sizes instead, for the kernel's table of them"
  )
  parser.add_argument("--chips", default="v5e,v5p,v6e", help=f"of {', '.join(CHIPS)}")
  parser.add_argument(
    "--queries", default=",".join(map(str, TEXT_LENGTHS)), help="numbers of text tokens"
  )
  parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
  parser.add_argument("--json", help="also write the table to this file")


def run(args: argparse.Namespace) -> int:
  """Prints the table."""
  if not (args.static or args.blocks):
    raise UsageError(
      "bench kernel measures nothing yet on the device at hand; add --static or --blocks."
    )
  chips = args.chips.split(",")
  unknown = sorted(set(chips) - set(CHIPS))
  if unknown:
    raise UsageError(f"--chips: {', '.join(unknown)} unknown; choose from {', '.join(CHIPS)}.")
  try:
    queries = [int(x) for x in args.queries.split(",")]
  except ValueError:
    raise UsageError(f"--queries: expected numbers as in 1,64,512, got {args.queries!r}.") from None
  if args.blocks:
    kernel_blocks.report(chips, args.timeout)
    return 0
  kernel_static.report(chips, queries, args.timeout, args.json)
  return 0
