# SPDX-License-Identifier: Apache-2.0
"""The named models have the published sizes; nothing here is computed, shapes are enough."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.checkpoints.store import flatten
from slowfast_jax.errors import UserError
from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.decoder import Decoder
from slowfast_jax.models.presets import (
  DECODERS,
  PRESETS,
  TOWERS,
  build_config,
  match_preset,
)
from slowfast_jax.models.slowfast import abstract_params, graphdef_of, num_params_by_part
from slowfast_jax.models.vision import make_vision
from slowfast_jax.models.vit import ViTConfig
from slowfast_jax.shapes import Batch

# Parameters of the released language models, tied embeddings counted once.
DECODER_PARAMS = {
  "qwen2-0.5b": 494_032_768,
  "qwen2-1.5b": 1_543_714_304,
  "qwen2-7b": 7_615_616_512,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
}


def shapes_of(make):
  """(structure, shapes) of a module."""
  return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def count(state):
  return sum(int(np.prod(x.shape)) for x in flatten(state).values())


@pytest.mark.parametrize("name", DECODERS)
def test_language_models_have_the_published_number_of_parameters(name):
  cfg = DECODERS[name]
  graphdef, state = shapes_of(lambda r: Decoder(cfg, rngs=r))
  assert count(state) == DECODER_PARAMS[name]

  def logits(state, x):
    decoder = nnx.merge(graphdef, state)
    mask = jnp.ones((1, 1, 3, 3), bool)
    return decoder.logits(decoder(x, jnp.zeros((1, 3), jnp.int32), mask)[0])

  out = jax.eval_shape(logits, state, jax.ShapeDtypeStruct((1, 3, cfg.width), jnp.bfloat16))
  assert (out.shape, out.dtype) == ((1, 3, cfg.vocab_size), jnp.float32)


@pytest.mark.parametrize("name", TOWERS)
def test_vision_encoders_give_their_grid_of_tokens(name):
  cfg = TOWERS[name]
  graphdef, state = shapes_of(lambda r: make_vision(cfg, rngs=r))
  side = {
    "siglip-so400m-patch14-384": 27,
    "siglip-base-patch16-224": 14,
    "siglip-base-patch16-384": 24,
    "siglip-large-patch16-256": 16,
    "siglip-large-patch16-384": 24,
    "clip-vit-base-patch32": 7,
    "clip-vit-base-patch16": 14,
    "clip-vit-large-patch14": 16,
    "clip-vit-large-patch14-336": 24,
    "convnext-576": 18,
    "convnext-base-256": 8,
    "convnext-large-320": 10,
  }[name]
  frames = jax.ShapeDtypeStruct((2, cfg.image_size, cfg.image_size, 3), jnp.float32)
  out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, frames)
  assert out.shape == (2, side**2, cfg.width)


@pytest.mark.parametrize(
  ("name", "published"),
  [
    ("clip-vit-base-patch32", 87_456_000),
    ("clip-vit-large-patch14", 303_179_776),
    ("clip-vit-large-patch14-336", 303_179_776 + (24**2 - 16**2) * 1024),
    ("siglip-so400m-patch14-384", 428_225_600),
    ("convnext-base-256", 88_591_464),
    ("convnext-large-320", 197_767_336),
  ],
)
def test_vision_encoders_have_the_published_number_of_parameters(name, published):
  """The whole release: with the last block, the final norm and what is trained behind it."""
  cfg = TOWERS[name]
  if isinstance(cfg, ViTConfig):
    cfg = dataclasses.replace(cfg, select_layer=-1)
    behind = 2 * cfg.width
    if cfg.family == "siglip":
      behind += attention_pooling(cfg.width, cfg.mlp_width)
  else:
    behind = imagenet_head(cfg.width)
  _, state = shapes_of(lambda r: make_vision(cfg, rngs=r))
  assert count(state) + behind == published


def attention_pooling(width, mlp_width):
  """SigLIP's head: a learned query, attention, a norm and an MLP."""
  attention = 4 * (width + 1) * width
  mlp = (width + 1) * mlp_width + (mlp_width + 1) * width
  return width + attention + 2 * width + mlp


