# SPDX-License-Identifier: Apache-2.0
"""The programs of a config for devices that are only described: shapes instead of arrays.

They are the ones that `slowfast train` and the engine run: the same functions, jitted in the same
way, with the same layouts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from slowfast_jax.checkpoints.trees import with_shardings
from slowfast_jax.errors import UserError
from slowfast_jax.generate import programs
from slowfast_jax.generate.engine import ENCODED_FRAMES
from slowfast_jax.generate.programs import Decoding, Visual
from slowfast_jax.generate.prompts import Prompts
from slowfast_jax.generate.sampling import Sampling
from slowfast_jax.models.cache import KVCache
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.models.hybrid import SlowKV
from slowfast_jax.models.slowfast import SlowFastConfig, abstract_params, graphdef_of
from slowfast_jax.sharding import make_mesh, sharding_of
from slowfast_jax.train.flops import model_flops
from slowfast_jax.train.optimizer import split_frozen
from slowfast_jax.train.plan import Plan, make_plan, model_config
from slowfast_jax.train.program import compile_step, step_flops

KINDS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Request:
  """What generation is compiled for.

  Attributes:
    rows: prompts at a time; encoding takes one video.
    text: text tokens of a prompt.
    new_tokens: room for new tokens.
    frames: of the video, and as many fast tokens as the config has; 0: the config's own.
  """

  rows: int = 1
  text: int = 128
  new_tokens: int = 256
  frames: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
  """One program, ready to be compiled.

  Attributes:
    name: its name, which its dumps carry too.
    mesh: its devices.
    compile: compiles it.
    memory: bytes a device of what stays in memory beside the temporaries, by name.
    inside: bytes a device of what is known to be among the temporaries, by name.
    model_flops: of one run, on all devices together.
    frames: video frames of one run.
    rows: rows of one run.
  """

  name: str
  mesh: Mesh
  compile: Callable[[], jax.stages.Compiled]
  memory: dict[str, int]
  inside: dict[str, float]
  model_flops: float
  frames: int
  rows: int


def programs_of(
  config: ml_collections.ConfigDict, devices: list, what: str, request: Request
) -> Iterator[Program]:
  """The programs of a kind, one of KINDS; of answering there are two, encoding and prefill."""
  if what == "train":
    yield train_program(make_plan(config, devices))
    return
  generation = _Generation(config, make_mesh(config.mesh.to_dict(), devices), request)
  yield from (
    (generation.encode(), generation.prefill()) if what == "prefill" else (generation.decode(),)
  )


def train_program(plan: Plan) -> Program:
  """The training step on the config's own shape."""
  state, batch = plan.abstract_state(), plan.abstract_batches()[0]
  rows, frames = batch.frames.shape[:2]

  def compile() -> Any:
    return compile_step(plan, state, batch, lambda _: None)

  memory = {
    "parameters": bytes_of(state.params),
    "optimiser": bytes_of(state.opt_state),
    "batch": bytes_of(batch),
  }
  learning, _ = split_frozen(state.params, plan.optimizer)
  item = jnp.dtype(plan.config.train.dtype).itemsize
  inside = {
    "gradients": float(bytes_of(learning)),
    "slow tokens, their keys and values": slow_bytes(plan.model, plan.mesh, rows, frames, item),
  }
  flops = step_flops(plan, batch)
  return Program("step", plan.mesh, compile, memory, inside, flops, rows * frames, rows)


def slow_bytes(model: SlowFastConfig, mesh: Mesh, rows: int, frames: int, item: int) -> float:
  """Bytes a device of the slow tokens of rows and frames, and of what each hybrid layer makes."""
  pooled = model.vision.side // (model.compressor.video_pooling_stride if frames > 1 else 1)
  decoder = model.decoder
  heads = decoder.num_kv_heads
  spread = mesh.shape["tensor"] if heads % mesh.shape["tensor"] == 0 else 1
  kept = len(model.hybrid_layers) * 2 * heads * decoder.head_dim / spread
  shards = mesh.shape["data"] * mesh.shape["fsdp"] if rows > 1 else 1
  tokens = rows * frames * pooled**2 / (shards * mesh.shape["context"])
  return tokens * (decoder.width + kept) * item


