# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of slow cross-attention, backward: dq, dk and dv in one pass over the keys.

dq of all rows stays in VMEM while the keys pass, dk and dv of a block of keys are complete when
the block leaves: nothing is added up in HBM. Probabilities are computed anew from the saved
log-sum-exp; tiles are transposed, [keys, rows], as in the forward kernel.
"""

import functools
from typing import Any, NamedTuple

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


class _Rows(NamedTuple):
  """One chunk of rows.

  Attributes:
    q, do: [rows, W].
    lse, delta: [1, rows].
    segments: [1, rows], or None.
  """

  q: Array
  do: Array
  lse: Array
  delta: Array
  segments: Array | None


class _Keys(NamedTuple):
  """References to one block of keys, and how many of them are valid.

  Attributes:
    k, v: [keys, W].
    segments: [1, keys], or None.
    left: valid keys, may be more than there are; None where the tile needs no mask.
  """

  k: Any
  v: Any
  segments: Any
  left: Array | None

  def load(self, ref, part):
    """A strip of k or v; zeros behind the last key, which is undefined, because 0 * NaN is NaN."""
    x = ref[part, :]
    if self.left is None:
      return x
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < self.left - part.start
    return jnp.where(inside, x, 0)

  def mask(self, s, part, row_segments):
    """Hides scores of a strip that do not count."""
    if self.left is None:
      return s
    pair = (None, None)
    if row_segments is not None:
      pair = (row_segments, self.segments[:, part])
    return jnp.where(visible(s.shape, part.start, self.left, *pair), s, HIDDEN_SCORE)


def _tile(rows: _Rows, keys: _Keys, strips, add, transposed):
  """Gradients of one tile; the next strip's first products are under way while one is consumed.

  Args:
    rows, keys: what meets.
    strips: slices of the keys.
    add: called with a strip, its dk and its dv, [keys, W] or [W, keys].
    transposed: whether dk and dv are made as [W, keys].

  Returns:
    The tile's part of dq, [W, rows].
  """
  q, do = rows.q, rows.do
  q_t, do_t = (q.T, do.T) if transposed else (None, None)

  def products(part):
    k = keys.load(keys.k, part)
    return k, dot(k, q, ROWS_OF_BOTH), dot(keys.load(keys.v, part), do, ROWS_OF_BOTH)

  dq = None
  ahead = products(strips[0])
  for n, part in enumerate(strips):
    k, s, dp = ahead
    if n + 1 < len(strips):
      ahead = products(strips[n + 1])
    p = jnp.exp2(keys.mask(s, part, rows.segments) - rows.lse)
    ds = (p * (dp - rows.delta)).astype(k.dtype)
    p = p.astype(k.dtype)
    if transposed:
      add(part, dot(q_t, ds, ROWS_OF_BOTH), dot(do_t, p, ROWS_OF_BOTH))
    else:
      add(part, dot(ds, q, PLAIN), dot(p, do, PLAIN))
    product = dot(k, ds, COLUMNS_OF_BOTH)
    dq = product if dq is None else dq + product
  return dq


class _Sums:
  """dk and dv of a block of keys, summed over chunks of rows; a single chunk goes straight out."""

  def __init__(self, outputs, sums, transposed):
    self.outputs, self.sums, self.transposed = outputs, sums, transposed

  def start(self):
    for ref in self.sums:
      ref[...] = jnp.zeros_like(ref)

  def add(self, part, dk, dv):
    if not self.sums:
      return self.write(part, dk, dv)
    at = (slice(None), part) if self.transposed else (part, slice(None))
    for ref, x in zip(self.sums, (dk, dv)):
      ref[at] += x

  def write(self, part, dk, dv):
    # q carries scale * log2(e), of which dk wants only the scale.
    for ref, x in zip(self.outputs, (dk * LN2, dv)):
      x = x.astype(ref.dtype)
      ref[part, :] = x.T if self.transposed else x

  def finish(self):
    if self.sums:
      self.write(slice(None), *(ref[...] for ref in self.sums))

  def clear(self):
    if not self.sums:
      for ref in self.outputs:
        ref[...] = jnp.zeros_like(ref)


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
  num_chunks, key_block, chunk = q_ref.shape[0] // blocks.chunk, k_ref.shape[0], blocks.chunk
  num_sums = 2 if num_chunks > 1 else 0
  refs, sum_refs = refs[: len(refs) - num_sums], refs[len(refs) - num_sums :]
  *segment_refs, dq_ref, dk_ref, dv_ref, dq_acc = refs
  row_segments, key_segments = segment_refs or (None, None)
  b, j = pl.program_id(0), pl.program_id(2)
  strips = [slice(x, min(x + blocks.strip, key_block)) for x in range(0, key_block, blocks.strip)]
  sums = _Sums((dk_ref, dv_ref), sum_refs, blocks.transposed)

  def rows(r):
    return pl.ds(pl.multiple_of(r * chunk, chunk), chunk)

  def step(r, masked):
    at = rows(r)
    segments = None if row_segments is None else row_segments[:, at]
    left = lengths_ref[b] - j * key_block if masked else None
    dq_acc[r] += _tile(
      _Rows(q_ref[at, :], do_ref[at, :], lse_ref[:, at], delta_ref[:, at], segments),
      _Keys(k_ref, v_ref, key_segments, left),
      strips,
      sums.add,
      blocks.transposed,
    )

  def chunk_step(r, carry):
    kind = kinds_ref[(b * num_chunks + r) * num_blocks + j]
    pl.when(kind == INTERIOR)(functools.partial(step, r, False))
    pl.when((kind != INTERIOR) & (kind != HIDDEN))(functools.partial(step, r, True))
    pl.when(kind == HIDDEN)(sums.clear)
    return carry

  @pl.when(j == 0)
  def _start():
    dq_acc[...] = jnp.zeros_like(dq_acc)

  sums.start()
  jax.lax.fori_loop(0, num_chunks, chunk_step, 0)
  sums.finish()

  def finish(r, carry):
    dq_ref[rows(r), :] = dq_acc[r].T
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

  sums = (W, key_block) if blocks.transposed else (key_block, W)
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
        *[pltpu.VMEM(sums, jnp.float32)] * (2 if num_chunks > 1 else 0),
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
