# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention on TPU: folds a call, runs the kernels, and ties forward to backward."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention import blocks as block_table
from slowfast_jax.kernels.cross_attention.pallas_backward import backward
from slowfast_jax.kernels.cross_attention.pallas_forward import forward
from slowfast_jax.kernels.cross_attention.tiling import Fold, plan_tiles

LOG2E = math.log2(math.e)


def cross_attention_pallas_tpu(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
  interpret=False,
  blocks: block_table.Blocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Attention output and log-sum-exp; arguments as in `cross_attention`.

  Args:
    q, k, v: queries, keys and values of one dtype. bfloat16 is multiplied as it is, with float32
      statistics; float32 keeps its bits. scale * log2(e) is folded into q before it is rounded.
    kv_lengths: valid prefix of S.
    q_segments: packing id of each query.
    kv_segments: packing id of each key.
    scale: factor on the logits, 1 / sqrt(H) where absent.
    interpret: run Pallas's interpreter; for tests.
    blocks: block sizes instead of the table's.
  """
  dtype = jnp.result_type(q, k, v)
  masks = (kv_lengths, q_segments, kv_segments)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if 0 in (*q.shape, *k.shape):
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf)
  arrays = tuple(x.astype(dtype) for x in (q, k, v))
  blocks = _blocks(*arrays[:2]) if blocks is None else blocks
  out, lse = _attention(*arrays, masks, scale, interpret, blocks)
  return out.astype(q.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, masks, scale, interpret, blocks):
  return _attention_forward(q, k, v, masks, scale, interpret, blocks)[0]


def _attention_forward(q, k, v, masks, scale, interpret, blocks):
  fold, sizes = Fold.of(q.shape, k.shape), blocks.forward
  rows = block_table.round_up(fold.rows, sizes.row_block)
  row_segments = None if masks[1] is None else fold.fold_segments(masks[1], rows)
  tiles = plan_tiles(fold, masks[0], row_segments, masks[2], rows // sizes.chunk, sizes.key_block)
  out, lse = forward(
    fold.fold(_scaled(q, scale), rows),
    fold.keys_view(k),
    fold.keys_view(v),
    tiles,
    None if row_segments is None else (row_segments, masks[2]),
    fold=fold,
    blocks=sizes,
    interpret=interpret,
  )
  out, lse = fold.unfold(out), fold.unfold_scalars(lse)
  return (out, lse), (q, k, v, masks, out, lse)


def _scaled(q, scale):
  return (q.astype(jnp.float32) * (scale * LOG2E)).astype(q.dtype)


def _attention_backward(scale, interpret, blocks, saved, gradients):
  q, k, v, masks, out, lse = saved
  do, dlse = gradients
  fold, sizes = Fold.of(q.shape, k.shape), blocks.backward
  rows = block_table.round_up(fold.rows, sizes.row_block)
  empty = jnp.isneginf(lse)
  delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
  delta -= jnp.where(empty, 0.0, dlse)
  # Rows without keys, and those of padding, get the probability exp2(score - huge) = 0.
  huge = float(jnp.finfo(jnp.float32).max) / 2
  per_row = (
    fold.fold(_scaled(q, scale), rows),
    fold.fold(do, rows),
    fold.fold_scalars(jnp.where(empty, huge, lse * LOG2E), rows, huge),
    fold.fold_scalars(delta, rows, 0.0),
    None if masks[1] is None else fold.fold_segments(masks[1], rows),
  )
  keys = fold.keys_view(k), fold.keys_view(v)
  step = functools.partial(_backward_rows, keys, masks, fold, sizes, interpret)
  if rows == sizes.row_block:
    dq, dk, dv = step(per_row, k.dtype)
  else:
    dq, dk, dv = _backward_by_row_block(step, per_row, keys, rows // sizes.row_block)
  dq = fold.unfold(dq) * scale
  dk, dv = fold.keys_unview(dk), fold.keys_unview(dv)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _backward_rows(keys, masks, fold, sizes, interpret, per_row, out_dtype):
  """dq, dk, dv of one block of rows."""
  q, do, lse, delta, row_segments = per_row
  lengths, _, kv_segments = masks
  num_chunks = sizes.row_block // sizes.chunk
  tiles = plan_tiles(fold, lengths, row_segments, kv_segments, num_chunks, sizes.key_block)
  segments = None if row_segments is None else (row_segments, kv_segments)
  options = {"fold": fold, "blocks": sizes, "out_dtype": out_dtype, "interpret": interpret}
  return backward(q, do, lse, delta, keys[0], keys[1], tiles, segments, **options)


def _backward_by_row_block(step, per_row, keys, num_blocks):
  """The same where the rows do not fit in VMEM: dk and dv are summed in float32."""
  q, do, lse, delta, segments = per_row

  def cut(x, axis):
    shape = (*x.shape[:axis], num_blocks, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  segments = None if segments is None else cut(segments, 2)
  pieces = (cut(q, 2), cut(do, 2), cut(lse, 3), cut(delta, 3), segments)

  def body(sums, piece):
    dq, dk, dv = step(piece, jnp.float32)
    return (sums[0] + dk, sums[1] + dv), dq

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys)
  (dk, dv), dq = jax.lax.scan(body, start, pieces)
  return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk, dv


_attention.defvjp(_attention_forward, _attention_backward)


def forward_part(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  masks: tuple,
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Output and log-sum-exp over some of the keys that a query reads; q, k, v of one dtype."""
  return _attention_forward(q, k, v, masks, scale, interpret, _blocks(q, k))[0]


def backward_part(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  masks: tuple,
  out: Float[Array, "B T N H"],
  lse: Float[Array, "B T N"],
  d_out: Float[Array, "B T N H"],
  d_lse: Float[Array, "B T N"],
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """dq, dk, dv of some of the keys, given the output and log-sum-exp over all of them."""
  saved = (q, k, v, masks, out, lse)
  return _attention_backward(scale, interpret, _blocks(q, k), saved, (d_out, d_lse))[:3]


def _blocks(q, k):
  return block_table.choose(Fold.of(q.shape, k.shape), q.dtype.itemsize)
