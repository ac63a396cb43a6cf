# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels share: products, masks and pieces of a tile, and the keys that a step reads.

A tile is transposed, [keys, rows]: one chunk of rows against one block of keys.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Finite, so that a row that has seen no key yet has no NaN; its garbage is wiped by the factor
# exp2(HIDDEN_SCORE - maximum) = 0 as soon as it sees one.
HIDDEN_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)
LN2 = math.log(2.0)
PLAIN = (((1,), (0,)), ((), ()))
ROWS_OF_BOTH = (((1,), (1,)), ((), ()))
COLUMNS_OF_BOTH = (((0,), (0,)), ((), ()))
SUBLANES = 8


def dot(x, y, contracting):
  """A product on the matrix unit, accumulated in float32; float32 operands keep their bits."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, contracting, precision=precision, preferred_element_type=jnp.float32
  )


def halve(x, combine):
  """Reduces [keys, rows] to [8, rows] without crossing sublanes."""
  return combine(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def hide(s, part, left, row_segments, key_segments, keys: int = 0):
  """Replaces the scores of a strip that do not count.

  Args:
    s: scores, [keys, rows] or [rows, keys].
    part: where in the block the strip lies, a slice.
    left: valid keys of the block, may be more than it holds.
    row_segments: [1, rows], or None.
    key_segments: those of the whole block, [1, keys], together with `row_segments`.
    keys: the axis of the keys.
  """
  mask = jax.lax.broadcasted_iota(jnp.int32, s.shape, keys) < left - part.start
  if row_segments is not None:
    segments = key_segments[:, part]
    upright, lying = (segments, row_segments) if keys == 0 else (row_segments, segments)
    column = jnp.broadcast_to(upright, (SUBLANES, s.shape[0])).T[:, :1]
    mask &= column == lying
  return jnp.where(mask, s, HIDDEN_SCORE)


def clear_behind(x, part, left):
  """Zeros behind the last key of a strip [keys, W], which is undefined, because 0 * NaN is NaN."""
  inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < left - part.start
  return jnp.where(inside, x, 0)


def strips_of(key_block: int, strip: int) -> list[slice]:
  """The pieces of a block of keys that are in registers at a time."""
  return [slice(x, min(x + strip, key_block)) for x in range(0, key_block, strip)]


def rows_of(chunk_index, chunk: int):
  """Where the rows of a chunk lie."""
  return pl.ds(pl.multiple_of(chunk_index * chunk, chunk), chunk)


def seen(b, block, num_blocks: int, front, back):
  """The block of keys that a step reads for `block`.

  What no query sees at the front and at the back, by the fields of `Tiles`, is not read: the index
  stays where it is.
  """
  return jnp.clip(block, front[b], num_blocks - 1 - back[b])


def key_spec(key_block: int, width: int, at: Callable) -> pl.BlockSpec:
  """A block of K or V, [B, S, L].

  Args:
    key_block: keys in it.
    width: lanes of a block of heads.
    at: block of keys and block of heads by the grid's indices, batch first, and the prefetched
      scalars.
  """
  return pl.BlockSpec((None, key_block, width), lambda b, *x: (b, *at(b, *x)))


def key_segments_spec(key_block: int, at: Callable) -> pl.BlockSpec:
  """The segments of a block of keys, [B, 1, S]; `at` as for `key_spec`."""
  return pl.BlockSpec((None, 1, key_block), lambda b, *x: (b, 0, at(b, *x)[0]))


def segment_inputs(segments) -> tuple:
  """The kernels' inputs for segments of rows [B, 1, R] and keys [B, S], none without them."""
  return () if segments is None else (segments[0], segments[1][:, None])
