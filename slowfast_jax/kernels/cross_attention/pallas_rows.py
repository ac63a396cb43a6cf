# SPDX-License-Identifier: Apache-2.0
"""The rows of a chunk in the forward kernel, and their sums over the keys.

Rows lie on lanes, scores are [keys, rows]: maximum and sum over keys are element-wise over
registers. What is left over after multiples of 128 rows, a half of 128 at most, lies on sublanes,
[rows, keys]: on lanes it would cost the matrix unit as much as 128 rows.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from slowfast_jax.kernels.cross_attention import pallas_tile as tile
from slowfast_jax.kernels.cross_attention.pallas_tile import SUBLANES
from slowfast_jax.kernels.cross_attention.tiling import LANES


class OnLanes:
  """Scores are [keys, rows], the output [W, rows], what there is one of a row [1, rows]."""

  KEYS = 0

  @staticmethod
  def scratch(rows: int, keys: int, width: int) -> tuple:
    """Shapes of the fields of `Rows`, without the chunks."""
    return (1, rows), (SUBLANES, rows), (width, rows), (keys, rows), (SUBLANES, rows)

  @staticmethod
  def strip(part: slice) -> tuple:
    """Where the scores of some keys are."""
    return part, slice(None)

  @staticmethod
  def score(k, q):
    """Scores of keys [keys, W] and rows [rows, W]."""
    return tile.dot(k, q, tile.ROWS_OF_BOTH)

  @staticmethod
  def weigh(p, v):
    """The output's sum over keys."""
    return tile.dot(v, p, tile.COLUMNS_OF_BOTH)

  @staticmethod
  def some(x, combine):
    """Reduces over most keys, by whole registers."""
    return tile.halve(x, combine)

  @staticmethod
  def whole(x, combine):
    """Reduces what `some` leaves."""
    return combine(x, axis=0, keepdims=True)

  @staticmethod
  def upright(out):
    """The output as [rows, W]."""
    return out.T

  @staticmethod
  def line(x):
    """What there is one of a row, as [1, rows]."""
    return x


class OnSublanes:
  """Scores are [rows, keys], the output [rows, W], what there is one of a row [rows, 1]."""

  KEYS = 1

  @staticmethod
  def scratch(rows: int, keys: int, width: int) -> tuple:
    return (rows, 1), (rows, LANES), (rows, width), (rows, keys), (rows, LANES)

  @staticmethod
  def strip(part: slice) -> tuple:
    return slice(None), part

  @staticmethod
  def score(k, q):
    return tile.dot(q, k, tile.ROWS_OF_BOTH)

  @staticmethod
  def weigh(p, v):
    return tile.dot(p, v, tile.PLAIN)

  @staticmethod
  def some(x, combine):
    columns = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    return functools.reduce(lambda a, b: combine(jnp.stack((a, b)), axis=0), columns)

  @staticmethod
  def whole(x, combine):
    return combine(x, axis=1, keepdims=True)

  @staticmethod
  def upright(out):
    return out

  @staticmethod
  def line(x):
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


class Rows(NamedTuple):
  """Rows of each chunk that lie in the same way. C chunks; shapes as `OnLanes` has them.

  Attributes:
    layout: `OnLanes` or `OnSublanes`.
    first: the first of them in a chunk.
    num_rows: of each chunk.
    peak: highest score of each row so far, [C, 1, rows].
    total: sum of its exponentials over most keys, [C, 8, rows].
    acc: output before the division, [C, W, rows].
    scores: those of the block that waits to be consumed, [C, keys, rows].
    highest: their maximum over most keys, [C, 8, rows].
  """

  layout: Any
  first: int
  num_rows: int
  peak: Any
  total: Any
  acc: Any
  scores: Any
  highest: Any

  def at(self, r):
    """Where the rows of chunk r lie; a chunk of two layouts is the only one."""
    return (
      slice(self.first, self.first + self.num_rows)
      if self.first
      else tile.rows_of(r, self.num_rows)
    )

  def begin(self, r) -> tuple:
    """Peak, total and output for the peak that the waiting scores bring."""
    peak = jnp.maximum(self.peak[r], self.layout.whole(self.highest[r], jnp.max))
    shrink = jnp.exp2(self.peak[r] - peak)
    self.peak[r] = peak
    return peak, self.total[r] * shrink, self.acc[r] * shrink

  def consume(self, r, part: slice, v, sums: tuple) -> tuple:
    """Adds a strip of waiting scores and its values [keys, W] to the sums."""
    peak, total, acc = sums
    p = jnp.exp2(self.scores[r, *self.layout.strip(part)] - peak)
    total += self.layout.some(p, jnp.sum)
    return peak, total, acc + self.layout.weigh(p.astype(v.dtype), v)


def _layouts(chunk: int) -> list:
  """Layouts of a chunk, with the first row and the number of rows of each."""
  over = chunk % LANES
  return [(OnLanes, 0, chunk - over), *([(OnSublanes, chunk - over, over)] if over else [])]


def scratch_shapes(chunk: int, keys: int, width: int) -> list[tuple]:
  """Shapes that `rows_of_chunk` expects, each without the chunks."""
  return [
    shape for layout, _, rows in _layouts(chunk) for shape in layout.scratch(rows, keys, width)
  ]


def rows_of_chunk(chunk: int, scratch) -> list[Rows]:
  """The rows of a chunk by their layouts, with the scratch memory that they have."""
  return [Rows(*layout, *scratch[5 * i : 5 * i + 5]) for i, layout in enumerate(_layouts(chunk))]
