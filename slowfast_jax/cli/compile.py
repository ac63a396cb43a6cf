# SPDX-License-Identifier: Apache-2.0
"""`slowfast compile`: what a config costs on TPUs that are not here."""

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "compile a config for TPUs that are not here: does it fit, what does it cost"
ACCEPTS_OVERRIDES = True

EXAMPLES = """examples:
  slowfast compile --config=configs/sft_qwen2_7b_convnext_64f.py --topology=v5p:4x4x4
  slowfast compile --config=configs/sft_qwen2_7b_siglip_64f.py --topology=v5e:16x16 \\
      --config.mesh.data=8 --config.mesh.fsdp=32 --samples=1200000 --json step.json
  slowfast compile --config=configs/sft_qwen2_1_5b_siglip_64f.py --topology=v5e:2x4 --what=prefill

Nothing of the config is opened but the file itself, and no TPU is needed: the compiler of a pod
runs on any machine with libtpu (pip install 'slowfast-jax[tpu]'). It takes minutes.
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
  add("--json", metavar="FILE", help="write all figures to this file")


def run(args: argparse.Namespace) -> int:
  from slowfast_jax.cli.progress import Progress
  from slowfast_jax.compile.report import describe, summarize
  from slowfast_jax.compile.run import Job, compile_job
  from slowfast_jax.compile.topology import parse_topology
  from slowfast_jax.config import load_config

  topology = parse_topology(args.topology, args.slices)
  load_config(args.config, args.overrides)  # What is wrong with it is told at once.
  generation = {"rows": args.rows, "text": args.text, "new_tokens": args.new_tokens}
  job = Job(args.config, tuple(args.overrides), topology, args.what, generation)
  with Progress("Compiling", "programs") as progress:

    def say(now: str, seconds: float) -> None:
      progress(0, 1, text=f"{now}, {seconds:.0f} s")

    result = compile_job(job, say)
  summary = summarize(result, topology, args.what, args.samples)
  print(describe(summary))
  if not summary["fits"]:
    advice = summary["programs"][-1]["advice"]
    print("What would help:", *(f"  {line}" for line in advice), sep="\n")
  if args.json:
    _write(Path(args.json), summary)
  return 0 if summary["fits"] else 1


def _write(file: Path, summary: dict[str, Any]) -> None:
  file.write_text(json.dumps(summary, indent=1) + "\n")
  print(file)
