# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench serve`: many clients beside one; hostile requests; both against a real server."""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from slowfast_jax.errors import UsageError

HELP = "clients at once beside one client, and hostile requests, against a real server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--clients", type=int, default=64, help="at once (%(default)s)")
  add("--requests", type=int, default=4, help="of each client (%(default)s)")
  add("--tokens", type=int, default=128, help="of an answer, at most (%(default)s)")
  add("--slots", type=int, default=32, help="of the server (%(default)s)")
  add("--width", type=int, default=512, help="of the random model's decoder (%(default)s)")
  add("--layers", type=int, default=8, help="of the random model's decoder (%(default)s)")
  add("--hostile", type=int, default=1000, help="requests to refuse (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the figures; 1 where an answer or a refusal was wrong."""
  for name in ("clients", "requests", "tokens", "slots", "layers"):
    if getattr(args, name) < 1:
      raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}.")
  if args.width < 256 or args.width % 256:
    raise UsageError(f"--width must be a multiple of 256, got {args.width}.")
  # Only here: other benchmarks run without the packages of `dev` that these need.
  from benchmarks.serve_load import measure_hostile, measure_load, questions, random_export
  from benchmarks.serve_process import serving
  from slowfast_jax.checkpoints.store import save_export

  with tempfile.TemporaryDirectory(prefix="slowfast-bench-") as name:
    folder = Path(name)
    save_export(folder / "export", random_export(args.width, args.layers))
    flags = (f"--max-queue={args.clients + 1}", "--context=256", "--max-body-mb=4", "--no-page")
    log = folder / "log"
    many = f"--slots={args.slots}"
    bodies = questions(args.clients * args.requests, args.tokens)
    with (
      serving(folder / "export", *flags, "--slots=1", log=log) as lone,
      serving(folder / "export", *flags, many, log=log.with_name("log2")) as server,
    ):
      load = measure_load(lone, server, bodies, args.clients)
      wrong, grown = measure_hostile(server, args.hostile)
  rows = {
    "one client, one slot": load.lone,
    f"one client, {args.slots} slots": load.single,
    f"{args.clients} clients, {args.slots} slots": load.together,
  }
  for name, rate in rows.items():
    print(f"{name:<24}{rate:8.1f} requests/s; all at once {load.together / rate:.2f} times that")
  print(f"{'answers that differ':<24}{load.wrong:8d} of {load.requests}")
  print(f"{'refused wrongly':<24}{len(wrong):8d} of {args.hostile}")
  print(f"{'memory after that':<24}{grown:+8.1f} MB")
  for line in wrong[:20]:
    print(f"  {line}")
  if args.json:
    values = dataclasses.asdict(load) | {"refused_wrongly": len(wrong), "megabytes": grown}
    Path(args.json).write_text(json.dumps(values, indent=2))
  return 1 if load.wrong or wrong else 0
