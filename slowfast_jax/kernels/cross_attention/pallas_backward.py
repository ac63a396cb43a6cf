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

from slowfast_jax.kernels.cross_attention import pallas_tile as tile
from slowfast_jax.kernels.cross_attention.blocks import BackwardBlocks
from slowfast_jax.kernels.cross_attention.pallas_tile import LN2, dot
from slowfast_jax.kernels.cross_attention.tiling import HIDDEN, INTERIOR, Fold, Tiles


class _Refs(NamedTuple):
  """What a step of the grid has in VMEM. C chunks of rows, c rows each.

  Attributes:
    q, do: [rows, W].
    lse, delta: [1, rows].
    k, v: [keys, W].
    row_segments: [1, rows], or None.
    key_segments: [1, keys], or None.
    dq: [rows, W].
    dk, dv: [keys, W].
    acc: dq so far, [C, W, c].
    dk_sum, dv_sum: dk and dv over the chunks so far, [keys, W] or [W, keys]; None where a single
      chunk goes straight out.
  """

  q: Any
  do: Any
  lse: Any
  delta: Any
  k: Any
  v: Any
  row_segments: Any
  key_segments: Any
  dq: Any
  dk: Any
  dv: Any
  acc: Any
  dk_sum: Any = None
  dv_sum: Any = None


class _Rows(NamedTuple):
  """One chunk of rows.

  Attributes:
    q, do: [rows, W].
    factors: q and do as the products of dk and dv want them: [W, rows] where those are
      transposed. Made once a tile.
    lse, delta: [1, rows].
    segments: [1, rows], or None.
  """

  q: Array
  do: Array
  factors: tuple[Array, Array]
  lse: Array
  delta: Array
  segments: Array | None


class _Step(NamedTuple):
  """One step of the grid: one block of keys.

  Attributes:
    refs: see there.
    strips: pieces of the key block.
    left: valid keys from the start of the block on.
    transposed: whether dk and dv are made as [W, keys].
  """

  refs: _Refs
  strips: list[slice]
  left: Array
  transposed: bool

  def rows(self, r):
    """Where the rows of chunk r lie."""
    return tile.rows_of(r, self.refs.acc.shape[2])

  def load(self, r):
    """Chunk r."""
    refs, at = self.refs, self.rows(r)
    q, do = refs.q[at, :], refs.do[at, :]
    factors = (q.T, do.T) if self.transposed else (q, do)
    segments = None if refs.row_segments is None else refs.row_segments[:, at]
    return _Rows(q, do, factors, refs.lse[:, at], refs.delta[:, at], segments)

  def products(self, rows, part, masked):
    """A strip of k, its scores, and dP = V dO^T."""
    k, v = self.refs.k[part, :], self.refs.v[part, :]
    if masked:
      k, v = (tile.clear_behind(x, part, self.left) for x in (k, v))
    s, dp = dot(k, rows.q, tile.ROWS_OF_BOTH), dot(v, rows.do, tile.ROWS_OF_BOTH)
    return k, s, dp

  def advance(self, r, masked):
    """Gradients of one tile; the next strip's products are under way while one is consumed."""
    rows = self.load(r)
    dq = None
    ahead = self.products(rows, self.strips[0], masked)
    for n, part in enumerate(self.strips):
      k, s, dp = ahead
      if n + 1 < len(self.strips):
        ahead = self.products(rows, self.strips[n + 1], masked)
      if masked:
        s = tile.hide(s, part, self.left, rows.segments, self.refs.key_segments)
      p = jnp.exp2(s - rows.lse)
      ds = (p * (dp - rows.delta)).astype(k.dtype)
      self.add(rows, part, ds, p.astype(k.dtype))
      product = dot(k, ds, tile.COLUMNS_OF_BOTH)
      dq = product if dq is None else dq + product
    self.refs.acc[r] += dq

  def add(self, rows, part, ds, p):
    """Adds dk = dS Q and dv = P dO of a strip, or writes them where there is one chunk."""
    refs, (q, do) = self.refs, rows.factors
    if self.transposed:
      dk, dv = dot(q, ds, tile.ROWS_OF_BOTH), dot(do, p, tile.ROWS_OF_BOTH)
    else:
      dk, dv = dot(ds, q, tile.PLAIN), dot(p, do, tile.PLAIN)
    if refs.dk_sum is None:
      return self.write(part, dk, dv)
    where = (slice(None), part) if self.transposed else (part, slice(None))
    refs.dk_sum[where] += dk
    refs.dv_sum[where] += dv

  def write(self, part, dk, dv):
    """Puts out dk and dv of some keys."""
    # q carries scale * log2(e), of which dk wants only the scale.
    for ref, x in ((self.refs.dk, dk * LN2), (self.refs.dv, dv)):
      x = x.astype(ref.dtype)
      ref[part, :] = x.T if self.transposed else x

  def advance_as_needed(self, r, kind):
    """`advance` for what a tile needs."""
    refs = self.refs
    pl.when(kind == INTERIOR)(functools.partial(self.advance, r, False))
    pl.when((kind != INTERIOR) & (kind != HIDDEN))(functools.partial(self.advance, r, True))
    if refs.dk_sum is None:
      pl.when(kind == HIDDEN)(functools.partial(_clear, refs.dk, refs.dv))

  def finish(self, r):
    """dq of chunk r."""
    self.refs.dq[self.rows(r), :] = self.refs.acc[r].T


