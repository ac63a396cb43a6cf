# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of slow cross-attention, backward: dq, dk and dv in one pass over the keys.

dq of all rows stays in VMEM while the keys pass, dk and dv of a block of keys are complete when
the block leaves: nothing is added up in HBM. Probabilities are computed anew from the saved
log-sum-exp; tiles are transposed, [keys, rows], as in the forward kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention.blocks import BackwardBlocks
from slowfast_jax.kernels.cross_attention.pallas_forward import (
  COLUMNS_OF_BOTH,
  HIDDEN_SCORE,
  LN2,
  ROWS_OF_BOTH,
  dot,
  visible,
)
from slowfast_jax.kernels.cross_attention.tiling import HIDDEN, INTERIOR, Fold, Tiles

PLAIN = (((1,), (0,)), ((), ()))


def _kernel(
  kinds_ref,
  lengths_ref,
  front_ref,
  back_ref,
  q_ref,
  do_ref,
  lse_ref,
  delta_ref,
  k_ref,
  v_ref,
  *refs,
  blocks: BackwardBlocks,
  num_blocks: int,
):
  """One key block, all chunks of rows; grid (batch, block of heads, key block)."""
  del front_ref, back_ref
  *segment_refs, dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc = refs
  b, j = pl.program_id(0), pl.program_id(2)
  num_chunks, _, chunk = dq_acc.shape
  key_block = k_ref.shape[0]
  strips = [slice(x, min(x + blocks.strip, key_block)) for x in range(0, key_block, blocks.strip)]
  left = lengths_ref[b] - j * key_block

  def step(r, masked):
    rows = pl.ds(pl.multiple_of(r * chunk, chunk), chunk)
    q, do = q_ref[rows, :], do_ref[rows, :]
    lse, delta = lse_ref[:, rows], delta_ref[:, rows]

    def load(ref, part):
      x = ref[part, :]
      if masked:
        # What lies behind the last key is undefined, and 0 * NaN is NaN.
        inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < left - part.start
        x = jnp.where(inside, x, 0)
      return x

    def products(part):
      k = load(k_ref, part)
      return k, dot(k, q, ROWS_OF_BOTH), dot(load(v_ref, part), do, ROWS_OF_BOTH)

    dq = dq_acc[r]
    ahead = products(strips[0])
    for n, part in enumerate(strips):
      k, s, dp = ahead
      if n + 1 < len(strips):
        ahead = products(strips[n + 1])
      if masked:
        pair = (None, None)
        if segment_refs:
          pair = (segment_refs[0][:, rows], segment_refs[1][:, part])
        s = jnp.where(visible(s.shape, part.start, left, *pair), s, HIDDEN_SCORE)
      p = jnp.exp2(s - lse)
      ds = (p * (dp - delta)).astype(k.dtype)
      dv_acc[part, :] += dot(p.astype(k.dtype), do, PLAIN)
      dk_acc[part, :] += dot(ds, q, PLAIN)
      dq += dot(k, ds, COLUMNS_OF_BOTH)
    dq_acc[r] = dq

  def chunk_step(r, carry):
    kind = kinds_ref[(b * num_chunks + r) * num_blocks + j]
    pl.when(kind == INTERIOR)(functools.partial(step, r, False))
    pl.when((kind != INTERIOR) & (kind != HIDDEN))(functools.partial(step, r, True))
    return carry

  @pl.when(j == 0)
  def _start():
    dq_acc[...] = jnp.zeros_like(dq_acc)

  dk_acc[...] = jnp.zeros_like(dk_acc)
  dv_acc[...] = jnp.zeros_like(dv_acc)
  jax.lax.fori_loop(0, num_chunks, chunk_step, 0)
  # q carries scale * log2(e), of which dk wants only the scale.
  dk_ref[...] = (dk_acc[...] * LN2).astype(dk_ref.dtype)
  dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

  def finish(r, carry):
    rows = pl.ds(pl.multiple_of(r * chunk, chunk), chunk)
    dq_ref[rows, :] = dq_acc[r].T
    return carry

  @pl.when(j == num_blocks - 1)
  def _finish():
    jax.lax.fori_loop(0, num_chunks, finish, 0)


