# SPDX-License-Identifier: Apache-2.0
"""Named models, and how a config file changes single fields of one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slowfast_jax.errors import UserError
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig

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
}


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
