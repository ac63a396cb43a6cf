# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench evaluate`: several questions of a video at once beside one at a time.

Once as `slowfast eval` does, a video read and encoded once and its questions in batches; once as
tools do that know no sessions, every question with its video from the file. Both in one process,
in turns; the best of the rounds counts, because other work on the machine disturbs a round, not a
side.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.data import write_video
from slowfast_jax.checkpoints.export import Export, VideoConfig
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UsageError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.video import read_video
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFast, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig

HELP = "questions a minute: videos encoded once and batches, beside one question at a time"

_MODEL = SlowFastConfig(
  vision=ViTConfig("siglip", 128, 16, width=192, num_layers=6, num_heads=3, mlp_width=768),
  decoder=DecoderConfig(
    vocab_size=512,
    width=256,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=1024,
  ),
  compressor=CompressorConfig(video_pooling_stride=2),
  hybrid=HybridConfig(every=2, min_depth=0, max_depth=6),
)
_GOAL = 4.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--questions", type=int, default=8, help="of a video (%(default)s)")
  add("--videos", type=int, default=2, help="asked about (%(default)s)")
  add("--frames", type=int, default=32, help="of a video (%(default)s)")
  add("--seconds", type=int, default=10, help="that a video lasts (%(default)s)")
  add("--new-tokens", type=int, default=16, help="of a reply (%(default)s)")
  add("--rounds", type=int, default=3, help="of which the best counts (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the table."""
  for name in ("questions", "videos", "frames", "seconds", "new_tokens", "rounds"):
    if getattr(args, name) < 1:
      raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
  with tempfile.TemporaryDirectory(prefix="slowfast-bench-") as folder:
    video = write_video(pathlib.Path(folder) / "clips/a.mp4", args.seconds)
    together, apart = _measure(video, args)
  count = args.videos * args.questions
  found = {
    "questions_per_video": args.questions,
    "cores": len(os.sched_getaffinity(0)),
    "shared_questions_per_minute": 60 * count / together,
    "single_questions_per_minute": 60 * count / apart,
    "ratio": apart / together,
  }
  print(f"{args.videos} videos of {args.frames} frames, {args.questions} questions each, ", end="")
  print(f"{args.new_tokens} new tokens, {found['cores']} cores")
  print(f"encoded once, in batches   {found['shared_questions_per_minute']:8.1f} questions/minute")
  print(f"one at a time              {found['single_questions_per_minute']:8.1f} questions/minute")
  print(f"ratio                      {found['ratio']:8.2f}   (goal at 8 questions: {_GOAL:g})")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=2))
  return 0


def _measure(video: pathlib.Path, args: argparse.Namespace) -> tuple[float, float]:
  """Seconds for all questions, both ways."""
  export = _export(args.frames)
  questions = [f"What is in part {i} of the video?" for i in range(args.questions)]
  shared, single = Engine(export, batch_size=args.questions), Engine(export)

  def together() -> None:
    for _ in range(args.videos):
      session = shared.encode(read_video(video, export).images)
      shared.answer(questions, [session] * len(questions), args.new_tokens)

  def apart() -> None:
    for _ in range(args.videos):
      for question in questions:
        session = single.encode(read_video(video, export).images)
        single.answer([question], [session], args.new_tokens)

  return _best([together, apart], args.rounds)


def _best(sides: Sequence[Callable[[], None]], rounds: int) -> tuple[float, float]:
  for side in sides:
    side()  # Compiles.
  times: list[list[float]] = [[], []]
  for _ in range(rounds):
    for side, seconds in zip(sides, times):
      began = time.perf_counter()
      side()
      seconds.append(time.perf_counter() - began)
  return min(times[0]), min(times[1])


def _export(frames: int) -> Export:
  """Random parameters; the gate is open, or the slow path would be a multiplication by zero."""

  def init() -> nnx.State:
    model = SlowFast(_MODEL, rngs=nnx.Rngs(0))
    assert model.adapters is not None
    assert model.adapters.warm_up is not None
    model.adapters.warm_up[...] = jnp.ones_like(model.adapters.warm_up[...])
    return nnx.state(model)

  tokenizer = train_tokenizer(["What is in part 0 of the video?"], _MODEL.decoder.vocab_size)
  return Export(_MODEL, jax.jit(init)(), tokenizer, VideoConfig(frames), "Be brief.")