def _clear(*refs):
  for ref in refs:
    ref[...] = jnp.zeros_like(ref)


def _kernel(
  kinds_ref,
  lengths_ref,
  front_ref,
  back_ref,
  *refs,
  blocks: BackwardBlocks,
  num_blocks: int,
  segmented: bool,
):
  """One key block, all chunks of rows; grid (batch, block of heads, key block)."""
  del front_ref, back_ref
  refs = _Refs(*(refs if segmented else (*refs[:6], None, None, *refs[6:])))
  b, j = pl.program_id(0), pl.program_id(2)
  num_chunks, key_block = refs.acc.shape[0], refs.k.shape[0]
  strips, left = tile.strips_of(key_block, blocks.strip), lengths_ref[b] - j * key_block
  step = _Step(refs, strips, left, blocks.transposed)

  def chunk_step(r, carry):
    step.advance_as_needed(r, kinds_ref[(b * num_chunks + r) * num_blocks + j])
    return carry

  pl.when(j == 0)(functools.partial(_clear, refs.acc))
  if refs.dk_sum is not None:
    _clear(refs.dk_sum, refs.dv_sum)
  jax.lax.fori_loop(0, num_chunks, chunk_step, 0)
  if refs.dk_sum is not None:
    step.write(slice(None), refs.dk_sum[...], refs.dv_sum[...])

  @pl.when(j == num_blocks - 1)
  def _finish():
    jax.lax.fori_loop(0, num_chunks, lambda r, _: step.finish(r), None)


def _grid(
  B: int, KB: int, R: int, W: int, num_blocks: int, blocks: BackwardBlocks, segmented: bool
):
  """The grid, and what of each array is in VMEM at a step."""

  def at(b, h, j, kinds, lengths, front, back):
    del kinds, lengths
    return tile.seen(b, j, num_blocks, front, back), h

  key_block, num_chunks = blocks.key_block, R // blocks.chunk
  rows = pl.BlockSpec((None, None, R, W), lambda b, h, j, *_: (b, h, 0, 0))
  line = pl.BlockSpec((None, None, 1, R), lambda b, h, j, *_: (b, h, 0, 0))
  keys = tile.key_spec(key_block, W, at)
  keys_out = pl.BlockSpec((None, key_block, W), lambda b, h, j, *_: (b, j, h))
  in_specs = [rows, rows, line, line, keys, keys]
  if segmented:
    row_segments = pl.BlockSpec((None, 1, R), lambda b, h, j, *_: (b, 0, 0))
    in_specs += [row_segments, tile.key_segments_spec(key_block, at)]
  sums = (W, key_block) if blocks.transposed else (key_block, W)
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(Tiles.__dataclass_fields__),
    grid=(B, KB, num_blocks),
    in_specs=in_specs,
    out_specs=[rows, keys_out, keys_out],
    scratch_shapes=[
      pltpu.VMEM((num_chunks, W, blocks.chunk), jnp.float32),
      *[pltpu.VMEM(sums, jnp.float32)] * (2 if num_chunks > 1 else 0),
    ],
  )


def backward(
  q: Float[Array, "B KB R W"],
  do: Float[Array, "B KB R W"],
  lse: Float[Array, "B KB 1 R"],
  delta: Float[Array, "B KB 1 R"],
  k: Float[Array, "B S L"],
  v: Float[Array, "B S L"],
  tiles: Tiles,
  segments: tuple[Int[Array, "B 1 R"], Int[Array, "B S"]] | None,
  *,
  fold: Fold,
  blocks: BackwardBlocks,
  out_dtype: jnp.dtype,
  interpret=False,
) -> tuple[Float[Array, "B KB R W"], Float[Array, "B S L"], Float[Array, "B S L"]]:
  """Gradients of one block of rows: dq / scale in float32, folded, and dk, dv.

  Args:
    q, do: folded queries times scale * log2(e), and folded gradients of the output.
    lse: log-sum-exps in units of ln 2; a huge number where a row sees no key.
    delta: sum of output times its gradient, less the gradient of the log-sum-exp.
    k, v: keys and values as `Fold.keys_view` gives them.
    tiles: the plan for these blocks.
    segments: of the rows, from `Fold.fold_segments`, and of the keys.
    fold: the call's shapes.
    blocks: block sizes; R is `row_block`.
    out_dtype: of dk and dv; float32 where several calls are summed.
    interpret: Pallas's interpreter instead of the compiler.
  """
  B, KB, R, W = q.shape
  num_blocks, segmented = -(-fold.keys // blocks.key_block), segments is not None
  flops = 10 * B * KB * R * fold.keys * W
  moved = 4 * q.nbytes + 2 * (k.nbytes + v.nbytes)
  keys_out = jax.ShapeDtypeStruct(k.shape, out_dtype)
  return pl.pallas_call(
    functools.partial(_kernel, blocks=blocks, num_blocks=num_blocks, segmented=segmented),
    name="slow_cross_attention_backward",
    grid_spec=_grid(B, KB, R, W, num_blocks, blocks, segmented),
    out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), keys_out, keys_out],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops, transcendentals=B * KB * R * fold.keys, bytes_accessed=moved
    ),
    interpret=interpret,
  )(*tiles.scalars(), q, do, lse, delta, k, v, *tile.segment_inputs(segments))
