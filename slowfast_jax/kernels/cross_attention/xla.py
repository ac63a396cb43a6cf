# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention in plain XLA, block by block over the slow tokens.

For CPU, and wherever no kernel fits. No score outlives its block, so memory is linear in the
number of slow tokens, forward and backward: only the output and its log-sum-exp are kept, and the
backward pass computes the probabilities of a block anew. Keys that fit in one block are attended to
at once, without a loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels import one_query
from slowfast_jax.kernels.cross_attention.reference import visibility

# Scores of a block, over batch, heads and queries: small enough for a processor's cache to be of
# some use, large enough that the loop itself costs nothing.
BLOCK_SCORES = 1 << 20
MIN_BLOCK = 512

# kv_lengths, q_segments, kv_segments, as in `cross_attention`.
Masks = tuple[
  Int[Array, " B"] | None,
  Int[Array, "B T"] | None,
  Int[Array, "B S"] | None,
]


def cross_attention_xla(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
  block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Attention output and log-sum-exp; arguments as in `cross_attention`.

  Args:
    q, k, v: queries, keys and values. Statistics and sums are float32 whatever their dtype.
    kv_lengths: valid prefix of S.
    q_segments: packing id of each query.
    kv_segments: packing id of each key.
    scale: factor on the logits, 1 / sqrt(H) where absent.
    block: slow tokens that are attended to at a time; chosen by the shapes where absent.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return _attention(q, k, v, (kv_lengths, q_segments, kv_segments), scale, block)


def block_size(q_shape: tuple[int, ...]) -> int:
  """Slow tokens of a block: fewer, the more queries there are."""
  B, T, N, _ = q_shape
  return max(MIN_BLOCK, BLOCK_SCORES // max(1, B * T * N) // MIN_BLOCK * MIN_BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, masks, scale, block):
  return forward(q, k, v, masks, scale, block)


def _attention_forward(q, k, v, masks, scale, block):
  out, lse = forward(q, k, v, masks, scale, block)
  return (out, lse), (q, k, v, masks, out, lse)


def _attention_backward(scale, block, saved, cotangents):
  q, k, v, masks, out, lse = saved
  d_out, d_lse = cotangents
  return (*backward(q, k, v, masks, out, lse, d_out, d_lse, scale, block), None)


_attention.defvjp(_attention_forward, _attention_backward)


def forward(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  masks: Masks,
  scale: float,
  block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Output and log-sum-exp, by an online softmax over blocks of keys."""
  dot, q_BKGTH = _dot(q, k, v), _fold(q, k.shape[2])
  score, read = _products(q.shape, k.shape, dot)

  def step(state, start, size):
    peak, total, out = state
    logits = _logits(q_BKGTH, k, masks, scale, start, size, score)
    higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
    # Of a row that has seen no key yet: shifting by 0 keeps exp(-inf - 0) = 0 and makes no NaN.
    shift = jnp.where(jnp.isneginf(higher), 0.0, higher)
    weights = jnp.exp(logits - shift[..., None])
    keep = jnp.exp(peak - shift)
    total = keep * total + jnp.sum(weights, axis=-1)
    return higher, total, keep[..., None] * out + read(weights, _cut(v, start, size))

  shape = q_BKGTH.shape[:-1]
  start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q_BKGTH.shape)
  peak, total, out = _over_blocks(step, start, k.shape[1], block or block_size(q.shape))
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  lse = jnp.where(seen, jnp.log(total) + peak, -jnp.inf)
  return _unfold(out / total[..., None]).astype(q.dtype), _unfold(lse[..., None])[..., 0]


def backward(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  masks: Masks,
  out: Float[Array, "B T N H"],
  lse: Float[Array, "B T N"],
  d_out: Float[Array, "B T N H"],
  d_lse: Float[Array, "B T N"],
  scale: float,
  block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Gradients of q, k and v.

  The keys may be a part of those that `out` and `lse` were read from: then dk and dv are those of
  this part, and the dq of all parts add up to the whole.
  """
  dot, fold = _dot(q, k, v), functools.partial(_fold, kv_heads=k.shape[2])
  q_BKGTH, do_BKGTH = fold(q), fold(d_out)
  score = functools.partial(dot, "BKGTH,BSKH->BKGTS")
  empty = jnp.isneginf(lse)
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  delta = fold((delta - jnp.where(empty, 0.0, d_lse))[..., None])
  shift = fold(jnp.where(empty, 0.0, lse)[..., None])

  def step(state, start, size):
    dq, dk, dv = state
    logits = _logits(q_BKGTH, k, masks, scale, start, size, score)
    weights = jnp.exp(logits - shift)
    d_weights = dot("BKGTH,BSKH->BKGTS", do_BKGTH, _cut(v, start, size))
    d_logits = scale * weights * (d_weights - delta)
    dq += dot("BKGTS,BSKH->BKGTH", d_logits, _cut(k, start, size))
    dk = _put(dk, dot("BKGTS,BKGTH->BSKH", d_logits, q_BKGTH), start)
    dv = _put(dv, dot("BKGTS,BKGTH->BSKH", weights, do_BKGTH), start)
    return dq, dk, dv

  start = jnp.zeros(q_BKGTH.shape), jnp.zeros_like(k), jnp.zeros_like(v)
  dq, dk, dv = _over_blocks(step, start, k.shape[1], block or block_size(q.shape))
  return _unfold(dq).astype(q.dtype), dk, dv


def _over_blocks(step: Callable[..., Any], state: Any, num_keys: int, block: int) -> Any:
  """`state = step(state, start, size)` for all blocks; the last may be smaller.

  A last block of its own rather than padding: that would copy the keys and values.
  """
  num_blocks, rest = divmod(num_keys, block)
  if num_blocks > 1:

    def body(state, i):
      return step(state, i * block, block), None

    state, _ = jax.lax.scan(body, state, jnp.arange(num_blocks))
  elif num_blocks:
    state = step(state, 0, block)
  return step(state, num_blocks * block, rest) if rest else state


def _logits(q_BKGTH, k, masks, scale, start, size, score):
  """Scaled scores against one block of keys; -inf where a query does not see a key."""
  lengths, q_segments, kv_segments = masks
  logits = scale * score(q_BKGTH, _cut(k, start, size))
  if lengths is None and q_segments is None:
    return logits
  lengths = None if lengths is None else lengths - start
  kv_segments = None if kv_segments is None else _cut(kv_segments, start, size)
  visible = visibility(q_BKGTH.shape[3], size, lengths, q_segments, kv_segments)
  return jnp.where(visible[:, None, None], logits, -jnp.inf)


def _cut(x, start, size):
  """Keys `start` to `start + size`; x itself where those are all."""
  return x if size == x.shape[1] else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x, part, start):
  """Undoes `_cut`; written in place."""
  part = part.astype(x.dtype)
  return part if part.shape == x.shape else jax.lax.dynamic_update_slice_in_dim(x, part, start, 1)


def _dot(q, k, v):
  """An einsum in float32. Factors that were bfloat16 need only one pass of a matrix unit."""
  exact = jnp.result_type(q, k, v) == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT

  def dot(pattern, a, b):
    return jnp.einsum(pattern, a.astype(jnp.float32), b.astype(jnp.float32), precision=precision)

  return dot


def _products(q_shape, k_shape, dot):
  """How queries are multiplied with keys, and weights with values."""
  if one_query.applies(q_shape, k_shape):
    return functools.partial(one_query.scores, dot=dot), functools.partial(one_query.read, dot=dot)
  patterns = "BKGTH,BSKH->BKGTS", "BKGTS,BSKH->BKGTH"
  return tuple(functools.partial(dot, pattern) for pattern in patterns)


def _fold(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T H"]:
  """Query heads as groups of the KV head that they share."""
  return einops.rearrange(x, "B T (K G) H -> B K G T H", K=kv_heads)


def _unfold(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
  return einops.rearrange(x, "B K G T H -> B T (K G) H")
