# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench train_cpu`: a training step beside PyTorch's, on this machine's cores.

Both train a Qwen2 decoder of the same sizes on as many tokens: forward, backward and AdamW, all in
float32. Hugging Face's model in PyTorch has the decoder alone; ours has its slow path and encoder
beside it. Steps alternate, so that what else runs on the machine disturbs both.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hugging_face import make_qwen2
from slowfast_jax.data.packing import Geometry, Sample, build_row, collate
from slowfast_jax.errors import UserError
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig
from slowfast_jax.shapes import Batch
from slowfast_jax.train.optimizer import OptimizerConfig
from slowfast_jax.train.step import init_state, make_train_step

HELP = "a training step beside Hugging Face's Qwen2 in PyTorch, on this machine"

MODEL = SlowFastConfig(
  vision=ViTConfig("siglip", 48, 12, width=64, num_layers=2, num_heads=4, mlp_width=128),
  decoder=DecoderConfig(
    vocab_size=8192,
    width=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=1024,
    tie_embeddings=True,
  ),
  compressor=CompressorConfig(temporal_stride=4, min_fast_frames=4),
  hybrid=HybridConfig(every=4, max_depth=8),
)
RATE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--rows", type=int, default=4, help="of a batch (%(default)s)")
  add("--length", type=int, default=512, help="decoder tokens of a row (%(default)s)")
  add("--frames", type=int, default=32, help="of a row's video, 16 slow tokens each (%(default)s)")
  add("--rounds", type=int, default=10, help="steps of each, in turns (%(default)s)")


def run(args: argparse.Namespace) -> int:
  """Prints tokens a second of both, and their ratio."""
  batch = make_batch(args.rows, args.length, args.frames)
  steps = {"PyTorch": torch_step(batch), "slowfast_jax": jax_step(batch)}
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for step in steps.values():
    step()  # Compiles, and touches all memory.
  for _ in range(args.rounds):
    for name, step in steps.items():
      began = time.perf_counter()
      step()
      seconds[name].append(time.perf_counter() - began)
  tokens = args.rows * args.length
  print(f"{args.rows} x {args.length} tokens, {args.frames} frames a row; median of {args.rounds}")
  for name, values in seconds.items():
    middle = statistics.median(values)
    print(f"{name:14} {tokens / middle:9.0f} tokens/s   {middle:7.3f} s a step")
  ratios = [theirs / ours for theirs, ours in zip(seconds["PyTorch"], seconds["slowfast_jax"])]
  print(f"ratio, median of the pairs: {statistics.median(ratios):.2f}")
  return 0


def make_batch(rows: int, length: int, frames: int) -> Batch:
  """Rows that are full of learned words, behind a video of random pictures."""
  geometry = Geometry(
    num_frames=frames,
    decoder_length=length,
    text_bound=length,
    image_size=(48, 48),
    tokens_per_frame=MODEL.vision.tokens_per_frame,
    temporal_stride=MODEL.compressor.temporal_stride,
    min_fast_frames=MODEL.compressor.min_fast_frames,
  )
  rng = np.random.default_rng(0)
  room = length - geometry.num_fast_tokens(frames)
  if room < 1:
    raise UserError(f"--length {length} leaves no room for text behind {frames} frames; raise it.")
  built = []
  for _ in range(rows):
    pixels = rng.integers(0, 256, (frames, 48, 48, 3)).astype(np.uint8)
    words = rng.integers(1, MODEL.decoder.vocab_size, room).tolist()
    learned = [0] + [1] * room
    built.append(build_row([Sample([-200, *words], learned, (frames,), pixels)], geometry))
  # As many positions are learned as PyTorch learns: all but the last.
  batch = collate(built)
  weights = np.ones_like(batch.loss_weights)
  weights[:, -1] = 0
  return dataclasses.replace(batch, loss_weights=weights)


def jax_step(batch: Batch) -> Callable[[], Any]:
  """Our step; the state is donated and goes from call to call."""
  optimizer = OptimizerConfig(RATE, 0, 10**6, weight_decay=0.01, b2=0.999)
  step = make_train_step(MODEL, optimizer, dtype=jnp.dtype("float32"), remat="none")
  compiled = jax.jit(step, donate_argnums=0)
  states = [jax.jit(lambda key: init_state(MODEL, optimizer, key))(jax.random.key(0))]
  placed = jax.tree.map(jnp.asarray, batch)

  def run() -> None:
    state, metrics = compiled(states.pop(), placed)
    states.append(state)
    jax.block_until_ready((state, metrics))

  return run


def torch_step(batch: Batch) -> Callable[[], Any]:
  """Hugging Face's decoder on as many tokens.

  Raises:
    UserError: PyTorch or Transformers is missing.
  """
  model = make_qwen2(MODEL.decoder).train()
  import torch

  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
  ids = torch.from_numpy(np.asarray(batch.tokens, np.int64))

  def run() -> None:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return run
