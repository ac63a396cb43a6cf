# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench generate`: answering beside a PyTorch language model that has no slow path.

Ours has 1,296 fast and 128 text tokens in its sequence and reads 5,184 slow tokens beside it;
Hugging Face's Qwen2 of the same size has the same 1,424 positions and nothing else. Both run in one
process, on the same threads, in turns; the best of the rounds counts, because other work on the
machine disturbs a round, not a side. FLOPs and bytes are counted by hand, before it measures.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.hugging_face import make_qwen2
from slowfast_jax.checkpoints.store import Export, VideoConfig
from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.errors import UsageError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFast, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig

HELP = "prefill, decode and questions a minute, beside Qwen2 in PyTorch"

_FRAMES, _SIZE, _TEXT = 64, 288, 128
_MODEL = SlowFastConfig(
  # 18 x 18 patches, pooled to 9 x 9: 81 tokens a frame.
  vision=ViTConfig("siglip", _SIZE, 16, width=384, num_layers=12, num_heads=6, mlp_width=1536),
  decoder=DecoderConfig(
    vocab_size=8192,
    width=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=2048,
  ),
  compressor=CompressorConfig(video_pooling_stride=2),
  hybrid=HybridConfig(every=2, min_depth=0, max_depth=8),
)


@dataclasses.dataclass(frozen=True)
class Work:
  """What has to be computed and read, counted by hand.

  Attributes:
    prefill_flops: of all positions of the prompt, and one row of scores.
    decode_flops: of a new token.
    decode_bytes: parameters, self-attention's keys and values, and slow keys and values of a token.
  """

  prefill_flops: float
  decode_flops: float
  decode_bytes: float


@dataclasses.dataclass(frozen=True)
class Result:
  """The best of all rounds.

  Attributes:
    prefill_seconds, torch_prefill_seconds: of 1,424 positions, up to the first new token.
    decode_rate, torch_decode_rate: new tokens a second after that.
    prefill_ratio, decode_ratio: how many times faster ours is.
    asked, encoded: questions a minute about a video that was encoded once, and each time.
    asked_ratio: of these two.
  """

  prefill_seconds: float
  torch_prefill_seconds: float
  prefill_ratio: float
  decode_rate: float
  torch_decode_rate: float
  decode_ratio: float
  asked: float
  encoded: float
  asked_ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--rounds", type=int, default=5, help="of which the best counts (%(default)s)")
  add("--new-tokens", type=int, default=64, help="of each decoding (%(default)s)")
  add("--questions", type=int, default=10, help="about one video (%(default)s)")
  add("--answer-tokens", type=int, default=16, help="of each answer (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the table."""
  for name in ("rounds", "new_tokens", "questions", "answer_tokens"):
    if getattr(args, name) < 2:
      raise UsageError(f"--{name.replace('_', '-')} must be at least 2, got {getattr(args, name)}.")
  works = {"ours": count_work(slow=True), "PyTorch": count_work(slow=False)}
  for name, work in works.items():
    print(
      f"{name:<8} prefill {work.prefill_flops / 1e9:6.1f} GFLOP   "
      f"a token {work.decode_flops / 1e6:6.1f} MFLOP, {work.decode_bytes / 1e6:6.1f} MB"
    )
  result = measure(args)
  print(_table(result))
  if args.json:
    about = {"cores": _cores(), "work": {k: dataclasses.asdict(w) for k, w in works.items()}}
    pathlib.Path(args.json).write_text(json.dumps(about | dataclasses.asdict(result), indent=2))
  return 0


def count_work(slow: bool) -> Work:
  """FLOPs (two of each multiplication and addition) and float32 bytes."""
  c, T = _MODEL.decoder, _positions()
  qkvo = 2 * c.width * c.head_dim * (c.num_heads + c.num_kv_heads)
  layers = c.num_layers * (qkvo + 3 * c.width * c.mlp_width)
  head, heads = c.width * c.vocab_size, c.num_heads * c.head_dim
  kv = 2 * c.num_kv_heads * c.head_dim
  # A causal half of all pairs; scores and sums.
  prefill = 2 * layers * T + 2 * head + c.num_layers * 2 * heads * T * T
  decode = 2 * (layers + head) + c.num_layers * 4 * heads * T
  read = layers + head + c.num_layers * kv * T
  if slow:
    pairs = len(_MODEL.hybrid_layers) * _FRAMES * 81
    prefill += 4 * heads * pairs * _TEXT
    decode += 4 * heads * pairs
    read += kv * pairs
  return Work(prefill, decode, 4.0 * read)


def measure(args: argparse.Namespace) -> Result:
  """Both sides in turns."""
  engine = Engine(_export())
  engine.stop_ids = (-1,)
  frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, _SIZE, _SIZE, 3)).astype(np.uint8)
  session = jax.block_until_ready(engine.encode(frames))
  rng = np.random.default_rng(1)
  questions = [
    [IMAGE_TOKEN, *rng.integers(0, _MODEL.decoder.vocab_size, _TEXT).tolist()]
    for _ in range(args.questions)
  ]
  prompt = questions[0]
  sides = {
    "ours": _ours(engine, prompt, session, args.new_tokens),
    "torch": _torch(args.new_tokens),
  }
  first, rate = dict.fromkeys(sides, math.inf), dict.fromkeys(sides, math.inf)
  for round_ in range(args.rounds + 1):
    for name, side in sides.items():
      prefill, decode = side()
      if round_:  # The first compiles and fills memory pools.
        first[name], rate[name] = min(first[name], prefill), min(rate[name], decode)

  def ask(question, session=session):
    engine.generate([question], [session], args.answer_tokens)

  ask(prompt)
  asked = min(_seconds(lambda: [ask(q) for q in questions]) for _ in range(2))
  encoded = _seconds(lambda: [ask(q, engine.encode(frames)) for q in questions])
  tokens, minute = args.new_tokens - 1, 60 * len(questions)
  return Result(
    prefill_seconds=first["ours"],
    torch_prefill_seconds=first["torch"],
    prefill_ratio=first["torch"] / first["ours"],
    decode_rate=tokens / rate["ours"],
    torch_decode_rate=tokens / rate["torch"],
    decode_ratio=rate["torch"] / rate["ours"],
    asked=minute / asked,
    encoded=minute / encoded,
    asked_ratio=encoded / asked,
  )


