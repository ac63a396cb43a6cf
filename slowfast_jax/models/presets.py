# SPDX-License-Identifier: Apache-2.0
"""Named models, and how a config file changes single fields of one.

Sizes are those of the published configs; `tests/models/test_presets.py` counts the parameters.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from slowfast_jax.errors import UserError
from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig
from slowfast_jax.models.vision import VisionConfig
from slowfast_jax.models.vit import ViTConfig


def _qwen(
  width: int, num_layers: int, heads: tuple[int, int], mlp_width: int, **changes: Any
) -> DecoderConfig:
  """A Qwen2 or Qwen2.5; heads of queries and of keys. Changes make it a Qwen3."""
  sizes: dict[str, Any] = {"vocab_size": 151936, "head_dim": width // heads[0]} | changes
  return DecoderConfig(
    width=width,
    num_layers=num_layers,
    num_heads=heads[0],
    num_kv_heads=heads[1],
    mlp_width=mlp_width,
    **sizes,
  )


_TIED: dict[str, Any] = {"tie_embeddings": True}
_QWEN3: dict[str, Any] = {"head_dim": 128, "qkv_bias": False, "qk_norm": True}


def _llama(
  width: int, num_layers: int, num_heads: int, mlp_width: int, *, factor: float, tied: bool
) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=128256,
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=8,
    head_dim=width // num_heads,
    mlp_width=mlp_width,
    rope_theta=5e5,
    rope_scaling=LlamaRopeScaling(factor=factor),
    norm_eps=1e-5,
    qkv_bias=False,
    tie_embeddings=tied,
  )


# Language models as published, by the names of their releases.
DECODERS: dict[str, DecoderConfig] = {
  "qwen2-0.5b": _qwen(896, 24, (14, 2), 4864, **_TIED),
  "qwen2-1.5b": _qwen(1536, 28, (12, 2), 8960, **_TIED),
  "qwen2-7b": _qwen(3584, 28, (28, 4), 18944, vocab_size=152064),
  "qwen2.5-0.5b": _qwen(896, 24, (14, 2), 4864, **_TIED),
  "qwen2.5-1.5b": _qwen(1536, 28, (12, 2), 8960, **_TIED),
  "qwen2.5-3b": _qwen(2048, 36, (16, 2), 11008, **_TIED),
  "qwen2.5-7b": _qwen(3584, 28, (28, 4), 18944, vocab_size=152064),
  # The base model's; the instruction-tuned one has norm_eps 1e-6.
  "qwen2.5-14b": _qwen(5120, 48, (40, 8), 13824, vocab_size=152064, norm_eps=1e-5),
  "qwen3-0.6b": _qwen(1024, 28, (16, 8), 3072, **_QWEN3, **_TIED),
  "qwen3-1.7b": _qwen(2048, 28, (16, 8), 6144, **_QWEN3, **_TIED),
  "qwen3-4b": _qwen(2560, 36, (32, 8), 9728, **_QWEN3, **_TIED),
  "qwen3-8b": _qwen(4096, 36, (32, 8), 12288, **_QWEN3),
  "llama-3.1-8b": _llama(4096, 32, 32, 14336, factor=8.0, tied=False),
  "llama-3.2-1b": _llama(2048, 16, 32, 8192, factor=32.0, tied=True),
  "llama-3.2-3b": _llama(3072, 28, 24, 8192, factor=32.0, tied=True),
}


def _vit(
  family: Literal["siglip", "clip"], size: str, image_size: int, patch_size: int
) -> ViTConfig:
  width, num_layers, num_heads, mlp_width = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
  }[size]
  return ViTConfig(
    family=family,
    image_size=image_size,
    patch_size=patch_size,
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    mlp_width=mlp_width,
    select_layer=-2,
    norm_eps=1e-6 if family == "siglip" else 1e-5,
  )


def _convnext(
  image_size: int, depths: tuple[int, ...], width: int, *, norm_eps: float
) -> ConvNeXtConfig:
  """Every stage doubles the first one's width."""
  widths = tuple(width * 2**stage for stage in range(len(depths)))
  return ConvNeXtConfig(image_size=image_size, depths=depths, widths=widths, norm_eps=norm_eps)


