# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench kernel`: the slow cross-attention kernel beside JAX's own for TPU."""

import argparse
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

from benchmarks import kernel_blocks, kernel_grid, kernel_programs, kernel_static
from benchmarks.tpu_schedule import CHIPS
from slowfast_jax.cli.progress import Progress
from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.files import replace_json
from slowfast_jax.kernels.cross_attention.shapes import TEXT_LENGTHS

TABLES = ("programs", "steady", "grid")
HELP = "slow cross-attention beside JAX's flash and splash attention, by the TPU compiler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  parser.add_argument(
    "--static", action="store_true", help="the compiler's estimates for chips that are not here"
  )
  parser.add_argument(
    "--blocks", action="store_true", help="try block sizes instead, for the kernel's table of them"
  )
  parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
  parser.add_argument(
    "--queries", default=",".join(map(str, TEXT_LENGTHS)), help="numbers of text tokens"
  )
  parser.add_argument(
    "--tables", default=",".join(TABLES), help=f"of {', '.join(TABLES)} (default all)"
  )
  parser.add_argument("--timeout", type=float, default=300, help="seconds for one program")
  parser.add_argument("--json", help="also write the tables to this file")


def run(args: argparse.Namespace) -> int:
  """Prints the tables."""
  if not (args.static or args.blocks):
    raise UsageError(
      "bench kernel measures nothing yet on the device at hand; add --static or --blocks."
    )
  chips, tables = _words("--chips", args.chips, CHIPS), _words("--tables", args.tables, TABLES)
  try:
    queries = [int(x) for x in args.queries.split(",")]
  except ValueError:
    raise UsageError(f"--queries: expected numbers as in 1,64,512, got {args.queries!r}.") from None
  if args.blocks:
    kernel_blocks.report(chips, args.timeout)
    return 0
  try:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  except importlib.metadata.PackageNotFoundError:
    raise UserError("libtpu, the TPU compiler, is missing: pip install libtpu (Linux).") from None
  print(" ".join(f"{name} {version}" for name, version in versions.items()))
  result: dict[str, Any] = dict(versions)
  if "programs" in tables:
    result |= kernel_programs.report()
  for name, module in (("steady", kernel_static), ("grid", kernel_grid)):
    if name in tables:
      result[name] = _table(module, module.cases(chips, queries), args.timeout)
  if args.json:
    replace_json(Path(args.json), result)
  return 0


def _words(flag: str, text: str, known: Any) -> list[str]:
  words = text.split(",")
  unknown = sorted(set(words) - set(known))
  if unknown:
    raise UsageError(f"{flag}: {', '.join(unknown)} unknown; choose from {', '.join(known)}.")
  return words


def _table(module: Any, cases: list[Any], timeout: float) -> list[dict[str, Any]]:
  """Prints a table as it grows: a row of `module.compute_row` for each case."""
  print(module.LEGEND)
  print(module.TITLE, flush=True)
  found = []
  with Progress("Compiling", "rows") as progress:
    progress(0, len(cases))
    for case in cases:
      row = module.compute_row(*case, timeout)
      progress.say(module.line(row))
      found.append(dataclasses.asdict(row))
      progress(len(found), len(cases))
  return found