def _positions() -> int:
  return _FRAMES // 4 * 81 + _TEXT


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def _export() -> Export:
  """Random parameters; the gate is open, or the slow path would be a multiplication by zero."""

  def init() -> nnx.State:
    model = SlowFast(_MODEL, rngs=nnx.Rngs(0))
    assert model.adapters is not None
    assert model.adapters.warm_up is not None
    model.adapters.warm_up[...] = jnp.ones_like(model.adapters.warm_up[...])
    return nnx.state(model)

  return Export(_MODEL, jax.jit(init)(), None, VideoConfig(_FRAMES), "")


def _ours(engine: Engine, prompt, session, new_tokens: int) -> Callable[[], tuple[float, float]]:
  """Seconds to the first token, and from there to the last."""

  def one() -> tuple[float, float]:
    began = time.perf_counter()
    engine.generate([prompt], [session], 1)
    first = time.perf_counter() - began
    return first, _seconds(lambda: engine.generate([prompt], [session], new_tokens)) - first

  return one


def _torch(new_tokens: int) -> Callable[[], tuple[float, float]]:
  """The same of Qwen2 in PyTorch, fed token by token: `generate` would only add to it."""
  model = make_qwen2(_MODEL.decoder).eval()
  import torch

  torch.set_num_threads(_cores())
  ids = torch.randint(0, _MODEL.decoder.vocab_size, (1, _positions()))

  def step(ids: Any, cache: Any) -> tuple[Any, Any]:
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

  @torch.inference_mode()
  def one() -> tuple[float, float]:
    began = time.perf_counter()
    token, cache = step(ids, None)
    token.item()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
      token, cache = step(token, cache)
      token.item()
    return first - began, time.perf_counter() - first

  return one


def _seconds(work: Callable[[], Any]) -> float:
  began = time.perf_counter()
  work()
  return time.perf_counter() - began


def _table(r: Result) -> str:
  rows = [
    ("", "ours", "PyTorch", "ratio"),
    (
      "prefill, seconds",
      f"{r.prefill_seconds:.3f}",
      f"{r.torch_prefill_seconds:.3f}",
      f"{r.prefill_ratio:.2f}",
    ),
    (
      "decode, tokens/s",
      f"{r.decode_rate:.1f}",
      f"{r.torch_decode_rate:.1f}",
      f"{r.decode_ratio:.2f}",
    ),
    ("", "encoded once", "each time", "ratio"),
    ("questions/minute", f"{r.asked:.1f}", f"{r.encoded:.1f}", f"{r.asked_ratio:.2f}"),
  ]
  return "\n".join(f"{row[0]:<18}{row[1]:>14}{row[2]:>12}{row[3]:>8}" for row in rows)
