# SPDX-License-Identifier: Apache-2.0
"""A tiny random model that is sensitive to everything: what it sees, what it reads, who queries.

And its scores as training computes them, from a `Batch` and without any cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from slowfast_jax.checkpoints.store import Export, VideoConfig
from slowfast_jax.data.packing import Geometry, Sample, build_row
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFast, SlowFastConfig, graphdef_of
from slowfast_jax.models.vit import ViTConfig

SIZE = 16
CONFIG = SlowFastConfig(
  vision=ViTConfig("siglip", SIZE, 4, width=16, num_layers=2, num_heads=2, mlp_width=16),
  decoder=DecoderConfig(
    vocab_size=320,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=32,
  ),
  compressor=CompressorConfig(
    video_pooling_stride=2, sampling_stride=2, temporal_stride=1, min_fast_frames=2
  ),
  hybrid=HybridConfig(every=2, min_depth=0, max_depth=3),
)
TOKENIZER = train_tokenizer(
  ["What colour was the circle? The circle was red.", "system user assistant Be brief."], 320
)


def make_export(queries: str = "text-only", num_frames: int = 8, hybrid: bool = True) -> Export:
  config = CONFIG if hybrid else dataclasses.replace(CONFIG, hybrid=None)
  if config.hybrid is not None:
    config = dataclasses.replace(config, hybrid=dataclasses.replace(config.hybrid, queries=queries))
  return Export(config, _params(hybrid), TOKENIZER, VideoConfig(num_frames), "Be brief.")


@functools.cache
def _params(hybrid: bool) -> nnx.State:
  config = CONFIG if hybrid else dataclasses.replace(CONFIG, hybrid=None)

  def init() -> nnx.State:
    model = SlowFast(config, rngs=nnx.Rngs(0))
    if model.adapters is not None:
      # At its start the gate is shut, and every test of the slow path would pass for any bug.
      model.adapters.warm_up[...] = jnp.ones_like(model.adapters.warm_up[...])
    return nnx.state(model)

  return jax.jit(init)()  # One program: its operations one by one compile for twenty seconds.


def frames(count: int, seed: int) -> UInt8[np.ndarray, "F h w C"]:
  return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def geometry(config: SlowFastConfig, still: bool = False) -> Geometry:
  """Rows of up to 8 video frames, or of a still image."""
  compressor = config.compressor
  return Geometry(
    num_frames=1 if still else 8,
    decoder_length=128,
    text_bound=128,
    image_size=(SIZE, SIZE),
    tokens_per_frame=16 if still else 4,
    sampling_stride=compressor.sampling_stride,
    temporal_stride=compressor.temporal_stride,
    min_fast_frames=compressor.min_fast_frames,
    query_set="text-only" if config.hybrid is None else config.hybrid.queries,
  )


@functools.cache
def batch_logits(config: SlowFastConfig):
  """A program (params, batch) -> float32 [B, T, V]."""
  graphdef = graphdef_of(config)

  def run(params, batch):
    model = nnx.merge(graphdef, params)
    return model.decoder.logits(model(batch))

  return jax.jit(run)


def full_logits(export: Export, ids, pixels, silent_from: int | None = None):
  """Float32 [positions, V] of one sample; ids from `silent_from` on read no slow tokens."""
  still = pixels is not None and len(pixels) == 1
  sample = Sample(ids, None, () if pixels is None else (len(pixels),), pixels)
  batch = build_row([sample], geometry(export.model, still))
  count = int((batch.segments > 0).sum())
  if silent_from is not None:
    batch.text_index[batch.text_index >= count - (len(ids) - silent_from)] = -1
  return np.asarray(batch_logits(export.model)(export.params, batch))[0, :count]
