# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of slow cross-attention, forward: output and log-sum-exp.

Scores are kept transposed, [keys, rows]: statistics of a row are then lane-wise and nothing is
transposed but the output. The body is software-pipelined over key blocks: a step computes the
scores of block j on the matrix unit while the vector unit exponentiates those of block j - 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention import pallas_tile as tile
from slowfast_jax.kernels.cross_attention.blocks import ForwardBlocks
from slowfast_jax.kernels.cross_attention.pallas_tile import HIDDEN_SCORE, LN2, SUBLANES
from slowfast_jax.kernels.cross_attention.tiling import HIDDEN, INTERIOR, TAIL, Fold, Tiles


class _Refs(NamedTuple):
  """What a step of the grid has in VMEM. C chunks of rows, c rows each.

  Attributes:
    q: [rows, W].
    k: block j, [keys, W].
    v: block j - 1, [keys, W].
    row_segments: [1, rows], or None.
    key_segments: of block j, [1, keys], or None.
    out: [rows, W].
    lse: [1, rows].
    peak: highest score of each row so far, [C, 1, c].
    total: sum of its exponentials over all but 8 keys, [C, 8, c].
    acc: output before the division, [C, W, c].
    scores: those of block j - 1, which wait to be consumed, [C, keys, c].
    highest: their maximum over all but 8 keys, [C, 8, c].
  """

  q: Any
  k: Any
  v: Any
  row_segments: Any
  key_segments: Any
  out: Any
  lse: Any
  peak: Any
  total: Any
  acc: Any
  scores: Any
  highest: Any


class _Step(NamedTuple):
  """One step of the grid: scores block j and consumes block j - 1.

  Attributes:
    refs: see there.
    strips: pieces of a key block.
    left: valid keys from the start of block j on.
  """

  refs: _Refs
  strips: list[slice]
  left: Array

  def rows(self, r):
    """Where the rows of chunk r lie."""
    return tile.rows_of(r, self.refs.scores.shape[2])

  def score(self, r, part, masked):
    """Scores of a strip of block j."""
    refs, at = self.refs, self.rows(r)
    s = tile.dot(refs.k[part, :], refs.q[at, :], tile.ROWS_OF_BOTH)
    if masked:
      row_segments = None if refs.row_segments is None else refs.row_segments[:, at]
      s = tile.hide(s, part, self.left, row_segments, refs.key_segments)
    return s

  def values(self, part, tail):
    """A strip of block j - 1; `tail`: the last key is in this block."""
    v = self.refs.v[part, :]
    return tile.clear_behind(v, part, self.left + self.refs.v.shape[0]) if tail else v

  def advance(self, r, *, consume, produce, masked=False, tail=False):
    """Consumes the waiting scores of chunk r and puts those of block j in their place."""
    refs = self.refs
    if consume:
      peak = jnp.maximum(refs.peak[r], jnp.max(refs.highest[r], axis=0, keepdims=True))
      shrink = jnp.exp2(refs.peak[r] - peak)
      refs.peak[r] = peak
      total, acc = refs.total[r] * shrink, refs.acc[r] * shrink
    highest = None
    for part in self.strips:
      if produce:
        s = self.score(r, part, masked)
        top = tile.halve(s, jnp.max)
        highest = top if highest is None else jnp.maximum(highest, top)
      if consume:
        p = jnp.exp2(refs.scores[r, part] - peak)
        total += tile.halve(p, jnp.sum)
        v = self.values(part, tail)
        acc += tile.dot(v, p.astype(v.dtype), tile.COLUMNS_OF_BOTH)
      if produce:
        refs.scores[r, part] = s
    if produce:
      refs.highest[r] = highest
    if consume:
      refs.total[r], refs.acc[r] = total, acc

  def advance_together(self, chunks):
    """`advance` of chunks whose tiles are all seen as a whole.

    Without a branch between them the compiler starts one while the last products of the other are
    still on their way out of the matrix unit.
    """
    for r in chunks:
      self.advance(r, consume=True, produce=True)

  def advance_as_needed(self, r, old, new):
    """`advance` for what the tiles of blocks j - 1 and j need."""
    step = functools.partial(self.advance, r)
    has_old, has_new = old != HIDDEN, new != HIDDEN
    for masked in (False, True):
      this = has_new & ((new != INTERIOR) == masked)
      for consume in (True, False):
        pl.when((has_old == consume) & this)(
          functools.partial(step, consume=consume, produce=True, masked=masked)
        )
    # Behind a tail everything is hidden, so only this step meets one.
    for tail in (False, True):
      pl.when(has_old & ~has_new & ((old == TAIL) == tail))(
        functools.partial(step, consume=True, produce=False, tail=tail)
      )

  def start(self):
    """No row has seen a key."""
    refs = self.refs
    refs.peak[...] = jnp.full_like(refs.peak, HIDDEN_SCORE)
    refs.total[...] = jnp.zeros_like(refs.total)
    refs.acc[...] = jnp.zeros_like(refs.acc)

  def finish(self, r):
    """Output and log-sum-exp of chunk r; 0 and -inf where a row saw no key."""
    refs, at = self.refs, self.rows(r)
    seen = refs.peak[r] > HIDDEN_SCORE
    total = jnp.where(seen, jnp.sum(refs.total[r], axis=0, keepdims=True), 1.0)
    out = jnp.where(seen, refs.acc[r] / total, 0.0)
    refs.out[at, :] = out.T.astype(refs.out.dtype)
    refs.lse[:, at] = jnp.where(seen, refs.peak[r] * LN2 + jnp.log(total), -jnp.inf)


