# SPDX-License-Identifier: Apache-2.0
"""The whole model: frames to slow tokens, slow to fast, and a decoder whose text reads slow tokens.

Without hybrid layers (`hybrid=None`) the same class is the self-attention baseline: it sees the
fast tokens and nothing else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.cache import FlatCache, KVCache, cache_mask
from slowfast_jax.models.compressor import compress, spatial_pool
from slowfast_jax.models.decoder import (
  Decoder,
  DecoderConfig,
  ReadSlow,
)
from slowfast_jax.models.hybrid import (
  HybridAdapter,
  HybridConfig,
  SlowKV,
  SlowLayers,
  SlowQuery,
  slow_query,
)
from slowfast_jax.models.layers import Rngs, layer_of, stack
from slowfast_jax.models.lora import LoraConfig, add_lora
from slowfast_jax.models.projector import Projector, projector_depth
from slowfast_jax.models.remat import remat
from slowfast_jax.models.vision import VisionConfig, make_vision
from slowfast_jax.shapes import FAST, Batch
from slowfast_jax.sharding import constrain, mesh_in_force


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
  """Slow to fast tokens (semantics section 2).

  Attributes:
    video_pooling_stride: average pooling of every video frame's grid before anything else.
    sampling_stride: keep every n-th frame.
    temporal_stride: average this many kept frames.
    spatial_stride: average pooling of the fast frames' grid.
    min_fast_frames: the two temporal strides leave at least this many.
  """

  video_pooling_stride: int = 1
  sampling_stride: int = 1
  temporal_stride: int = 4
  spatial_stride: int = 1
  min_fast_frames: int = 16

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}.")


@dataclasses.dataclass(frozen=True)
class SlowFastConfig:
  """The parts of a slow-fast model; `hybrid=None` is the fast-only baseline.

  `lora` is for training: the decoder's projections have low-rank adapters.
  """

  vision: VisionConfig
  decoder: DecoderConfig
  compressor: CompressorConfig
  hybrid: HybridConfig | None
  projector: str = "mlp2x_gelu"
  lora: LoraConfig | None = None

  def __post_init__(self):
    projector_depth(self.projector)  # Raises where there is no such projector.

  @property
  def hybrid_layers(self) -> tuple[int, ...]:
    return () if self.hybrid is None else self.hybrid.layers(self.decoder.num_layers)

  @property
  def num_params(self) -> int:
    """Parameters of the whole model."""
    return sum(num_params_by_part(self).values())


def make_adapters(hybrid: HybridConfig, decoder: DecoderConfig, *, rngs: Rngs) -> HybridAdapter:
  """The adapters of all hybrid layers, as one stack."""
  count = len(hybrid.layers(decoder.num_layers))
  return stack(lambda r: HybridAdapter(hybrid, decoder, rngs=r), count, rngs=rngs)


class SlowFast(nnx.Module):
  """A video language model with few fast tokens in its sequence and all slow tokens beside it."""

  def __init__(self, cfg: SlowFastConfig, *, rngs: Rngs):
    self.cfg = cfg
    self.vision = make_vision(cfg.vision, rngs=rngs)
    self.projector = Projector(cfg.projector, cfg.vision.width, cfg.decoder.width, rngs=rngs)
    self.decoder = Decoder(cfg.decoder, rngs=rngs)
    self.adapters = (
      make_adapters(cfg.hybrid, cfg.decoder, rngs=rngs)
      if cfg.hybrid is not None and cfg.hybrid_layers
      else None
    )
    if cfg.lora is not None:  # Last, so that all else starts as it does without.
      add_lora(self.decoder.layers, cfg.lora, rngs=rngs)

  def encode(
    self,
    frames: UInt8[Array, "B F h w C"],
    dtype: jnp.dtype,
    frame_chunk: int | None = None,
    *,
    policy: str = "none",
  ) -> Float[Array, "B F P D"]:
    """Slow tokens of uint8 frames: normalise, encode, project, and pool if it is a video.

    Args:
      frames: pixels.
      dtype: what is computed in.
      frame_chunk: encode so many frames at a time, and again in the backward pass: the memory of
        the encoder is that of a chunk. It should divide B x F, else the frames are copied once to
        fill the last chunk. None: all at once.
      policy: what the backward pass keeps of each block, a name of `remat.REMAT`.

    Raises:
      ValueError: `frame_chunk` is below 1.
    """
    vision = self.cfg.vision
    mean, std = jnp.array(vision.pixel_mean), jnp.array(vision.pixel_std)

    def normalise(frames: UInt8[Array, "B h w C"]) -> Float[Array, "B h w C"]:
      return ((frames.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)

    def encoder(frames: UInt8[Array, "B h w C"]) -> Float[Array, "B P E"]:
      return self.vision(normalise(frames), policy=policy)

    return self._encode(frames, encoder, frame_chunk)

  def encode_pixels(
    self, pixels: Float[Array, "B F h w C"], frame_chunk: int | None = None
  ) -> Float[Array, "B F P D"]:
    """Slow tokens of normalised frames; `frame_chunk` as in `encode`."""
    return self._encode(pixels, self.vision, frame_chunk)

  def _encode(
    self,
    frames: Array,
    vision: Callable[[Array], Float[Array, "B P E"]],
    frame_chunk: int | None,
  ) -> Float[Array, "B F P D"]:
    B, F = frames.shape[:2]
    stride = self.cfg.compressor.video_pooling_stride if F > 1 else 1

    def slow_tokens(frames: Array) -> Float[Array, "B P D"]:
      return spatial_pool(self.projector(vision(frames)), stride)

    flat = constrain(einops.rearrange(frames, "B F h w C -> (B F) h w C"), "frames")
    slow = map_in_chunks(slow_tokens, flat, frame_chunk)
    return einops.rearrange(slow, "(B F) P D -> B F P D", B=B)

  def embed(
    self,
    tokens: Int[Array, "B T"],
    kind: Int[Array, "B T"],
    fast: Float[Array, "B Q p D"],
  ) -> Float[Array, "B T D"]:
    """Text embeddings with the row's fast tokens, in order, at its FAST positions."""
    text = self.decoder.embed(tokens, fast.dtype)
    flat = einops.rearrange(fast, "B Q p D -> B (Q p) D")
    rank = jnp.clip(jnp.cumsum(kind == FAST, axis=1) - 1, 0, flat.shape[1] - 1)
    spliced = jnp.take_along_axis(flat, rank[:, :, None], axis=1)
    return jnp.where((kind == FAST)[:, :, None], spliced, text)

  def slow_kv(self, slow: Float[Array, "B F P D"], *, policy: str = "none") -> SlowKV | None:
    """Keys and values of the slow tokens at every hybrid layer."""
    adapters = self.adapters
    if adapters is None:
      return None
    flat = constrain(einops.rearrange(slow, "B F P D -> B (F P) D"), "batch", "slow")

    def keys_values(flat: Array, i: int, depth: int) -> tuple[Array, Array]:
      norm = layer_of(self.decoder.layers, depth).input_norm
      return layer_of(adapters, i).keys_values(flat, norm)

    pairs = [
      # The normalised slow tokens are as many as the slow tokens, at each hybrid layer.
      remat(functools.partial(keys_values, i=i, depth=depth), policy)(flat)
      for i, depth in enumerate(self.cfg.hybrid_layers)
    ]
    return SlowKV(*(jnp.stack(part) for part in zip(*pairs)))

  def readers(self, kv: SlowKV | SlowLayers | None, query: SlowQuery | None) -> dict[int, ReadSlow]:
    """The hook of each hybrid layer."""
    adapters = self.adapters
    if adapters is None or kv is None or query is None:
      return {}

    def reader(i: int) -> ReadSlow:
      adapter = layer_of(adapters, i)
      return lambda q, o: adapter(q, o, kv.read(i), query)

    return {depth: reader(i) for i, depth in enumerate(self.cfg.hybrid_layers)}

  def __call__(
    self,
    batch: Batch,
    *,
    dtype: jnp.dtype = jnp.float32,
    policy: str = "none",
    frame_chunk: int = 0,
  ) -> Float[Array, "B T D"]:
    """Last hidden states of a batch, as training sees them.

    Args:
      batch: rows.
      dtype: what is computed in.
      policy: what the backward pass keeps of each layer and block, a name of `remat.REMAT`.
      frame_chunk: frames that a device encodes at a time, see `encode`; 0: all at once. Of a chunk
        nothing is kept for the backward pass; while that is at it, results of products are.
    """
    if frame_chunk:
      mesh = mesh_in_force()
      chunk = frame_chunk * (1 if mesh is None else mesh.size)
      slow = self.encode(batch.frames, dtype, chunk, policy="dots")
    else:
      slow = self.encode(batch.frames, dtype, policy=policy)
    return self.forward(batch, slow, policy=policy)

  def forward(
    self, batch: Batch, slow: Float[Array, "B F P D"], *, policy: str = "none"
  ) -> Float[Array, "B T D"]:
    """Last hidden states, given the slow tokens."""
    fast = compress(slow, batch.pooling, self.cfg.compressor.spatial_stride)
    x = self.embed(batch.tokens, batch.kind, fast)
    query = self.query(batch, slow.shape[2])
    readers = self.readers(self.slow_kv(slow, policy=policy), query)
    mask = Causal(batch.segments)
    hidden, _ = self.decoder(x, batch.positions, mask, readers=readers, policy=policy)
    return hidden

  def query(self, batch: Batch, tokens_per_frame: int) -> SlowQuery:
    """Who of a batch reads which slow tokens."""
    return slow_query(batch.text_index, batch.segments, batch.frame_segments, tokens_per_frame)

  def cached_step(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache | FlatCache,
    kv: SlowKV | SlowLayers | None,
    query: SlowQuery | None,
  ) -> tuple[Float[Array, "B T D"], KVCache | FlatCache]:
    """Prefill or decode: positions write their cache slots and see all earlier ones."""
    mask = cache_mask(positions, cache.num_slots)
    return self.decoder(x, positions, mask, cache=cache, readers=self.readers(kv, query))


