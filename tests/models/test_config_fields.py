# SPDX-License-Identifier: Apache-2.0
"""No dead options: every field of a model's config changes its parameters or its output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import GATES, HybridConfig
from slowfast_jax.models.lora import LoraConfig
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig
from slowfast_jax.shapes import QUERY_SETS
from slowfast_jax.train.plan import geometry_of
from tests.models.tiny import LENGTH, ROWS, batch_of, config, random_model, random_params

SCALING = LlamaRopeScaling(4.0, 1.0, 3.0, 100)
BASE = config(decoder={"rope_scaling": SCALING})
CONVNEXT = config(
  vision=ConvNeXtConfig(image_size=16, depths=(1, 1), widths=(4, 8)),
  compressor={"spatial_stride": 2},
)
ADAPTED = dataclasses.replace(BASE, lora=LoraConfig(2, 4.0))

# Another value of every field.
CHANGES = {
  ViTConfig: {
    "family": ["clip"],
    "image_size": [6],
    "patch_size": [1],
    "width": [16],
    "num_layers": [3],
    "num_heads": [4],
    "mlp_width": [12],
    "select_layer": [-1, 0],
    "norm_eps": [0.1],
  },
  ConvNeXtConfig: {
    "family": [],  # Has one value; another raises.
    "image_size": [32],
    "depths": [(2, 1), (1, 2)],
    "widths": [(4, 6)],
    "norm_eps": [0.1],
  },
  DecoderConfig: {
    "vocab_size": [25],
    "width": [16],
    "num_layers": [5],
    "num_heads": [2],
    "num_kv_heads": [4],
    "head_dim": [6],
    "mlp_width": [8],
    "rope_theta": [50.0],
    "rope_scaling": [None],
    "norm_eps": [0.1],
    "qkv_bias": [False],
    "qk_norm": [True],
    "tie_embeddings": [True],
  },
  LlamaRopeScaling: {
    "factor": [8.0],
    "low_freq_factor": [1.5],
    "high_freq_factor": [4.0],
    "original_max_position_embeddings": [120],
  },
  HybridConfig: {
    "every": [1],
    "min_depth": [1],
    "max_depth": [3],
    "gate": [gate for gate in GATES if gate != BASE.hybrid.gate],
    "queries": [queries for queries in QUERY_SETS if queries != BASE.hybrid.queries],
  },
  CompressorConfig: {
    "video_pooling_stride": [2],
    "sampling_stride": [2],
    "temporal_stride": [3],
    "spatial_stride": [2],
    "min_fast_frames": [4],
  },
  LoraConfig: {
    "rank": [3],
    "alpha": [8.0],
    "modules": [("q", "down")],
  },
  SlowFastConfig: {
    "vision": [dataclasses.replace(BASE.vision, norm_eps=0.1)],
    "decoder": [dataclasses.replace(BASE.decoder, norm_eps=0.1)],
    "compressor": [dataclasses.replace(BASE.compressor, temporal_stride=3)],
    "hybrid": [None],
    "projector": ["linear", "mlp3x_gelu"],
    "lora": [LoraConfig(2, 4.0)],
  },
}


def test_all_fields_are_listed():
  for kind, fields in CHANGES.items():
    assert list(fields) == [field.name for field in dataclasses.fields(kind)]


def base_of(part):
  """A model that has such a part."""
  return {ConvNeXtConfig: CONVNEXT, LoraConfig: ADAPTED}.get(part, BASE)


def changed(part, **fields):
  """The base with fields of one of its dataclasses replaced, wherever that is."""

  def walk(node):
    if type(node) is part:
      return dataclasses.replace(node, **fields)
    parts = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return dataclasses.replace(
      node, **{name: walk(x) for name, x in parts.items() if dataclasses.is_dataclass(x)}
    )

  return walk(base_of(part))


@functools.cache
def shapes(cfg):
  return [leaf.shape for leaf in jax.tree.leaves(random_params(cfg, 0))]


@functools.cache
def output(cfg):
  """Hidden states of the same rows of pixels and ids."""
  geometry = geometry_of(cfg, {"num_frames": 10, "decoder_length": LENGTH, "text_bound": LENGTH})
  # Not pooled: still images are among them, which training keeps apart from videos that are.
  batch, _ = batch_of(ROWS, dataclasses.replace(geometry, max_fast_frames=10, pooled=False))
  pixels = np.random.default_rng(0).integers(0, 256, batch.frames.shape).astype(np.uint8)
  blocks = getattr(cfg.vision, "num_blocks", 1)
  with jax.disable_jit(blocks > 0):  # Eager: most programs are shared.
    return np.asarray(random_model(cfg)(dataclasses.replace(batch, frames=jnp.asarray(pixels))))


@pytest.mark.parametrize(
  ("part", "field", "value"),
  [
    pytest.param(part, field, value, id=f"{part.__name__}.{field}-{i}")
    for part, fields in CHANGES.items()
    for field, values in fields.items()
    for i, value in enumerate(values)
  ],
)
def test_every_field_has_an_effect(part, field, value):
  cfg, base = changed(part, **{field: value}), base_of(part)
  assert cfg != base
  if shapes(cfg) == shapes(base):
    assert np.abs(output(cfg) - output(base)).max() > 1e-4


def test_gates_and_query_sets_are_all_different():
  outputs = [
    output(changed(HybridConfig, gate=gate, queries=queries))
    for gate in GATES
    for queries in QUERY_SETS
  ]
  for i, one in enumerate(outputs):
    for other in outputs[:i]:
      assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CompressorConfig)])
def test_strides_are_positive(field):
  with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
    CompressorConfig(**{field: 0})
