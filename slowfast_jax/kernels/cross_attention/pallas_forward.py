# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of slow cross-attention, forward: output and log-sum-exp.

Scores are kept transposed, [keys, rows]: statistics of a row are then lane-wise and nothing is
transposed but the output (`pallas_rows`, also for rows that fill no 128 lanes). The body is
software-pipelined over key blocks, and from one block of heads to the next: a step computes the
scores of a block of keys on the matrix unit while the vector unit exponentiates those of the block
before it.
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
from slowfast_jax.kernels.cross_attention.pallas_rows import Rows, rows_of_chunk, scratch_shapes
from slowfast_jax.kernels.cross_attention.pallas_tile import HIDDEN_SCORE, LN2
from slowfast_jax.kernels.cross_attention.tiling import HIDDEN, INTERIOR, MASKED, Fold, Tiles


class _Order(NamedTuple):
  """How a pipeline walks over the keys: all blocks of one block of heads, then those of the next.

  Attributes:
    heads: blocks of heads in a pipeline.
    num_blocks: blocks of keys.
  """

  heads: int
  num_blocks: int

  def at(self, s) -> tuple:
    """Block of heads, within the pipeline, and block of keys at a step; outside, the nearest."""
    s = jnp.clip(s, 0, self.heads * self.num_blocks - 1)
    if self.heads == 1:  # The compiler's profiler does not know division.
      return 0, s
    return jax.lax.div(s, self.num_blocks), jax.lax.rem(s, self.num_blocks)


class _Refs(NamedTuple):
  """What a step of the grid has in VMEM.

  "New" is the block of keys that the step scores, "old" the one of the step before.

  Attributes:
    q: of the new block's heads, [rows, W].
    k: the new block, [keys, W].
    v: the old block, [keys, W].
    row_segments: [1, rows], or None.
    key_segments: of the new block, [1, keys], or None.
    out: of the old block's heads, [rows, W].
    lse: likewise, [1, rows].
  """

  q: Any
  k: Any
  v: Any
  row_segments: Any
  key_segments: Any
  out: Any
  lse: Any


class _Step(NamedTuple):
  """One step of the grid: scores the new block of keys and consumes the old one.

  Attributes:
    refs: see there.
    parts: rows of all chunks and their sums, by how they lie.
    strips: pieces of a key block.
    old_left, new_left: valid keys from the start of the block on.
  """

  refs: _Refs
  parts: list[Rows]
  strips: list[slice]
  old_left: Array
  new_left: Array

  def score(self, rows, r, strip, masked):
    """Scores of a strip of the new block."""
    refs, at = self.refs, rows.at(r)
    s = rows.layout.score(refs.k[strip, :], refs.q[at, :])
    if masked:
      row_segments = None if refs.row_segments is None else refs.row_segments[:, at]
      left, axis = self.new_left, rows.layout.KEYS
      s = tile.hide(s, strip, left, row_segments, refs.key_segments, keys=axis)
    return s

  def values(self, strip, masked):
    """A strip of the old block."""
    v = self.refs.v[strip, :]
    return tile.clear_behind(v, strip, self.old_left) if masked else v

  def advance(self, r, *, consume, produce, masked=False):
    """Consumes the waiting scores of chunk r and puts those of the new block in their place."""
    sums = [rows.begin(r) for rows in self.parts] if consume else []
    highest: list[Any] = [None] * len(self.parts)
    for strip in self.strips:
      for i, rows in enumerate(self.parts):
        if produce:
          s = self.score(rows, r, strip, masked)
          top = rows.layout.some(s, jnp.max)
          highest[i] = top if highest[i] is None else jnp.maximum(highest[i], top)
        if consume:
          sums[i] = rows.consume(r, strip, self.values(strip, masked), sums[i])
        if produce:
          rows.scores[r, *rows.layout.strip(strip)] = s
    for i, rows in enumerate(self.parts):
      if produce:
        rows.highest[r] = highest[i]
      if consume:
        _, rows.total[r], rows.acc[r] = sums[i]

  def advance_together(self, chunks):
    """`advance` of chunks whose tiles are all seen as a whole.

    Without a branch between them the compiler starts one while the last products of the other are
    still on their way out of the matrix unit.
    """
    for r in chunks:
      self.advance(r, consume=True, produce=True)

  def advance_as_needed(self, r, old, new):
    """`advance` for what the tiles of the old and the new block need.

    Only what happens most has code of its own without masks: each case is as long as the others.
    """
    consume, produce = old != HIDDEN, new != HIDDEN
    plain = ((old == INTERIOR) | (old == MASKED)) & (new == INTERIOR)
    pl.when(plain)(functools.partial(self.advance, r, consume=True, produce=True))
    for case in ((True, True), (True, False), (False, True)):
      step = functools.partial(self.advance, r, consume=case[0], produce=case[1], masked=True)
      pl.when(~plain & (consume == case[0]) & (produce == case[1]))(step)

  def start(self):
    """No row has seen a key."""
    for rows in self.parts:
      rows.peak[...] = jnp.full_like(rows.peak, HIDDEN_SCORE)
      rows.total[...] = jnp.zeros_like(rows.total)
      rows.acc[...] = jnp.zeros_like(rows.acc)

  def finish(self, r):
    """Output and log-sum-exp of chunk r; 0 and -inf where a row saw no key."""
    for rows in self.parts:
      layout, at = rows.layout, rows.at(r)
      seen = rows.peak[r] > HIDDEN_SCORE
      total = jnp.where(seen, layout.whole(rows.total[r], jnp.sum), 1.0)
      out = jnp.where(seen, rows.acc[r] / total, 0.0)
      self.refs.out[at, :] = layout.upright(out).astype(self.refs.out.dtype)
      lse = jnp.where(seen, rows.peak[r] * LN2 + jnp.log(total), -jnp.inf)
      self.refs.lse[:, at] = layout.line(lse)


