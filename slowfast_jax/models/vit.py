# SPDX-License-Identifier: Apache-2.0
"""SigLIP and CLIP vision transformers: one pre-norm encoder with two sets of details.

Semantics section 1.3. `select_layer` counts as Hugging Face's hidden states do: -1 is the output
of the last block, -2 the input of the last block; no final norm is applied.
"""

import dataclasses
from typing import Literal

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slowfast_jax.kernels.self_attention import padded_head, padded_length, self_attention
from slowfast_jax.models.layers import (
  LayerNorm,
  Projection,
  Rngs,
  add_param,
  linear,
  make_param,
  stack,
  unstack,
)
from slowfast_jax.models.remat import keep, remat
from slowfast_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Sizes of a vision transformer.

  Attributes:
    family: "siglip" (bias on patches, tanh GELU) or "clip" (class token, input norm, quick GELU).
    select_layer: which hidden state is the output, negative from the end.
  """

  family: Literal["siglip", "clip"]
  image_size: int
  patch_size: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  select_layer: int = -2
  norm_eps: float = 1e-6

  def __post_init__(self):
    if self.family not in ("siglip", "clip"):
      raise ValueError(f"family must be 'siglip' or 'clip', got {self.family!r}.")
    for name in ("patch_size", "width", "num_layers", "num_heads", "mlp_width"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
    if self.image_size < self.patch_size:
      raise ValueError(
        f"image_size must be at least patch_size, got {self.image_size} and {self.patch_size}."
      )
    if self.width % self.num_heads:
      raise ValueError(
        f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}."
      )
    if not 0 <= self.num_blocks <= self.num_layers:
      raise ValueError(
        f"select_layer {self.select_layer} does not exist with {self.num_layers} layers."
      )

  @property
  def num_blocks(self) -> int:
    """Blocks that run to reach the selected hidden state."""
    return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

  @property
  def side(self) -> int:
    return self.image_size // self.patch_size

  @property
  def tokens_per_frame(self) -> int:
    return self.side**2

  @property
  def pixel_mean(self) -> tuple[float, float, float]:
    return (0.5, 0.5, 0.5) if self.family == "siglip" else CLIP_MEAN

  @property
  def pixel_std(self) -> tuple[float, float, float]:
    return (0.5, 0.5, 0.5) if self.family == "siglip" else CLIP_STD


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ViTBlock(nnx.Module):
  """Self-attention over the patches of one frame, then an MLP."""

  def __init__(self, cfg: ViTConfig, *, rngs: Rngs):
    E, N, M = cfg.width, cfg.num_heads, cfg.mlp_width
    H = E // N
    # As in the decoder: the branches together add one variance.
    gain = (2 * cfg.num_layers) ** -0.5
    self.family = cfg.family
    self.norm1 = LayerNorm(E, eps=cfg.norm_eps, rngs=rngs)
    axes = ("embed", "heads", None)
    self.q = Projection("...E,ENH->...NH", (E, N, H), axes, bias=True, rngs=rngs)
    self.k = Projection("...E,ENH->...NH", (E, N, H), axes, bias=True, rngs=rngs)
    self.v = Projection("...E,ENH->...NH", (E, N, H), axes, bias=True, rngs=rngs)
    self.out = Projection(
      "...NH,NHE->...E", (N, H, E), ("heads", None, "embed"), bias=True, gain=gain, rngs=rngs
    )
    self.norm2 = LayerNorm(E, eps=cfg.norm_eps, rngs=rngs)
    self.fc1 = Projection("...E,EM->...M", (E, M), ("embed", "mlp"), bias=True, rngs=rngs)
    self.fc2 = Projection(
      "...M,ME->...E", (M, E), ("mlp", "embed"), bias=True, gain=gain, rngs=rngs
    )

  def __call__(self, x: Float[Array, "B P E"], valid: int) -> Float[Array, "B P E"]:
    """Of `valid` tokens, and padding behind them that no token sees."""
    x = constrain(x, "frames")
    y = self.norm1(x)
    q, k = keep(self.q(y), "queries"), keep(self.k(y), "keys")
    width = padded_head(q.shape[-1])
    v = keep(_with_heads_of(width, self.v, y), "values")
    o = self_attention(q, k, v, rows="frames", valid=valid)
    x = x + _with_heads_of(width, self.out, o)
    # Written down: fused into fc2, the activation would be computed again for each of its tiles.
    hidden = jax.lax.optimization_barrier(self._gelu(self.fc1(self.norm2(x))))
    return x + self.fc2(hidden)

  def _gelu(self, x):
    if self.family == "siglip":
      return jax.nn.gelu(x, approximate=True)
    return x * jax.nn.sigmoid(1.702 * x)


def _with_heads_of(
  size: int, projection: Projection, x: Float[Array, "..."]
) -> Float[Array, "..."]:
  """A projection to heads or from them, with zeros behind the elements that they have."""
  inputs, out = projection.equation.split("->")

  def padded(weights: Array, letters: str) -> Array:
    axis = letters.index("H")
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(weights.shape)]
    return jnp.pad(weights, widths)

  y = linear(projection.equation, x, padded(projection.kernel[...], inputs.split(",")[1]))
  if projection.bias is None:
    return y
  bias = projection.bias[...]
  return add_param(y, padded(bias, out.strip(".")) if "H" in out else bias)


class ViT(nnx.Module):
  """Normalised frames to patch tokens [B, P, E], class token dropped."""

  def __init__(self, cfg: ViTConfig, *, rngs: Rngs):
    self.cfg = cfg
    E, p = cfg.width, cfg.patch_size
    siglip = cfg.family == "siglip"
    self.patch = Projection(
      "...hwC,hwCE->...E", (p, p, 3, E), (None, None, None, "embed"), bias=siglip, rngs=rngs
    )
    # Louder than a patch: slow tokens have no other sign of where in the picture they are, and a
    # faint one takes a fresh model ten times longer to find.
    init = nnx.initializers.normal(4.0)
    num_positions = cfg.tokens_per_frame + (0 if siglip else 1)
    self.position = make_param(init, rngs, (num_positions, E), (None, "embed"))
    self.class_token = None if siglip else make_param(init, rngs, (E,), ("embed",))
    self.pre_norm = None if siglip else LayerNorm(E, eps=cfg.norm_eps, rngs=rngs)
    # Blocks behind the selected hidden state would never run, so they do not exist.
    self.blocks = stack(lambda r: ViTBlock(cfg, rngs=r), cfg.num_blocks, rngs=rngs)

  def __call__(
    self, frames: Float[Array, "B h w C"], *, policy: str = "none"
  ) -> Float[Array, "B P E"]:
    """Tokens of frames; `policy` is what the backward pass keeps of each block."""
    side, p = self.cfg.side, self.cfg.patch_size
    patches = einops.rearrange(
      frames[:, : side * p, : side * p], "B (y h) (x w) C -> B (y x) h w C", h=p, w=p
    )
    x = self.patch(patches)
    if self.class_token is not None:
      start = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
      x = jnp.concatenate([start, x], axis=1)
    x = add_param(x, self.position)
    if self.pre_norm is not None:
      x = self.pre_norm(x)
    graphdef, states = unstack(self.blocks, 0, self.cfg.num_blocks)
    valid = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, padded_length(valid) - valid), (0, 0)))
    block = remat(lambda x, state: (nnx.merge(graphdef, state)(x, valid), None), policy)
    x, _ = jax.lax.scan(block, x, states)
    x = x[:, :valid]
    return x if self.class_token is None else x[:, 1:]
