# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of slow cross-attention, forward: output and log-sum-exp.

Scores are kept transposed, [keys, rows]: statistics of a row are then lane-wise and nothing is
transposed but the output. The body is software-pipelined over key blocks: a step computes the
scores of block j on the matrix unit while the vector unit exponentiates those of block j - 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention.blocks import ForwardBlocks
from slowfast_jax.kernels.cross_attention.tiling import HIDDEN, INTERIOR, TAIL, Fold, Tiles

# Finite, so that a row that has seen no key yet has no NaN; its garbage is wiped by the factor
# exp2(HIDDEN_SCORE - maximum) = 0 as soon as it sees one.
HIDDEN_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)
LN2 = math.log(2.0)
ROWS_OF_BOTH = (((1,), (1,)), ((), ()))
COLUMNS_OF_BOTH = (((0,), (0,)), ((), ()))
SUBLANES = 8


def dot(x, y, contracting):
  """A product on the matrix unit, accumulated in float32; float32 operands keep their bits."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, contracting, precision=precision, preferred_element_type=jnp.float32
  )


def visible(shape, first_key, num_keys, q_segments, kv_segments):
  """Mask of a transposed tile [keys, rows] whose first key is `first_key` of a block.

  Args:
    shape: the tile's.
    first_key: where in the block the tile starts, static.
    num_keys: valid keys of the block, may be more than it holds.
    q_segments: [1, rows], or None.
    kv_segments: [1, keys], or None.
  """
  keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  mask = keys < num_keys - first_key
  if q_segments is not None:
    column = jnp.broadcast_to(kv_segments, (SUBLANES, shape[0])).T[:, :1]
    mask &= column == q_segments
  return mask


def _halve(x, combine):
  """Reduces [keys, rows] to [8, rows] without crossing sublanes."""
  return combine(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def _kernel(
  kinds_ref,
  lengths_ref,
  front_ref,
  back_ref,
  q_ref,
  k_ref,
  v_ref,
  *refs,
  blocks: ForwardBlocks,
  num_blocks: int,
  total_chunks: int,
):
  """One key block, all chunks of a block of rows.

  Grid (batch, block of heads, block of rows, num_blocks + 1): step j scores block j and consumes
  block j - 1, whose scores wait in `s_ref` with their maximum over all but 8 keys in `c_ref`.
  """
  del front_ref, back_ref
  *segment_refs, o_ref, lse_ref, m_ref, l_ref, acc_ref, s_ref, c_ref = refs
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  num_chunks, key_block, chunk = s_ref.shape
  strip = min(blocks.strip, key_block)
  strips = [slice(x, min(x + strip, key_block)) for x in range(0, key_block, strip)]

  def kind(r, block):
    return kinds_ref[(b * total_chunks + i * num_chunks + r) * num_blocks + block]

  def rows(r):
    return pl.ds(pl.multiple_of(r * chunk, chunk), chunk)

  def score(r, part, masked):
    s = dot(k_ref[part, :], q_ref[rows(r), :], ROWS_OF_BOTH)
    if masked:
      left = lengths_ref[b] - j * key_block
      pair = (None, None)
      if segment_refs:
        pair = (segment_refs[0][:, rows(r)], segment_refs[1][:, part])
      s = jnp.where(visible(s.shape, part.start, left, *pair), s, HIDDEN_SCORE)
    return s

  def step(r, *, consume, produce, masked=False, tail=False):
    """Consumes the waiting scores of chunk r and puts those of block j in their place."""
    if consume:
      peak = jnp.maximum(m_ref[r], jnp.max(c_ref[r], axis=0, keepdims=True))
      shrink = jnp.exp2(m_ref[r] - peak)
      m_ref[r] = peak
      total, acc = l_ref[r] * shrink, acc_ref[r] * shrink
    highest = None
    for part in strips:
      if produce:
        s = score(r, part, masked)
        top = _halve(s, jnp.max)
        highest = top if highest is None else jnp.maximum(highest, top)
      if consume:
        p = jnp.exp2(s_ref[r, part] - peak)
        total += _halve(p, jnp.sum)
        v = v_ref[part, :]
        if tail:
          # What lies behind the last key is undefined, and 0 * NaN is NaN.
          left = lengths_ref[b] - (j - 1) * key_block - part.start
          v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < left, v, 0)
        acc += dot(v, p.astype(v.dtype), COLUMNS_OF_BOTH)
      if produce:
        s_ref[r, part] = s
    if produce:
      c_ref[r] = highest
    if consume:
      l_ref[r], acc_ref[r] = total, acc

  def chunk_step(r, carry):
    new = jnp.where(j < num_blocks, kind(r, jnp.minimum(j, num_blocks - 1)), HIDDEN)
    old = jnp.where(j > 0, kind(r, jnp.maximum(j - 1, 0)), HIDDEN)
    has_old, has_new = old != HIDDEN, new != HIDDEN
    for masked in (False, True):
      this = (new != INTERIOR) == masked
      pl.when(has_old & has_new & this)(
        functools.partial(step, r, consume=True, produce=True, masked=masked)
      )
      pl.when(~has_old & has_new & this)(
        functools.partial(step, r, consume=False, produce=True, masked=masked)
      )
    # Behind a tail everything is hidden, so only this step meets one.
    for tail in (False, True):
      pl.when(has_old & ~has_new & ((old == TAIL) == tail))(
        functools.partial(step, r, consume=True, produce=False, tail=tail)
      )
    return carry

  @pl.when(j == 0)
  def _start():
    m_ref[...] = jnp.full_like(m_ref, HIDDEN_SCORE)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  jax.lax.fori_loop(0, num_chunks, chunk_step, 0)

  def finish(r, carry):
    seen = m_ref[r] > HIDDEN_SCORE
    total = jnp.where(seen, jnp.sum(l_ref[r], axis=0, keepdims=True), 1.0)
    out = jnp.where(seen, acc_ref[r] / total, 0.0)
    o_ref[rows(r), :] = out.T.astype(o_ref.dtype)
    lse_ref[:, rows(r)] = jnp.where(seen, m_ref[r] * LN2 + jnp.log(total), -jnp.inf)
    return carry

  @pl.when(j == num_blocks)
  def _finish():
    jax.lax.fori_loop(0, num_chunks, finish, 0)


def forward(
  q: Float[Array, "B KB R W"],
  k: Float[Array, "B S L"],
  v: Float[Array, "B S L"],
  tiles: Tiles,
  row_segments: Int[Array, "B 1 R"] | None,
  kv_segments: Int[Array, "B S"] | None,
  *,
  fold: Fold,
  blocks: ForwardBlocks,
  interpret=False,
) -> tuple[Float[Array, "B KB R W"], Float[Array, "B KB 1 R"]]:
  """Folded outputs and natural log-sum-exps.

  Args:
    q: folded queries times scale * log2(e).
    k: keys as `Fold.keys_view` gives them.
    v: values likewise.
    tiles: the plan for these blocks.
    row_segments: from `Fold.fold_segments`, or None.
    kv_segments: segments of the keys, together with `row_segments`.
    fold: the call's shapes.
    blocks: block sizes; R is a multiple of `row_block`, that of `chunk`.
    interpret: Pallas's interpreter instead of the compiler.

  Returns:
    Output in q's dtype, and log-sum-exp; 0 and -inf in rows that see no key.
  """
  B, KB, R, W = q.shape
  S, key_block, chunk = fold.keys, blocks.key_block, blocks.chunk
  num_blocks, num_chunks = -(-S // key_block), blocks.row_block // chunk

  def clamped(shift, lanes_last):
    def index(b, h, i, j, kinds, lengths, front, back):
      block = jnp.clip(j - shift, front[b], num_blocks - 1 - back[b])
      return (b, block, h) if lanes_last else (b, 0, block)

    return index

  row_spec = pl.BlockSpec((None, None, blocks.row_block, W), lambda b, h, i, j, *_: (b, h, i, 0))
  line_spec = pl.BlockSpec((None, None, 1, blocks.row_block), lambda b, h, i, j, *_: (b, h, 0, i))
  in_specs = [
    row_spec,
    pl.BlockSpec((None, key_block, W), clamped(0, True)),
    pl.BlockSpec((None, key_block, W), clamped(1, True)),
  ]
  inputs = [q, k, v]
  if row_segments is not None and kv_segments is not None:
    in_specs += [
      pl.BlockSpec((None, 1, blocks.row_block), lambda b, h, i, j, *_: (b, 0, i)),
      pl.BlockSpec((None, 1, key_block), clamped(0, False)),
    ]
    inputs += [row_segments, kv_segments[:, None]]
  line = (num_chunks, SUBLANES, chunk)
  return pl.pallas_call(
    functools.partial(_kernel, blocks=blocks, num_blocks=num_blocks, total_chunks=R // chunk),
    name="slow_cross_attention_forward",
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(B, KB, R // blocks.row_block, num_blocks + 1),
      in_specs=in_specs,
      out_specs=[row_spec, line_spec],
      scratch_shapes=[
        pltpu.VMEM((num_chunks, 1, chunk), jnp.float32),
        pltpu.VMEM(line, jnp.float32),
        pltpu.VMEM((num_chunks, W, chunk), jnp.float32),
        pltpu.VMEM((num_chunks, key_block, chunk), jnp.float32),
        pltpu.VMEM(line, jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((B, KB, 1, R), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=blocks.vmem_limit,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * B * KB * R * S * W,
      transcendentals=B * KB * R * S,
      bytes_accessed=2 * q.nbytes + (R // blocks.row_block) * (k.nbytes + v.nbytes),
    ),
    interpret=interpret,
  )(*tiles.scalars(), *inputs)
