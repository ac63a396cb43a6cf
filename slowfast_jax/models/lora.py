# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of the decoder's projections (LoRA, Hu et al., arXiv 2106.09685, section 4.1).

A projection with kernel W computes `W x + alpha / rank * B (A x)`; W stays as it is, A and B learn.
B starts at zero, so a fresh adapter changes nothing. Adapters are for training alone: an export has
`W + alpha / rank * B A` in W's place, and whoever opens it knows of no adapter.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slowfast_jax.models.decoder import DecoderLayer
from slowfast_jax.models.layers import Projection, Rngs, linear, stack

LORA = ".lora."  # In the dotted names of adapters' parameters, and in no others.
PROJECTIONS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which projections of every decoder layer have adapters, and of what size.

  Attributes:
    rank: of the product B A.
    alpha: the product is scaled by alpha / rank.
    modules: names of projections, of PROJECTIONS.
  """

  rank: int
  alpha: float
  modules: tuple[str, ...] = PROJECTIONS

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"rank must be at least 1, got {self.rank}.")
    if self.alpha <= 0:
      raise ValueError(f"alpha must be above 0, got {self.alpha}.")
    unknown = [name for name in self.modules if name not in PROJECTIONS]
    if unknown or not self.modules:
      raise ValueError(f"modules must be some of {PROJECTIONS}, got {tuple(self.modules)}.")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


class Lora(nnx.LoRA):
  """The adapter of one projection: parameters and their start are Flax's.

  The products are this package's own, so that gradients are sums in float32, see `linear`.
  """

  def __init__(self, cfg: LoraConfig, kernel: nnx.Param, shape: tuple[int, ...], *, rngs: Rngs):
    """
    Args:
      cfg: its size.
      kernel: of the projection, perhaps of all layers; tells the names of its axes.
      shape: of the kernel of one layer.
      rngs: for A.
    """
    metadata = kernel.get_metadata()
    count, axes = metadata["inputs"], metadata["axes"][-len(shape) :]
    super().__init__(
      math.prod(shape[:count]),
      cfg.rank,
      math.prod(shape[count:]),
      # Several axes are one here, and its name is that of the first, by which they are spread.
      a_metadata={"axes": (axes[0], _rank_beside(axes[0])), "inputs": 1},
      b_metadata={"axes": (_rank_beside(axes[count]), axes[count]), "inputs": 1},
      rngs=cast(nnx.Rngs, rngs),
    )
    self.num_inputs, self.outputs, self.scale = count, tuple(shape[count:]), cfg.scale

  def change(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What is added to the projection of x."""
    rows = x.shape[: x.ndim - self.num_inputs]
    inner = linear("...i,ir->...r", x.reshape(*rows, self.in_features), self.lora_a[...])
    outer = linear("...r,ro->...o", inner, self.lora_b[...])
    return self.scale * outer.reshape(*rows, *self.outputs)


def _rank_beside(name: str | None) -> str | None:
  """What the axis of the rank is called: adapters are spread as far as kernels are."""
  return None if name == "embed" else "embed"


class AdaptedProjection(Projection):
  """A projection and its adapter; the projection's parameters keep their names."""

  def __init__(self, base: Projection, lora: Lora):
    self.equation, self.kernel, self.bias = base.equation, base.kernel, base.bias
    self.lora = lora

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return super().__call__(x) + self.lora.change(x)


def add_lora(layers: DecoderLayer, cfg: LoraConfig, *, rngs: Rngs) -> None:
  """Gives the projections that `cfg` names an adapter each, in all layers of a stack."""
  for name in cfg.modules:
    parent = layers.attention if hasattr(layers.attention, name) else layers.mlp
    base: Projection = getattr(parent, name)
    count, *shape = base.kernel.shape

    def one(rngs: Rngs, kernel=base.kernel, shape=tuple(shape)) -> Lora:
      return Lora(cfg, kernel, shape, rngs=rngs)

    setattr(parent, name, AdaptedProjection(base, stack(one, count, rngs=rngs)))


def merge_lora(params: Mapping[str, Array], cfg: LoraConfig) -> dict[str, Array]:
  """Every adapter's product added to its kernel.

  Args:
    params: of a model with adapters, by dotted name, on their devices.
    cfg: of the adapters.

  Returns:
    The parameters of the same model without adapters.
  """
  merged = {name: x for name, x in params.items() if LORA not in name}
  for name, a in params.items():
    if name.endswith(f"{LORA}lora_a"):
      kernel = name.split(LORA)[0] + ".kernel"
      b = params[name.removesuffix("a") + "b"]
      merged[kernel] = _add_product(merged[kernel], a, b, cfg.scale, merged[kernel].sharding)
  return merged


@functools.partial(jax.jit, static_argnames=("scale", "place"))
def _add_product(kernel: Array, a: Array, b: Array, scale: float, place: Any) -> Array:
  product = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
  return jax.lax.with_sharding_constraint(kernel + scale * product.reshape(kernel.shape), place)