def backward(
  q: Float[Array, "B KB R W"],
  do: Float[Array, "B KB R W"],
  lse: Float[Array, "B KB 1 R"],
  delta: Float[Array, "B KB 1 R"],
  k: Float[Array, "B S L"],
  v: Float[Array, "B S L"],
  tiles: Tiles,
  row_segments: Int[Array, "B 1 R"] | None,
  kv_segments: Int[Array, "B S"] | None,
  *,
  fold: Fold,
  blocks: BackwardBlocks,
  out_dtype: jnp.dtype,
  interpret=False,
) -> tuple[Float[Array, "B KB R W"], Float[Array, "B S L"], Float[Array, "B S L"]]:
  """Gradients of one block of rows.

  Args:
    q: folded queries times scale * log2(e).
    do: folded gradients of the output.
    lse: log-sum-exps in units of ln 2; a huge number where a row sees no key.
    delta: sum of output times its gradient, less the gradient of the log-sum-exp.
    k: keys as `Fold.keys_view` gives them.
    v: values likewise.
    tiles: the plan for these blocks.
    row_segments: from `Fold.fold_segments`, or None.
    kv_segments: segments of the keys, together with `row_segments`.
    fold: the call's shapes.
    blocks: block sizes; R is `row_block`.
    out_dtype: of dk and dv; float32 where several calls are summed.
    interpret: Pallas's interpreter instead of the compiler.

  Returns:
    Folded gradient of the logits' sum by k, float32 (the caller multiplies by the scale), dk, dv.
  """
  B, KB, R, W = q.shape
  key_block = blocks.key_block
  num_blocks, num_chunks = -(-fold.keys // key_block), R // blocks.chunk

  def clamped(lanes_last):
    def index(b, h, j, kinds, lengths, front, back):
      block = jnp.clip(j, front[b], num_blocks - 1 - back[b])
      return (b, block, h) if lanes_last else (b, 0, block)

    return index

  row_spec = pl.BlockSpec((None, None, R, W), lambda b, h, j, *_: (b, h, 0, 0))
  line_spec = pl.BlockSpec((None, None, 1, R), lambda b, h, j, *_: (b, h, 0, 0))
  key_spec = pl.BlockSpec((None, key_block, W), clamped(True))
  key_out_spec = pl.BlockSpec((None, key_block, W), lambda b, h, j, *_: (b, j, h))
  in_specs = [row_spec, row_spec, line_spec, line_spec, key_spec, key_spec]
  inputs = [q, do, lse, delta, k, v]
  if row_segments is not None and kv_segments is not None:
    in_specs += [
      pl.BlockSpec((None, 1, R), lambda b, h, j, *_: (b, 0, 0)),
      pl.BlockSpec((None, 1, key_block), clamped(False)),
    ]
    inputs += [row_segments, kv_segments[:, None]]
  return pl.pallas_call(
    functools.partial(_kernel, blocks=blocks, num_blocks=num_blocks),
    name="slow_cross_attention_backward",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(B, KB, num_blocks),
      in_specs=in_specs,
      out_specs=[row_spec, key_out_spec, key_out_spec],
      scratch_shapes=[
        pltpu.VMEM((num_chunks, W, blocks.chunk), jnp.float32),
        pltpu.VMEM((key_block, W), jnp.float32),
        pltpu.VMEM((key_block, W), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, jnp.float32),
      jax.ShapeDtypeStruct(k.shape, out_dtype),
      jax.ShapeDtypeStruct(v.shape, out_dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=blocks.vmem_limit,
    ),
    cost_estimate=pl.CostEstimate(
      flops=10 * B * KB * R * fold.keys * W,
      transcendentals=B * KB * R * fold.keys,
      bytes_accessed=4 * q.nbytes + 2 * (k.nbytes + v.nbytes),
    ),
    interpret=interpret,
  )(*tiles.scalars(), *inputs)