def _kernel(
  kinds_ref,
  lengths_ref,
  front_ref,
  back_ref,
  *refs,
  strip: int,
  num_blocks: int,
  total_chunks: int,
  segmented: bool,
):
  """All chunks of a block of rows; grid (batch, block of heads, block of rows, num_blocks + 1)."""
  del front_ref, back_ref
  refs = _Refs(*(refs if segmented else (*refs[:3], None, None, *refs[3:])))
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  num_chunks, key_block, _ = refs.scores.shape
  step = _Step(refs, tile.strips_of(key_block, strip), lengths_ref[b] - j * key_block)

  def kind(r, block):
    return kinds_ref[(b * total_chunks + i * num_chunks + r) * num_blocks + block]

  def kinds(r):
    """What the tiles of chunk r need: with block j - 1, and with block j."""
    new = jnp.where(j < num_blocks, kind(r, jnp.minimum(j, num_blocks - 1)), HIDDEN)
    old = jnp.where(j > 0, kind(r, jnp.maximum(j - 1, 0)), HIDDEN)
    return old, new

  pl.when(j == 0)(step.start)
  _for_all_chunks(step, num_chunks, kinds)

  @pl.when(j == num_blocks)
  def _finish():
    jax.lax.fori_loop(0, num_chunks, lambda r, _: step.finish(r), None)


def _for_all_chunks(step: _Step, num_chunks: int, kinds: Callable):
  """Every chunk's part of a step, two at a time where nothing is masked or hidden."""

  def one(r, carry):
    step.advance_as_needed(r, *kinds(r))
    return carry

  def two(i, carry):
    pair = (2 * i, 2 * i + 1)
    interior = functools.reduce(jnp.logical_and, [x == INTERIOR for r in pair for x in kinds(r)])
    pl.when(interior)(functools.partial(step.advance_together, pair))
    pl.when(~interior)(lambda: jax.lax.fori_loop(2 * i, 2 * i + 2, one, None))
    return carry

  if num_chunks > 1:
    jax.lax.fori_loop(0, num_chunks // 2, two, None)
  if num_chunks % 2:
    one(num_chunks - 1, None)


def _grid(B: int, KB: int, R: int, W: int, num_blocks: int, blocks: ForwardBlocks, segmented: bool):
  """The grid, and what of each array is in VMEM at a step."""
  key_block, chunk, num_chunks = blocks.key_block, blocks.chunk, blocks.row_block // blocks.chunk
  rows = pl.BlockSpec((None, None, blocks.row_block, W), lambda b, h, i, j, *_: (b, h, i, 0))
  line = pl.BlockSpec((None, None, 1, blocks.row_block), lambda b, h, i, j, *_: (b, h, 0, i))
  this, before = (tile.key_block_of(num_blocks, shift) for shift in (0, 1))
  in_specs = [rows, *(tile.key_spec(key_block, W, block) for block in (this, before))]
  if segmented:
    in_specs += [
      pl.BlockSpec((None, 1, blocks.row_block), lambda b, h, i, j, *_: (b, 0, i)),
      tile.key_segments_spec(key_block, this),
    ]
  # Of a row: peak, total, acc, scores, highest.
  depths = (1, SUBLANES, W, key_block, SUBLANES)
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(Tiles.__dataclass_fields__),
    grid=(B, KB, R // blocks.row_block, num_blocks + 1),
    in_specs=in_specs,
    out_specs=[rows, line],
    scratch_shapes=[pltpu.VMEM((num_chunks, depth, chunk), jnp.float32) for depth in depths],
  )


def forward(
  q: Float[Array, "B KB R W"],
  k: Float[Array, "B S L"],
  v: Float[Array, "B S L"],
  tiles: Tiles,
  segments: tuple[Int[Array, "B 1 R"], Int[Array, "B S"]] | None,
  *,
  fold: Fold,
  blocks: ForwardBlocks,
  interpret=False,
) -> tuple[Float[Array, "B KB R W"], Float[Array, "B KB 1 R"]]:
  """Folded outputs and natural log-sum-exps; 0 and -inf in rows that see no key.

  Args:
    q: folded queries times scale * log2(e).
    k, v: keys and values as `Fold.keys_view` gives them.
    tiles: the plan for these blocks.
    segments: of the rows, from `Fold.fold_segments`, and of the keys.
    fold: the call's shapes.
    blocks: block sizes; R is a multiple of `row_block`, that of `chunk`.
    interpret: Pallas's interpreter instead of the compiler.
  """
  B, KB, R, W = q.shape
  num_blocks, total_chunks = -(-fold.keys // blocks.key_block), R // blocks.chunk
  static = {"strip": blocks.strip, "num_blocks": num_blocks, "total_chunks": total_chunks}
  return pl.pallas_call(
    functools.partial(_kernel, **static, segmented=segments is not None),
    name="slow_cross_attention_forward",
    grid_spec=_grid(B, KB, R, W, num_blocks, blocks, segments is not None),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((B, KB, 1, R), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=blocks.vmem_limit,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * B * KB * R * fold.keys * W,
      transcendentals=B * KB * R * fold.keys,
      bytes_accessed=2 * q.nbytes + (R // blocks.row_block) * (k.nbytes + v.nbytes),
    ),
    interpret=interpret,
  )(*tiles.scalars(), q, k, v, *tile.segment_inputs(segments))