def _kernel(
  kinds_ref,
  lengths_ref,
  front_ref,
  back_ref,
  *refs,
  blocks: ForwardBlocks,
  order: _Order,
  total_chunks: int,
  segmented: bool,
):
  """All chunks of a block of rows; for the grid see `_grid`."""
  del front_ref, back_ref
  blocked = _Refs(*(refs[:7] if segmented else (*refs[:3], None, None, *refs[3:5])))
  parts = rows_of_chunk(blocks.chunk, refs[7 if segmented else 5 :])
  b, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  num_chunks, key_block = blocks.row_block // blocks.chunk, blocks.key_block
  (_, old), (_, new) = order.at(s - 1), order.at(s)
  old_left, new_left = (lengths_ref[b] - x * key_block for x in (old, new))
  step = _Step(blocked, parts, tile.strips_of(key_block, blocks.strip), old_left, new_left)

  def kinds(r):
    """What the tiles of chunk r need: with the old block, and with the new one."""
    first = (b * total_chunks + i * num_chunks + r) * order.num_blocks
    steps = order.heads * order.num_blocks
    return (
      jnp.where(s > 0, kinds_ref[first + old], HIDDEN),
      jnp.where(s < steps, kinds_ref[first + new], HIDDEN),
    )

  _for_all_chunks(step, num_chunks, kinds)

  @pl.when((s > 0) & (old == order.num_blocks - 1))
  def _finish():
    jax.lax.fori_loop(0, num_chunks, lambda r, _: step.finish(r), None)

  # The old block's sums are complete, and the new one's scores are in none yet.
  pl.when(new == 0)(step.start)


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


def _grid(B: int, KB: int, R: int, W: int, order: _Order, blocks: ForwardBlocks, segmented: bool):
  """The grid, and what of each array is in VMEM at a step.

  Its axes are the batch, the pipelines, the blocks of rows, and a pipeline's steps, one for each of
  its blocks of keys and one to consume the last.
  """
  key_block, num_chunks = blocks.key_block, blocks.row_block // blocks.chunk
  old, new = 1, 0  # Steps by which they lie behind.

  def heads(p, s, delay):
    return p * order.heads + order.at(s - delay)[0]

  def rows(delay):
    return pl.BlockSpec(
      (None, None, blocks.row_block, W), lambda b, p, i, s, *_: (b, heads(p, s, delay), i, 0)
    )

  def keys(delay):
    def at(b, p, i, s, kinds, lengths, front, back):
      del i, kinds, lengths
      block = order.at(s - delay)[1]
      return tile.seen(b, block, order.num_blocks, front, back), heads(p, s, delay)

    return at

  line = pl.BlockSpec(
    (None, None, 1, blocks.row_block), lambda b, p, i, s, *_: (b, heads(p, s, old), 0, i)
  )
  in_specs = [rows(new), *(tile.key_spec(key_block, W, keys(delay)) for delay in (new, old))]
  if segmented:
    in_specs += [
      pl.BlockSpec((None, 1, blocks.row_block), lambda b, p, i, s, *_: (b, 0, i)),
      tile.key_segments_spec(key_block, keys(new)),
    ]
  return pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=len(Tiles.__dataclass_fields__),
    grid=(B, KB // order.heads, R // blocks.row_block, order.heads * order.num_blocks + 1),
    in_specs=in_specs,
    out_specs=[rows(old), line],
    scratch_shapes=[
      pltpu.VMEM((num_chunks, *shape), jnp.float32)
      for shape in scratch_shapes(blocks.chunk, key_block, W)
    ],
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
  pipelines = KB if KB % blocks.cores else blocks.cores
  order = _Order(KB // pipelines, -(-fold.keys // blocks.key_block))
  kernel = functools.partial(
    _kernel,
    blocks=blocks,
    order=order,
    total_chunks=R // blocks.chunk,
    segmented=segments is not None,
  )
  return pl.pallas_call(
    kernel,
    name="slow_cross_attention_forward",
    grid_spec=_grid(B, KB, R, W, order, blocks, segments is not None),
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