# Vision encoders by the names of their releases. "convnext-576" is how the released models call the
# XXL that OpenCLIP trained on LAION; the other two are its base_w and large_d.
TOWERS: dict[str, VisionConfig] = {
  "siglip-so400m-patch14-384": _vit("siglip", "so400m", 384, 14),
  "siglip-base-patch16-224": _vit("siglip", "base", 224, 16),
  "siglip-base-patch16-384": _vit("siglip", "base", 384, 16),
  "siglip-large-patch16-256": _vit("siglip", "large", 256, 16),
  "siglip-large-patch16-384": _vit("siglip", "large", 384, 16),
  "clip-vit-base-patch32": _vit("clip", "base", 224, 32),
  "clip-vit-base-patch16": _vit("clip", "base", 224, 16),
  "clip-vit-large-patch14": _vit("clip", "large", 224, 14),
  "clip-vit-large-patch14-336": _vit("clip", "large", 336, 14),
  "convnext-576": _convnext(576, (3, 4, 30, 3), 384, norm_eps=1e-5),
  "convnext-base-256": _convnext(256, (3, 3, 27, 3), 128, norm_eps=1e-6),
  "convnext-large-320": _convnext(320, (3, 3, 27, 3), 192, norm_eps=1e-6),
}

# Frames of a video -> (sampling stride, temporal stride), semantics section 2.
_STRIDES = {64: (1, 4), 96: (1, 6), 128: (2, 4)}


def _released(decoder: str, tower: str, num_frames: int) -> SlowFastConfig:
  """A model with the settings of the released ones."""
  sampling_stride, temporal_stride = _STRIDES[num_frames]
  return SlowFastConfig(
    vision=TOWERS[tower],
    decoder=DECODERS[decoder],
    compressor=CompressorConfig(
      video_pooling_stride=2,
      sampling_stride=sampling_stride,
      temporal_stride=temporal_stride,
      spatial_stride=1,
      min_fast_frames=16,
    ),
    hybrid=HybridConfig(
      every=8, min_depth=0, max_depth=28, gate="dynamic-tanh-warmup", queries="text-only"
    ),
    projector="mlp2x_gelu",
  )


PRESETS: dict[str, SlowFastConfig] = {
  # Small enough to learn from nothing on two CPU cores in minutes.
  "demo": SlowFastConfig(
    vision=ViTConfig(
      family="siglip",
      image_size=48,
      patch_size=24,
      width=64,
      num_layers=2,
      num_heads=4,
      mlp_width=128,
      select_layer=-1,
    ),
    decoder=DecoderConfig(
      vocab_size=448,
      width=96,
      num_layers=3,
      num_heads=2,
      num_kv_heads=1,
      head_dim=48,
      mlp_width=192,
      rope_theta=1e6,
    ),
    compressor=CompressorConfig(
      sampling_stride=8, temporal_stride=1, spatial_stride=2, min_fast_frames=4
    ),
    hybrid=HybridConfig(every=1, min_depth=0, max_depth=2),
  ),
  **{
    f"slowfast-{decoder}-{tower}-{num_frames}f": _released(decoder, tower, num_frames)
    for decoder in ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b")
    for tower in ("convnext-576", "siglip-so400m-patch14-384")
    for num_frames in _STRIDES
  },
}


def match_preset(cfg: SlowFastConfig) -> str | None:
  """The name of the preset that has exactly these sizes and settings."""
  return next((name for name, preset in PRESETS.items() if preset == cfg), None)


def build_config(preset: str, changes: Mapping[str, Any]) -> SlowFastConfig:
  """A preset with single fields changed, e.g. `{"decoder": {"vocab_size": 300}, "hybrid": None}`.

  Raises:
    UserError: an unknown preset or field, or values that do not belong together.
  """
  if preset not in PRESETS:
    raise UserError(f"model.preset: unknown preset {preset!r}; choose from {sorted(PRESETS)}.")
  return _replace(PRESETS[preset], changes, "model")


def _replace(config: Any, changes: Mapping[str, Any], path: str) -> Any:
  fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  new = {}
  for name, value in changes.items():
    if name not in fields:
      raise UserError(f"{path}.{name}: no such field; {path} has {sorted(fields)}.")
    nested = isinstance(value, Mapping) and dataclasses.is_dataclass(fields[name])
    new[name] = _replace(fields[name], value, f"{path}.{name}") if nested else value
  try:
    return dataclasses.replace(config, **new)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