def imagenet_head(width):
  """Of the first release of each ConvNeXt: a norm and a classifier of 1,000 classes."""
  return 2 * width + (width + 1) * 1000


def test_the_largest_convnext_has_the_published_number_of_parameters():
  """timm tells 846.47 million for the one with a classifier of 1,000 classes."""
  cfg = TOWERS["convnext-576"]
  _, state = shapes_of(lambda r: make_vision(cfg, rngs=r))
  assert count(state) == 843_391_872
  assert round((count(state) + imagenet_head(cfg.width)) / 1e6, 2) == 846.47


# --- Whole models ---


def batch_shapes(cfg, frames, length=256):
  """A batch of one video."""
  size, fast = cfg.vision.image_size, 16
  ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return Batch(
    tokens=ints,
    kind=jax.ShapeDtypeStruct((1, length), jnp.int8),
    positions=ints,
    segments=ints,
    targets=ints,
    loss_weights=jax.ShapeDtypeStruct((1, length), jnp.float32),
    frames=jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8),
    frame_segments=jax.ShapeDtypeStruct((1, frames), jnp.int32),
    pooling=jax.ShapeDtypeStruct((1, fast, frames), jnp.float32),
    text_index=jax.ShapeDtypeStruct((1, 64), jnp.int32),
  )


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_runs_by_its_shapes(name):
  cfg = PRESETS[name]
  graphdef, state = graphdef_of(cfg), abstract_params(cfg)
  out = jax.eval_shape(
    lambda s, batch: nnx.merge(graphdef, s)(batch, dtype=jnp.bfloat16),
    state,
    batch_shapes(cfg, frames=64),
  )
  assert out.shape == (1, 256, cfg.decoder.width)
  assert match_preset(cfg) == name


def test_the_parameters_of_a_released_model_by_part():
  cfg = PRESETS["slowfast-qwen2-7b-convnext-576-64f"]
  D, N, K, H = 3584, 28, 4, 128
  adapter = (D + 1) * K * 2 * H + (N * H + 1) + 1
  assert num_params_by_part(cfg) == {
    "vision": 843_391_872,
    "projector": (3072 + 1) * D + (D + 1) * D,
    "decoder": 7_615_616_512,
    "adapters": 4 * adapter,
  }
  assert cfg.num_params == sum(num_params_by_part(cfg).values())
  assert num_params_by_part(dataclasses.replace(cfg, hybrid=None))["adapters"] == 0


@pytest.mark.parametrize(("frames", "strides"), [(64, (1, 4)), (96, (1, 6)), (128, (2, 4))])
def test_released_settings(frames, strides):
  cfg = PRESETS[f"slowfast-qwen2-7b-convnext-576-{frames}f"]
  assert cfg.hybrid_layers == (0, 8, 16, 24)
  assert (cfg.compressor.sampling_stride, cfg.compressor.temporal_stride) == strides
  assert (cfg.compressor.min_fast_frames, cfg.compressor.video_pooling_stride) == (16, 2)
  assert (cfg.hybrid.gate, cfg.hybrid.queries) == ("dynamic-tanh-warmup", "text-only")
  assert cfg.projector == "mlp2x_gelu"
  assert (cfg.vision.side // 2) ** 2 == 81


def test_a_changed_model_is_no_preset():
  cfg = PRESETS["demo"]
  assert match_preset(cfg) == "demo"
  other = dataclasses.replace(cfg.compressor, min_fast_frames=5)
  assert match_preset(dataclasses.replace(cfg, compressor=other)) is None


def test_presets_are_changed_field_by_field():
  name = "slowfast-qwen2-0.5b-convnext-576-64f"
  cfg = build_config(name, {"vision": {"depths": [1, 1], "widths": (8, 16)}, "hybrid": None})
  assert cfg.vision == ConvNeXtConfig(image_size=576, depths=(1, 1), widths=(8, 16))
  assert (cfg.hybrid, cfg.decoder) == (None, DECODERS["qwen2-0.5b"])
  with pytest.raises(UserError, match=r"model\.vision\.patch_size: no such field"):
    build_config(name, {"vision": {"patch_size": 14}})
