# SPDX-License-Identifier: Apache-2.0
"""The vision encoders that a model may have: one of two transformers, or a ConvNeXt.

Each maps normalised frames [B, h, w, C] to tokens [B, P, E], and its config knows the image size,
the grid of tokens (`side`), their `width`, and how pixels are normalised.
"""

from slowfast_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from slowfast_jax.models.layers import Rngs
from slowfast_jax.models.vit import ViT, ViTConfig

VisionConfig = ViTConfig | ConvNeXtConfig


def make_vision(cfg: VisionConfig, *, rngs: Rngs) -> ViT | ConvNeXt:
  """A fresh encoder of the config's family."""
  return ConvNeXt(cfg, rngs=rngs) if isinstance(cfg, ConvNeXtConfig) else ViT(cfg, rngs=rngs)
