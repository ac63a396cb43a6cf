# SPDX-License-Identifier: Apache-2.0
"""Which samples share a row, and which rows a step has: all decided before the first step.

Samples are dealt to the smallest bucket that they fit, and within it packed to rows, once. From
then on a source is a list of rows, an epoch a permutation of them, and what step n holds follows
from n alone: on any number of processes, with nothing to save, and after any interruption.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from slowfast_jax.data.mixture import Draws, SampleOrder, derive_seed, shuffled
from slowfast_jax.data.needs import Lengths, Needs, capacity, needs_of
from slowfast_jax.data.packing import Geometry
from slowfast_jax.errors import UserError

# Samples are packed among so many: enough to fill rows, few enough to take seconds in a million.
_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Bucket:
  """A shape that steps may have.

  Attributes:
    geometry: of a row.
    batch_size: rows of the global batch.
  """

  geometry: Geometry
  batch_size: int


@dataclasses.dataclass(frozen=True)
class Rows:
  """Samples of one source in rows: row i holds samples[starts[i]:starts[i + 1]]."""

  samples: Int[np.ndarray, " n"]
  starts: Int[np.ndarray, " m"]

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, row: int) -> list[int]:
    return self.samples[self.starts[row] : self.starts[row + 1]].tolist()


def single_rows(num_samples: int) -> Rows:
  """Every sample alone, in the order of the source."""
  return Rows(np.arange(num_samples), np.arange(num_samples + 1))


def plan_rows(lengths: Lengths, buckets: Sequence[Geometry], pack: bool, seed: int) -> list[Rows]:
  """Deals the samples of one source to buckets, and packs them to rows there.

  A sample goes to the first bucket, in the order given, that it fits; one that fits none goes to
  the last, where it is cut or fails as in a run without buckets.
  """
  needs = [needs_of(lengths, geometry) for geometry in buckets]
  fits = np.stack([need.fit(geometry) for need, geometry in zip(needs, buckets)])
  fits &= ~np.outer([geometry.pooled for geometry in buckets], lengths.frames == 1)
  fits[-1] = True
  home = np.argmax(fits, axis=0)
  planned = []
  for i, geometry in enumerate(buckets):
    mine = np.flatnonzero(home == i)
    if pack:
      planned.append(_pack(mine, needs[i], geometry, seed))
    else:
      planned.append(Rows(mine, np.arange(len(mine) + 1)))
  return planned


def _pack(samples: Int[np.ndarray, " n"], needs: Needs, geometry: Geometry, seed: int) -> Rows:
  """Packs in random company: neighbours in a data set are often of one video."""
  bounds = capacity(geometry)
  wanted = np.minimum(needs.stacked(), bounds)  # One that is cut, or cannot be used, fills a row.
  order = samples[shuffled(len(samples), derive_seed(seed, 4))]
  rows: list[list[int]] = []
  for start in range(0, len(order), _WINDOW):
    rows += _pack_window(order[start : start + _WINDOW], wanted, bounds)
  starts = np.cumsum([0, *map(len, rows)])
  return Rows(np.array([i for row in rows for i in row], np.int64), starts)


def _pack_window(
  samples: Int[np.ndarray, " n"], wanted: Int[np.ndarray, "m 4"], bounds: Int[np.ndarray, " 4"]
) -> list[list[int]]:
  """First fit, largest first. Largest: by the bound that a sample uses most of."""
  share = (wanted[samples] / np.maximum(bounds, 1)).max(axis=1)
  rows: list[list[int]] = []
  free = np.zeros((len(samples), len(bounds)), np.int64)
  first_open = 0
  for i in samples[np.argsort(-share, kind="stable")].tolist():
    fitting = np.all(free[first_open : len(rows)] >= wanted[i], axis=1)
    place = first_open + int(np.argmax(fitting)) if fitting.any() else len(rows)
    if place == len(rows):
      rows.append([])
      free[place] = bounds
    rows[place].append(i)
    free[place] -= wanted[i]
    while first_open < len(rows) and free[first_open, 0] == 0:  # Full: look no further there.
      first_open += 1
  return rows


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a step stands: its bucket, and how many steps of that bucket came before."""

  bucket: int
  ordinal: int


class Schedule:
  """What every row of every step holds; a pure function of (seed, step).

  Args:
    rows: [source][bucket] -> rows.
    weights: of the sources: how often their samples come, relative to each other.
    batch_sizes: rows of a step, of each bucket.
    seed: of all orders.
  """

  def __init__(
    self,
    rows: Sequence[Sequence[Rows]],
    weights: Sequence[float],
    batch_sizes: Sequence[int],
    seed: int,
  ):
    samples = [sum(len(part.samples) for part in parts) for parts in rows]
    if not all(samples):
      raise UserError("The records hold no conversation to train on.")
    # Rows that a source gives each bucket for one drawn sample.
    demand = np.array(
      [
        [weight * len(part) / total for part in parts]
        for parts, weight, total in zip(rows, weights, samples)
      ]
    )
    self.used = [int(b) for b in np.flatnonzero(demand.sum(axis=0))]
    steps = [float(demand[:, b].sum()) / batch_sizes[b] for b in self.used]
    self._steps = Draws(tuple(steps), derive_seed(seed, 1))
    self._sources = {b: [int(s) for s in np.flatnonzero(demand[:, b])] for b in self.used}
    self._draws = {
      b: Draws(tuple(float(demand[s, b]) for s in sources), derive_seed(seed, 2, b))
      for b, sources in self._sources.items()
    }
    self._rows, self._seed = rows, seed

  def place(self, step: int) -> Place:
    """The bucket of a step."""
    which, ordinal = self._steps[step]
    return Place(self.used[which], ordinal)

  def row(self, bucket: int, position: int) -> tuple[int, list[int]]:
    """The source and the samples of a row, by its position in the endless stream of its bucket."""
    source, draw = self._draw(bucket, position)
    rows = self._rows[source][bucket]
    first = source == 0 and bucket == 0
    seed = self._seed if first else derive_seed(self._seed, 3, source, bucket)
    return source, rows[SampleOrder(len(rows), seed)[draw]]

  def epoch(self, bucket: int, position: int) -> int:
    """How often the source of a row was gone through before, for that bucket."""
    source, draw = self._draw(bucket, position)
    return draw // len(self._rows[source][bucket])

  def _draw(self, bucket: int, position: int) -> tuple[int, int]:
    which, draw = self._draws[bucket][position]
    return self._sources[bucket][which], draw
