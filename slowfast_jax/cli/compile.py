# SPDX-License-Identifier: Apache-2.0
"""`slowfast compile`: what a config costs on TPUs that are not here."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slowfast_jax.errors import UserError

if TYPE_CHECKING:
  from slowfast_jax.compile.run import Job

HELP = "compile a config for TPUs that are not here: does it fit, what does it cost"
ACCEPTS_OVERRIDES = True

EXAMPLES = """examples:
  slowfast compile --config=configs/sft_qwen2_7b_convnext_64f.py --topology=v5p:4x4x4
  slowfast compile --config=configs/sft_qwen2_7b_siglip_64f.py --topology=v5e:16x16 \\
      --config.mesh.data=8 --config.mesh.fsdp=32 --samples=1200000 --json step.json
  slowfast compile --config=configs/sft_qwen2_1_5b_siglip_64f.py --topology=v5e:2x4 \\
      --what=prefill --frames=1536 --config.mesh.tensor=2 --config.mesh.context=4
  slowfast compile --config=configs/sft_qwen2_1_5b_siglip_64f.py --topology=v5e:4x4 \\
      --what-if train.remat=full,minimal,dots data.batch_size=16,32 mesh.fsdp=4,16

Nothing of the config is opened but the file itself, and no TPU is needed: the compiler of a pod
runs on any machine with libtpu (pip install ".[tpu]" in the checkout). It takes minutes. Points
of --what-if that were compiled before come from the cache.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:ARG]", help="a training config")
  add("--topology", required=True, metavar="NAME", help="such as v5e:16x16 or v5p:4x4x4")
  add("--slices", type=int, default=1, metavar="N", help="so many of them (default 1)")
  add("--what", default="train", choices=("train", "prefill", "decode"), help="default: train")
  add("--samples", type=int, default=1_000_000, metavar="N", help="of an epoch (default 1000000)")
  add("--rows", type=int, default=1, metavar="N", help="prompts at a time, of answering")
  add("--text", type=int, default=128, metavar="N", help="text tokens of a prompt")
  add("--new_tokens", type=int, default=256, metavar="N", help="room for new tokens")
  add("--frames", type=int, default=0, metavar="N", help="of a longer video that is answered about")
  add(
    "--what-if",
    nargs="+",
    metavar="FIELD=V,V",
    help="compile every combination of these values; a table, the fastest first",
  )
  add("--cache", metavar="DIR", help="where results of --what-if lie (default ~/.cache)")
  add("--json", metavar="FILE", help="write all figures to this file")


def run(args: argparse.Namespace) -> int:
  from slowfast_jax.compile.run import Job
  from slowfast_jax.compile.topology import parse_topology
  from slowfast_jax.config import load_config

  topology = parse_topology(args.topology, args.slices)
  load_config(args.config, args.overrides)  # What is wrong with it is told at once.
  if args.json and not Path(args.json).absolute().parent.is_dir():
    raise UserError(f"--json {args.json}: there is no such folder; make it first.")
  fields = ("rows", "text", "new_tokens", "frames")
  generation = {field: getattr(args, field) for field in fields}
  job = Job(args.config, tuple(args.overrides), topology, args.what, generation)
  return _sweep(job, args) if args.what_if else _one(job, args)


def _one(job: "Job", args: argparse.Namespace) -> int:
  from slowfast_jax.cli.progress import Progress
  from slowfast_jax.compile.report import describe, summarize
  from slowfast_jax.compile.run import compile_job

  with Progress("Compiling", "programs") as progress:

    def say(now: str, seconds: float) -> None:
      progress(0, 1, text=f"{now}, {seconds:.0f} s")

    result = compile_job(job, say)
    progress(1, 1)
  summary = summarize(result, job.topology, args.what, args.samples)
  print(describe(summary))
  if not summary["fits"]:
    advice = summary["programs"][-1]["advice"]
    print("What would help:", *(f"  {line}" for line in advice), sep="\n")
  _write(args.json, summary)
  return 0 if summary["fits"] else 1


def _sweep(job: "Job", args: argparse.Namespace) -> int:
  from slowfast_jax.cli.progress import Progress
  from slowfast_jax.compile.report import TRUST
  from slowfast_jax.compile.what_if import cache_folder, sweep, table

  cache = Path(args.cache) if args.cache else cache_folder()
  with Progress("Compiling", "points") as progress:

    def show(done: int, total: int, text: str) -> None:
      progress(done, total, text=text)

    points = sweep(job, args.what_if, args.samples, cache, show)
  print(table(points), TRUST, sep="\n")
  _write(args.json, [dataclasses.asdict(point) for point in points])
  return 0 if any(point.fits for point in points) else 1


def _write(file: str | None, figures: Any) -> None:
  if file:
    Path(file).write_text(json.dumps(figures, indent=1) + "\n")
    print(file)
