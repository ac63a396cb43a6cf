# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights everywhere, so that no gate is shut and no bias is zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slowfast_jax.checkpoints.store import flatten
from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.data.packing import Geometry, Sample, build_row, collate, empty_row
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import (
  CompressorConfig,
  SlowFast,
  SlowFastConfig,
  abstract_params,
  graphdef_of,
)
from slowfast_jax.models.vit import ViTConfig
from slowfast_jax.shapes import Batch

TOKENS_PER_FRAME = 4
CONFIG = SlowFastConfig(
  vision=ViTConfig("siglip", 4, 2, width=8, num_layers=2, num_heads=2, mlp_width=8),
  decoder=DecoderConfig(
    vocab_size=24,
    width=8,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=12,
    rope_theta=100.0,
  ),
  compressor=CompressorConfig(sampling_stride=1, temporal_stride=2, min_fast_frames=2),
  # Layers 0 and 3: the two between are one scan.
  hybrid=HybridConfig(every=3, max_depth=4),
)


def config(**changes) -> SlowFastConfig:
  """CONFIG with fields of its parts changed: `config(decoder={"qk_norm": True}, hybrid=None)`."""
  parts = {
    name: dataclasses.replace(getattr(CONFIG, name), **change)
    if isinstance(change, dict)
    else change
    for name, change in changes.items()
  }
  return dataclasses.replace(CONFIG, **parts)


def randomise(shapes, seed: int = 0):
  """Random arrays of these shapes; nothing is compiled.

  Scales of norms are near 1, and gates are open. Were kernels twice as large, the layers would
  magnify rounding to 1e-5.
  """
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    x = rng.normal(0, 1.0 if "warm_up" in name else 0.25, leaf.shape)
    return jnp.asarray(x + ("scale" in name), leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def random_module(make, seed: int = 0):
  """`make(rngs)`, a module, with random weights."""
  abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  return nnx.merge(nnx.graphdef(abstract), randomise(nnx.state(abstract), seed))


@functools.cache
def random_params(cfg: SlowFastConfig, seed: int) -> nnx.State:
  return randomise(abstract_params(cfg), seed)


def random_model(cfg: SlowFastConfig = CONFIG, seed: int = 0) -> SlowFast:
  # Copied: a test that sets a weight must not set it for the others.
  return nnx.merge(graphdef_of(cfg), jax.tree.map(lambda x: x, random_params(cfg, seed)))


def weights_of(module: nnx.Module) -> dict[str, np.ndarray]:
  """For the oracle: float64 by dotted name."""
  return {name: np.asarray(x, np.float64) for name, x in flatten(nnx.state(module)).items()}


def geometry_of(cfg: SlowFastConfig, num_frames=10) -> Geometry:
  """Rows of one shape whatever the strides: the bounds are those of keeping every frame."""
  compressor = cfg.compressor
  return Geometry(
    num_frames=num_frames,
    decoder_length=LENGTH,
    text_bound=LENGTH,
    image_size=(cfg.vision.image_size, cfg.vision.image_size),
    tokens_per_frame=TOKENS_PER_FRAME // compressor.spatial_stride**2,
    sampling_stride=compressor.sampling_stride,
    temporal_stride=compressor.temporal_stride,
    min_fast_frames=compressor.min_fast_frames,
    max_fast_frames=num_frames,
    query_set="text-only" if cfg.hybrid is None else cfg.hybrid.queries,
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """A sample of the tests: ids with -200, and random slow tokens of each of its videos."""

  ids: tuple[int, ...]
  num_frames: tuple[int, ...] = ()
  seed: int = 0

  def videos(self, width: int = CONFIG.decoder.width) -> list[np.ndarray]:
    rng = np.random.default_rng([self.seed, *self.num_frames])
    return [rng.normal(0, 1, (n, TOKENS_PER_FRAME, width)) for n in self.num_frames]


V = IMAGE_TOKEN
SYSTEM, ASK = (1, 2, 3), (4, 5, 6, 7)
LENGTH = 40
ROWS = [
  [Case((*SYSTEM, V, *ASK), (10,))],
  [Case((*SYSTEM, V, *ASK), (8,))],
  [Case((V, *ASK), (1,))],
  [Case((*SYSTEM, *ASK, 8))],
  # Packed: two videos, a text and an image; then a sample with two videos.
  [Case((9, V, 10), (2,)), Case((*SYSTEM, V, 11), (3,)), Case((12, 13)), Case((14, V, 15), (1,))],
  [Case((V, 9, V, *ASK), (3, 2)), Case((10, V, 11), (3,), seed=1)],
  # Cut on the right: in the text, and inside of a video.
  [Case((*SYSTEM, V, *ASK * 12), (2,))],
  [Case((*ASK * 9, V, 8), (3,))],
  # Padding alone.
  [],
]


def batch_of(rows: list[list[Case]], geometry: Geometry) -> tuple[Batch, np.ndarray]:
  """Rows of packed samples, and their slow tokens; frames of padding hold a poison."""
  built, slow = [], np.full((len(rows), geometry.num_frames, TOKENS_PER_FRAME, 8), 1e3, np.float32)
  for row, cases in enumerate(rows):
    samples = []
    for case in cases:
      shape = (sum(case.num_frames), *geometry.image_size, 3)
      pixels = np.zeros(shape, np.uint8) if case.num_frames else None
      # Text behind the first half is a response: both kinds query.
      learned = [i * 2 >= len(case.ids) and token >= 0 for i, token in enumerate(case.ids)]
      samples.append(Sample(case.ids, learned, case.num_frames, pixels))
    videos = [video for case in cases for video in case.videos()]
    if videos:
      frames = np.concatenate(videos)
      slow[row, : len(frames)] = frames
    built.append(build_row(samples, geometry) if samples else empty_row(geometry))
  return jax.tree.map(jnp.asarray, collate(built)), jnp.asarray(slow)
