# SPDX-License-Identifier: Apache-2.0
"""The specification of slow cross-attention: plain float32 jnp with the public signature."""

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def visibility(
  num_queries: int,
  num_keys: int,
  kv_lengths: Int[Array, " B"] | None,
  q_segments: Int[Array, "B T"] | None,
  kv_segments: Int[Array, "B S"] | None,
):
  """Which key each query sees, bool [B or 1, T, S]."""
  visible = jnp.ones((1, num_queries, num_keys), bool)
  if kv_lengths is not None:
    visible &= jnp.arange(num_keys) < kv_lengths[:, None, None]
  if q_segments is not None and kv_segments is not None:
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    visible &= same & (q_segments[:, :, None] > 0)
  return visible


def cross_attention_reference(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Attention output and log-sum-exp; a query that sees no key gets 0 and -inf."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  q_BTKGH = einops.rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2]).astype(jnp.float32)
  logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH * scale, k.astype(jnp.float32))
  visible = visibility(q.shape[1], k.shape[1], kv_lengths, q_segments, kv_segments)
  visible = visible[:, None, None]
  logits_BKGTS = jnp.where(visible, logits_BKGTS, -jnp.inf)
  peak = jnp.max(logits_BKGTS, axis=-1, keepdims=True, initial=-jnp.inf)
  # A row without keys has peak -inf; shifting by 0 there keeps exp(-inf - 0) = 0 and no NaN.
  peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0.0, peak))
  weights = jnp.exp(logits_BKGTS - peak)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  # Normalise after the mask so that the gradient of an empty row is 0 and not NaN.
  weights = weights / jnp.where(total == 0, 1.0, total)
  out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(jnp.float32))
  seen = total[..., 0] > 0
  lse = jnp.where(seen, jnp.log(jnp.where(seen, total[..., 0], 1.0)) + peak[..., 0], -jnp.inf)
  out = einops.rearrange(out, "B T K G H -> B T (K G) H").astype(q.dtype)
  return out, einops.rearrange(lse, "B K G T -> B T (K G)")