def bytes_of(tree: Any) -> int:
  """Bytes of a tree's arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _longer(config: ml_collections.ConfigDict, frames: int) -> tuple[SlowFastConfig, int]:
  """The model and its frames, of which it keeps a share that leaves as many fast tokens."""
  model, trained = model_config(config.model), config.data.num_frames
  if not frames:
    return model, trained
  if frames % trained:
    raise UserError(f"--frames must be a multiple of data.num_frames = {trained}, got {frames}.")
  stride = model.compressor.sampling_stride * (frames // trained)
  compressor = dataclasses.replace(model.compressor, sampling_stride=stride)
  return dataclasses.replace(model, compressor=compressor), frames


class _Generation:
  """Abstract arguments of the engine's programs."""

  def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh, request: Request):
    self.model, self.frames = _longer(config, request.frames)
    self.mesh, self.request = mesh, request
    self.dtype = jnp.dtype(config.train.dtype)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    # As the engine pads a batch.
    self.rows = -(-request.rows // shards) * shards
    params = with_shardings(abstract_params(self.model), mesh)
    self.params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype, sharding=x.sharding), params
    )

  def encode(self) -> Program:
    """A video to slow and fast tokens, and to keys and values."""
    size = self.model.vision.image_size
    arguments = {
      "frames": self._array((self.frames, size, size, 3), np.uint8, "frames"),
      "pooling": self._array(self._pooling().shape, np.float32),
      "zero_slow": self._array((), np.bool_),
    }
    chunk = ENCODED_FRAMES * self.mesh.size
    flops = self._flops(0)
    return self._program(
      "encode_video",
      arguments,
      sum(flops[part] for part in ("vision", "projector", "compressor", "slow_keys")),
      {"dtype": self.dtype, "frame_chunk": chunk},
    )

  def prefill(self) -> Program:
    """Prompts of so much text behind a video's fast tokens, to their first new token."""
    length = self._length()
    arguments = {
      "prompts": self._prompts(length),
      "visual": self._visual(),
      "sampling": self._sampling(),
      "stop_ids": self._array((2,), np.int32),
    }
    new = self.request.new_tokens
    flops = self._flops(length)
    return self._program(
      "prefill",
      arguments,
      self.rows * (flops["decoder"] + flops["slow_reads"] + flops["vocabulary"] / length),
      {"max_new_tokens": new, "cache_length": length + new},
    )

  def decode(self) -> Program:
    """One new token of every row."""
    length, new, rows = self._length(), self.request.new_tokens, self.rows
    decoder = self.model.decoder
    shape = (decoder.num_layers, rows, length + new, decoder.num_kv_heads, decoder.head_dim)
    cache = self._array(shape, self.dtype, None, "batch", None, "heads")
    state = Decoding(
      KVCache(cache, cache),
      self._array((rows, new), np.int32, "batch"),
      *(self._array((rows,), kind, "batch") for kind in (np.int32, np.int32, np.bool_)),
    )
    arguments = {
      "state": state,
      "visual": self._visual(),
      "sampling": self._sampling(),
      "limits": self._array((rows,), np.int32, "batch"),
      "steps": self._array((), np.int32),
      "stop_ids": self._array((2,), np.int32),
    }
    one = model_flops(self.model, **self._sizes(1, text=1))
    flops = one["decoder"] + one["vocabulary"] + self._flops(1, text=1)["slow_reads"]
    # And attention to all positions so far.
    flops += 4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim * length
    return self._program("decode", arguments, rows * flops, {}, donate=("state",))

  def _program(
    self,
    name: str,
    arguments: dict[str, Any],
    flops: float,
    static: dict[str, Any],
    donate: tuple[str, ...] = (),
  ) -> Program:
    jitted = programs.jit_program(
      graphdef_of(self.model), getattr(programs, name), tuple(static), donate
    )

    def compile() -> Any:
      with jax.set_mesh(self.mesh):
        return jitted.lower(self.params, **arguments, **static).compile()

    memory = {"parameters": bytes_of(self.params)}
    memory |= {key: bytes_of(value) for key, value in arguments.items()}
    frames = self.frames if name == "encode_video" else 0
    slow = slow_bytes(self.model, self.mesh, 1, frames, self.dtype.itemsize)
    inside = {"slow tokens, their keys and values": slow}
    return Program(name, self.mesh, compile, memory, inside, flops, frames, self.rows)

  def _array(self, shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
    """An array of this shape, laid out as the engine would."""
    named = (*axes, *[None] * (len(shape) - len(axes)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(named, shape, self.mesh))

  def _pooling(self) -> np.ndarray:
    c = self.model.compressor
    return pooling_matrix(self.frames, c.sampling_stride, c.temporal_stride, c.min_fast_frames)

  def _tokens(self) -> tuple[int, int]:
    """Slow tokens of a frame, and fast tokens of the video."""
    c = self.model.compressor
    side = self.model.vision.side // (c.video_pooling_stride if self.frames > 1 else 1)
    return side**2, len(self._pooling()) * (side // c.spatial_stride) ** 2

  def _length(self) -> int:
    return self._tokens()[1] + self.request.text

  def _prompts(self, length: int) -> Prompts:
    rows, text = self.rows, self.request.text
    queries = text if self.model.hybrid is None or self.model.hybrid.queries != "all" else length
    return Prompts(
      self._array((rows, length), np.int32, "batch"),
      self._array((rows, length), np.int8, "batch"),
      self._array((rows,), np.int32, "batch"),
      self._array((rows, queries), np.int32, "batch"),
      self._array((rows,), np.bool_, "batch"),
    )

  def _visual(self) -> Visual:
    decoder, (tokens, fast) = self.model.decoder, self._tokens()
    kv = None
    if layers := len(self.model.hybrid_layers):
      slow = self.frames * tokens
      shape = (layers, self.rows, slow, decoder.num_kv_heads, decoder.head_dim)
      one = self._array(shape, self.dtype, None, "batch", "slow", "heads")
      kv = SlowKV(one, one)
    width = (self.rows, fast, decoder.width)
    counts = self._array((self.rows,), np.int32, "batch")
    return Visual(self._array(width, self.dtype, "batch"), kv, counts)

  def _sampling(self) -> Sampling:
    kinds = (np.float32, np.float32, np.int32, np.int32)
    return Sampling(*(self._array((self.rows,), kind) for kind in kinds))

  def _sizes(self, length: int, text: int) -> dict[str, int]:
    fast = len(self._pooling())
    return {
      "num_frames": self.frames,
      "decoder_length": length,
      "text_bound": text,
      "fast_frames": fast,
    }

  def _flops(self, length: int, text: int | None = None) -> dict[str, float]:
    """FLOPs of a row, with cross-attention in two: keys and values once, reading at each prompt."""
    text = self.request.text if text is None else text
    flops = model_flops(self.model, **self._sizes(length, text))
    keys = model_flops(self.model, **self._sizes(length, 0))["cross_attention"]
    return flops | {"slow_keys": keys, "slow_reads": flops["cross_attention"] - keys}
