# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in the half-split layout of Qwen and Llama."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LlamaRopeScaling:
  """Llama 3.1's frequency scaling: long wavelengths are stretched, short ones kept."""

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(
        "rope scaling: high_freq_factor must be above low_freq_factor, "
        f"got {self.high_freq_factor} and {self.low_freq_factor}."
      )


def frequencies(
  head_dim: int, theta: float, scaling: LlamaRopeScaling | None
) -> Float[np.ndarray, " half"]:
  """Radians per position of each pair of dimensions."""
  freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return freq.astype(np.float32)
  turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
  span = scaling.high_freq_factor - scaling.low_freq_factor
  smooth = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
  return ((1 - smooth) * freq / scaling.factor + smooth * freq).astype(np.float32)


def rope_table(
  positions: Int[Array, "B T"], freq: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Cosines and sines of every position, computed once and shared by all layers."""
  # float32: bf16 rounds position 257 to 256 and rotary embeddings break.
  angles = positions[:, :, None, None].astype(jnp.float32) * freq
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "B T N H"],
  table: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
) -> Float[Array, "B T N H"]:
  """Applies the rotation; dimension i is paired with i + H/2."""
  cos, sin = table
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