def map_in_chunks(
  function: Callable[[Array], Array], xs: Array, chunk: int | None
) -> Float[Array, "F P D"]:
  """`function(xs)`, of `chunk` rows at a time, with no memory but that of one chunk.

  Chunk i has every n-th row from row i on. So if the rows are sharded, each device has its part of
  every chunk.
  """
  if chunk is not None and chunk < 1:
    raise ValueError(f"frame_chunk must be at least 1, got {chunk}.")
  if chunk is None or chunk >= len(xs):
    return function(xs)
  num_chunks = -(-len(xs) // chunk)
  size = -(-len(xs) // num_chunks)
  padding = size * num_chunks - len(xs)
  padded = jnp.pad(xs, [(0, padding), *[(0, 0)] * (xs.ndim - 1)]) if padding else xs
  columns = einops.rearrange(padded, "(size n) ... -> size n ...", size=size)

  @jax.checkpoint
  def one(columns: Array, i: Array) -> Array:
    return function(jax.lax.dynamic_index_in_dim(columns, i, axis=1, keepdims=False))

  def body(done: Array, i: Array) -> tuple[Array, None]:
    return jax.lax.dynamic_update_index_in_dim(done, one(columns, i), i, axis=1), None

  out = jax.eval_shape(one, columns, 0)
  # Written in place: stacked results would have to be copied into the order of the rows.
  done = jnp.zeros((size, num_chunks, *out.shape[1:]), out.dtype)
  done, _ = jax.lax.scan(body, done, jnp.arange(num_chunks))
  return einops.rearrange(done, "size n ... -> (size n) ...")[: len(xs)]


@functools.cache
def _abstract_model(cfg: SlowFastConfig) -> tuple[nnx.GraphDef, nnx.State]:
  return nnx.split(nnx.eval_shape(lambda: SlowFast(cfg, rngs=nnx.Rngs(0))))


def graphdef_of(cfg: SlowFastConfig) -> nnx.GraphDef:
  """The structure of `SlowFast(cfg)` without its arrays, for `nnx.merge`."""
  return _abstract_model(cfg)[0]


def abstract_params(cfg: SlowFastConfig) -> nnx.State:
  """Shapes, dtypes and axes of the parameters of `SlowFast(cfg)`; nothing is computed."""
  return _abstract_model(cfg)[1]


@functools.cache
def num_params_by_part(cfg: SlowFastConfig) -> dict[str, int]:
  """Parameters of "vision", "projector", "decoder" and "adapters"; nothing is computed."""
  parts = dict.fromkeys(("vision", "projector", "decoder", "adapters"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg)):
    parts[path[0].key] += math.prod(leaf.shape)
  return parts
