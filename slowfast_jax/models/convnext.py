# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt (Liu et al., arXiv 2201.03545): four stages of depthwise convolutions and MLPs.

Semantics section 1.3. The output is what the last stage gives, without a final norm. Channels come
last everywhere, so a norm over channels is the plain layer norm.
"""

import dataclasses
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slowfast_jax.kernels.depthwise import depthwise
from slowfast_jax.models.layers import (
  LayerNorm,
  Projection,
  Rngs,
  add_param,
  make_param,
  stack,
  unstack,
)
from slowfast_jax.models.remat import PRODUCT, keep, remat
from slowfast_jax.models.vit import CLIP_MEAN, CLIP_STD
from slowfast_jax.sharding import constrain

STEM_STRIDE, DOWNSAMPLE_STRIDE = 4, 2
KERNEL_SIZE, MLP_RATIO = 7, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig:
  """Sizes of a ConvNeXt.

  Attributes:
    family: "convnext"; tells an encoder's config from the others where it is stored.
    depths: blocks of each stage.
    widths: channels of each stage.
  """

  family: Literal["convnext"] = "convnext"
  image_size: int
  depths: tuple[int, ...]
  widths: tuple[int, ...]
  norm_eps: float = 1e-5

  def __post_init__(self):
    if self.family != "convnext":
      raise ValueError(f"family must be 'convnext', got {self.family!r}.")
    for name in ("depths", "widths"):
      object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists.
    if len(self.depths) != len(self.widths) or not self.depths:
      raise ValueError(
        "depths and widths must have one number for each stage, "
        f"got {self.depths} and {self.widths}."
      )
    if min(*self.depths, *self.widths) < 1:
      raise ValueError(
        f"depths and widths must be at least 1, got {self.depths} and {self.widths}."
      )
    if self.side < 1:
      raise ValueError(
        f"image_size must be at least {self.stride}, the stride of {len(self.depths)} stages, "
        f"got {self.image_size}."
      )

  @property
  def stride(self) -> int:
    """Pixels from one token to the next."""
    return STEM_STRIDE * DOWNSAMPLE_STRIDE ** (len(self.depths) - 1)

  @property
  def width(self) -> int:
    return self.widths[-1]

  @property
  def side(self) -> int:
    return self.image_size // self.stride

  @property
  def tokens_per_frame(self) -> int:
    return self.side**2

  @property
  def pixel_mean(self) -> tuple[float, float, float]:
    return CLIP_MEAN

  @property
  def pixel_std(self) -> tuple[float, float, float]:
    return CLIP_STD


class DepthwiseConv(nnx.Module):
  """Each channel convolved with its own square kernel; the grid keeps its size."""

  def __init__(self, size: int, width: int, *, rngs: Rngs):
    init = nnx.initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2
    )
    # Small enough to be on every device. Were its channels spread, the compiler would spread those
    # of all frames with them, and have all frames of the batch on every device in between.
    self.kernel = make_param(init, rngs, (size, size, width), (None, None, "norm"))
    self.bias = make_param(nnx.initializers.zeros, rngs, (width,), ("norm",))

  def __call__(self, x: Float[Array, "B y x E"]) -> Float[Array, "B y x E"]:
    return add_param(keep(depthwise(x, self.kernel[...]), PRODUCT), self.bias)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """`x * Phi(x)`, in float32 and by erf: erfc, of which JAX makes it, is longer on TPU."""
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class ConvNeXtBlock(nnx.Module):
  """7x7 depthwise convolution, norm, MLP, and a learned scale of what the block adds."""

  def __init__(self, width: int, eps: float, *, rngs: Rngs):
    E, M = width, MLP_RATIO * width
    self.depthwise = DepthwiseConv(KERNEL_SIZE, E, rngs=rngs)
    self.norm = LayerNorm(E, eps=eps, rngs=rngs)
    self.fc1 = Projection("...E,EM->...M", (E, M), ("embed", "mlp"), bias=True, rngs=rngs)
    self.fc2 = Projection("...M,ME->...E", (M, E), ("mlp", "embed"), bias=True, rngs=rngs)
    # As published: a fresh block adds almost nothing.
    self.layer_scale = make_param(nnx.initializers.constant(1e-6), rngs, (E,), ("norm",))

  def __call__(self, x: Float[Array, "B y x E"]) -> Float[Array, "B y x E"]:
    x = constrain(x, "frames")
    y = self.fc1(self.norm(self.depthwise(x)))
    # Written down: fused into fc2, the activation would be computed again for each of its tiles.
    y = self.fc2(jax.lax.optimization_barrier(gelu(y)))
    return x + (self.layer_scale[...] * y).astype(x.dtype)


class Stem(nnx.Module):
  """Squares of 4 x 4 pixels to channels, and a norm."""

  def __init__(self, cfg: ConvNeXtConfig, *, rngs: Rngs):
    self.conv = square_projection(STEM_STRIDE, 3, cfg.widths[0], rngs=rngs)
    self.norm = LayerNorm(cfg.widths[0], eps=cfg.norm_eps, rngs=rngs)

  def __call__(self, frames: Float[Array, "B h w C"]) -> Float[Array, "B y x E"]:
    return self.norm(self.conv(squares(frames, STEM_STRIDE)))


class Stage(nnx.Module):
  """Halves the grid, unless it is the first stage, and runs its blocks."""

  def __init__(self, cfg: ConvNeXtConfig, index: int, *, rngs: Rngs):
    width, before = cfg.widths[index], cfg.widths[max(index - 1, 0)]
    halves = index > 0
    self.downsample_norm = LayerNorm(before, eps=cfg.norm_eps, rngs=rngs) if halves else None
    self.downsample = (
      square_projection(DOWNSAMPLE_STRIDE, before, width, rngs=rngs) if halves else None
    )
    self.depth = cfg.depths[index]
    self.blocks = stack(lambda r: ConvNeXtBlock(width, cfg.norm_eps, rngs=r), self.depth, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B y x E"], policy: str = "none"
  ) -> Float[Array, "B y2 x2 E2"]:
    if self.downsample_norm is not None and self.downsample is not None:
      x = self.downsample(squares(self.downsample_norm(x), DOWNSAMPLE_STRIDE))
    graphdef, states = unstack(self.blocks, 0, self.depth)
    block = remat(lambda x, state: (nnx.merge(graphdef, state)(x), None), policy)
    x, _ = jax.lax.scan(block, x, states)
    return x


class ConvNeXt(nnx.Module):
  """Normalised frames to tokens [B, P, E], row by row of the last stage's grid."""

  def __init__(self, cfg: ConvNeXtConfig, *, rngs: Rngs):
    self.cfg = cfg
    self.stem = Stem(cfg, rngs=rngs)
    self.stages = nnx.List(Stage(cfg, i, rngs=rngs) for i in range(len(cfg.depths)))

  def __call__(
    self, frames: Float[Array, "B h w C"], *, policy: str = "none"
  ) -> Float[Array, "B P E"]:
    """Tokens of frames; `policy` is what the backward pass keeps of each block."""
    x = self.stem(frames)
    for stage in self.stages:
      x = stage(x, policy)
    return einops.rearrange(x, "B y x E -> B (y x) E")


def square_projection(size: int, in_width: int, out_width: int, *, rngs: Rngs) -> Projection:
  """A convolution whose stride is its kernel's size: one linear map of every square."""
  return Projection(
    "...hwC,hwCE->...E",
    (size, size, in_width, out_width),
    (None, None, None, "embed"),
    bias=True,
    rngs=rngs,
  )


def squares(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B y x size size C"]:
  """The grid cut into squares; rows and columns that fill none are left out."""
  rows, columns = x.shape[1] // size, x.shape[2] // size
  x = x[:, : rows * size, : columns * size]
  return einops.rearrange(x, "B (y h) (x w) C -> B y x h w C", h=size, w=size)
