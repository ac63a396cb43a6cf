# SPDX-License-Identifier: Apache-2.0
"""Products of one query with all keys and values where they lie: a processor's decode step.

A product of each head with its keys alone is one over [B, K] of matrices [S, H], which lie strided
in [B, S, K, H]; XLA for CPU copies keys and values first. Here each key is multiplied whole, with
queries that are zero at the other heads: K times the multiplications, at three times the speed.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# More, and multiplying by zero takes longer than the copy.
LARGEST_KV_HEADS = 4


def applies(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
  """Whether this is the fast way for queries [B, T, N, H] and keys [B, S, K, H]."""
  # Of several rows the copy is the faster one: XLA has no good product of this form for them.
  return q_shape[:2] == (1, 1) and k_shape[2] <= LARGEST_KV_HEADS


def attention(
  q: Float[Array, "B 1 N H"],
  k: Float[Array, "B L K H"],
  v: Float[Array, "B L K H"],
  mask: Bool[Array, "#B 1 1 L"],
) -> Float[Array, "B 1 N H"]:
  """Attention with grouped heads, logits scaled by 1 / sqrt(H), in q's dtype."""

  def dot(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a, b.astype(a.dtype), preferred_element_type=jnp.float32)

  q_BKGTH = einops.rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
  logits = scores(q_BKGTH, k, dot) * q.shape[-1] ** -0.5
  logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
  out = read(jax.nn.softmax(logits, axis=-1).astype(q.dtype), v, dot)
  return einops.rearrange(out, "B K G T H -> B T (K G) H").astype(q.dtype)


def scores(
  q: Float[Array, "B K G 1 H"], k: Float[Array, "B S K H"], dot: Callable[..., Array]
) -> Float[Array, "B K G 1 S"]:
  """Products of each query with the keys of its head, by the einsum `dot`."""
  B, K, G, _, H = q.shape
  columns = jnp.einsum("BKGH,KJ->BJHKG", q[:, :, :, 0], jnp.eye(K, dtype=q.dtype))
  found = dot("BSC,BCR->BSR", _whole(k), columns.reshape(B, K * H, K * G))
  return jnp.moveaxis(found, 1, 2).reshape(B, K, G, 1, k.shape[1])


def read(
  weights: Float[Array, "B K G 1 S"], v: Float[Array, "B S K H"], dot: Callable[..., Array]
) -> Float[Array, "B K G 1 H"]:
  """Sums of the values of each query's head, by the einsum `dot`."""
  B, K, G, _, S = weights.shape
  found = dot("BRS,BSC->BRC", weights.reshape(B, K * G, S), _whole(v))
  own = jnp.eye(K, dtype=bool)[:, None, :, None]
  return jnp.where(own, found.reshape(B, K, G, K, -1), 0).sum(axis=3)[:, :, :, None]


def _whole(x: Float[Array, "B S K H"]) -> Float[Array, "B S C"]:
  return x.reshape(*x.shape[:2], -1)
