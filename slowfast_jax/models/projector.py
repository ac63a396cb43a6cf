# SPDX-License-Identifier: Apache-2.0
"""The projector: encoder width to decoder width (semantics section 1.4)."""

import re

import jax
from flax import nnx
from jaxtyping import Array, Float

from slowfast_jax.models.layers import TOKEN_SCALE, Projection, Rngs


def projector_depth(kind: str) -> int:
  """Number of linear layers of "linear" or "mlp{n}x_gelu".

  Raises:
    ValueError: another kind.
  """
  if kind == "linear":
    return 1
  match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
  if match is None:
    raise ValueError(f"projector must be 'linear' or 'mlp<n>x_gelu', got {kind!r}.")
  return int(match[1])


class Projector(nnx.Module):
  """Linear, then (GELU, Linear) n - 1 times; GELU is the exact one."""

  def __init__(self, kind: str, in_width: int, out_width: int, *, rngs: Rngs):
    widths = [in_width] + [out_width] * projector_depth(kind)
    # Visual tokens enter the decoder at the size of its words.
    gains = [1.0] * (len(widths) - 2) + [TOKEN_SCALE]
    self.layers = nnx.List(
      Projection("...E,ED->...D", (e, d), (None, "embed"), bias=True, gain=gain, rngs=rngs)
      for e, d, gain in zip(widths, widths[1:], gains)
    )

  def __call__(self, x: Float[Array, "*L E"]) -> Float[Array, "*L D"]:
    x = self.layers[0](x)
    for layer in self.layers[1:]:
      x = layer(jax.nn.gelu(x, approximate=False))
    return x
