# SPDX-License-Identifier: Apache-2.0
"""`slowfast convert`: checkpoints between the released layout and exports, both ways."""

import argparse

from slowfast_jax.cli.progress import Progress
from slowfast_jax.errors import UsageError

HELP = "convert a checkpoint between Hugging Face and Orbax, or make one of its parts"

EXAMPLES = """examples:
  slowfast convert SlowFast-Video-MLLM/ runs/released --to orbax
  slowfast convert runs/mine/export SlowFast-Mine/ --to huggingface --dtype bfloat16
  slowfast convert --llm Qwen2-7B-Instruct/ --vision siglip-so400m-patch14-384/ \\
      --to orbax runs/fresh

Everything is streamed: memory stays small however large the model is. The result appears under its
name only when it is complete; stopped, the same command starts over. A folder that is there already
is never touched.

From --llm (Qwen2, Qwen2.5, Qwen3, Llama) and --vision (SigLIP, CLIP, ConvNeXt) comes a slow-fast
model whose projector and gates are still to be trained.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("folders", metavar="SRC DST", nargs="*", help="from, to; with --llm and --vision only DST")
  add("--to", required=True, choices=("orbax", "huggingface"), help="the format of DST")
  add("--dtype", choices=("float32", "bfloat16", "float16"), help="of DST (as in SRC)")
  parts = parser.add_argument_group("a new model of two trained parts")
  add = parts.add_argument
  add("--llm", metavar="DIR", help="the language model's folder")
  add("--vision", metavar="DIR", help="the vision encoder's folder, or its .safetensors file")
  add("--frames", type=int, help="of a video: 64, 96 or 128; strides follow (64)")
  add("--every", type=int, metavar="N", help="every N-th layer reads slow tokens (8)")
  add("--gate", help="dynamic, dynamic-tanh or dynamic-tanh-warmup (the last)")
  add("--queries", help="text-only, text-only-masksystem or all (text-only)")
  add("--projector", metavar="KIND", help="linear or mlp<n>x_gelu (mlp2x_gelu)")
  add("--select-layer", type=int, metavar="N", help="of a vision transformer (-2)")
  add("--seed", type=int, help="of what is new (0)")


def run(args: argparse.Namespace) -> int:
  options = {
    "num_frames": args.frames,
    "every": args.every,
    "gate": args.gate,
    "queries": args.queries,
    "projector": args.projector,
    "select_layer": args.select_layer,
    "seed": args.seed,
  }
  given = {name: value for name, value in options.items() if value is not None}
  fresh = args.llm is not None or args.vision is not None
  if fresh and (args.llm is None or args.vision is None):
    raise UsageError("--llm and --vision go together.")
  if given and not fresh:
    raise UsageError("--frames, --every and so on are for a new model, of --llm and --vision.")
  if len(args.folders) != (1 if fresh else 2):
    expected = "DST alone" if fresh else "SRC and DST"
    raise UsageError(f"expected {expected}, got {len(args.folders)} folders.")
  # Late: `slowfast convert --help` need not wait for JAX.
  from slowfast_jax.checkpoints.convert import convert
  from slowfast_jax.checkpoints.hf_parts import open_parts
  from slowfast_jax.checkpoints.open import is_huggingface, open_checkpoint

  if fresh:
    source = open_parts(args.llm, args.vision, **given)
  else:
    source = open_checkpoint(args.folders[0])
    if is_huggingface(args.folders[0]) == (args.to == "huggingface"):
      raise UsageError(f"{args.folders[0]} is of the format {args.to} already.")
  with Progress("Converting", "MB") as progress:
    convert(
      source,
      args.folders[-1],
      args.to,
      args.dtype,
      lambda done, total: progress(done // 10**6, total // 10**6),
    )
  print(f"{args.folders[-1]}: {source.num_bytes / 1e6:,.0f} MB of parameters")
  return 0
