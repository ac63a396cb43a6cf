# SPDX-License-Identifier: Apache-2.0
"""Several records folders in one stream, each with its share: an endless, seekable order of draws.

A mixture file is a JSON list, or {"sources": [...]}, of objects {"name", "path", "weight",
"licence"}. A weight says how often a source's samples come, whatever its size: weights 3 and 1 are
three samples of the first for each of the second. Without weights every sample comes equally often.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence

import grain
import numpy as np

from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.tfds import open_records
from slowfast_jax.errors import UserError

# Shares are exact to one in so many; each has at least that.
_CYCLE = 10_000
# Within so many positions, which divide the cycle, the order is shuffled: else a share of one half
# would be every other position, and could fall in step with rows or buckets.
_WINDOW = 20

_FIELDS: dict[str, type | tuple[type, ...]] = {
  "name": str,
  "path": str,
  "weight": (int, float),
  "licence": str,
}


class MixtureError(UserError):
  """A mixture file cannot be used: the file, the source, the field and what it should be."""


@dataclasses.dataclass(frozen=True)
class MixtureSource:
  """One source of a mixture file.

  Attributes:
    name: for people; unique.
    path: of the records folder; relative ones start from the mixture file.
    weight: share of the samples, relative to the other sources'; None = by its size.
    licence: of the data, for people.
  """

  name: str
  path: str
  weight: float | None = None
  licence: str = ""


def read_mixture(path: str | os.PathLike) -> list[MixtureSource]:
  """Reads a mixture file.

  Raises:
    MixtureError: it is not readable, or a field is missing, unknown or wrong.
  """
  file = pathlib.Path(path)
  try:
    value = json.loads(file.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise MixtureError(f"{file}: cannot be read: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise MixtureError(f"{file}: not JSON: {error}") from error
  if isinstance(value, dict):
    value = value.get("sources")
  if not isinstance(value, list) or not value:
    raise MixtureError(f'{file}: expected a list of sources, or an object with "sources"')
  sources = [_parse(file, number, fields) for number, fields in enumerate(value, start=1)]
  names = [source.name for source in sources]
  if twice := [name for name in names if names.count(name) > 1]:
    raise MixtureError(f"{file}: two sources are called {twice[0]!r}; give each its own name")
  unweighted = [source.name for source in sources if source.weight is None]
  if unweighted and len(unweighted) < len(sources):
    raise MixtureError(f"{file}: {unweighted[0]!r} has no weight and others have; give all or none")
  return sources


def _parse(file: pathlib.Path, number: int, fields: object) -> MixtureSource:
  where = f"{file}: source {number}"
  if not isinstance(fields, dict):
    raise MixtureError(f"{where}: expected an object with {list(_FIELDS)}, got {fields!r:.80}")
  for name, value in fields.items():
    if name not in _FIELDS:
      raise MixtureError(f"{where}: there is no field {name!r}; it may have {list(_FIELDS)}")
    if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
      kind = "a number" if name == "weight" else "a text"
      raise MixtureError(f"{where}: {name} must be {kind}, got {value!r:.80}")
  if not fields.get("path"):
    raise MixtureError(f"{where}: path is missing; give a folder that `slowfast prepare` wrote")
  weight = fields.get("weight")
  if weight is not None and not 0 < weight < math.inf:
    raise MixtureError(f"{where}: weight must be a positive number, got {weight!r}")
  path = os.fspath(file.parent / fields["path"]) if "://" not in fields["path"] else fields["path"]
  name = fields.get("name") or pathlib.Path(path).name
  return MixtureSource(name, path, weight, fields.get("licence", ""))


def open_mixture(path: str | os.PathLike) -> tuple[list[RecordSource], list[float]]:
  """The sources of a mixture file and their weights, which for sources without are their sizes."""
  listed = read_mixture(path)
  sources = [open_records(source.path) for source in listed]
  weights = [
    float(len(source.index)) if entry.weight is None else float(entry.weight)
    for source, entry in zip(sources, listed)
  ]
  return sources, weights


@dataclasses.dataclass(frozen=True)
class SampleOrder:
  """An endless sequence of numbers below a bound: every epoch is a new permutation of them."""

  num_samples: int
  seed: int

  def __getitem__(self, position: int) -> int:
    epoch, i = divmod(position, self.num_samples)
    return grain.experimental.index_shuffle(
      i, max_index=self.num_samples - 1, seed=derive_seed(self.seed, epoch), rounds=4
    )


@dataclasses.dataclass(frozen=True)
class Draws:
  """An endless sequence of choices between sources, by weight; a pure function of (seed, position).

  Any cycle of 10,000 choices holds exactly each source's share, spread evenly over it.
  """

  weights: tuple[float, ...]
  seed: int

  def __getitem__(self, position: int) -> tuple[int, int]:
    """Which source is chosen at a position, and how often it was before."""
    if len(self.weights) == 1:
      return 0, position
    window, i = divmod(position, _WINDOW)
    i = int(_window(self.seed, window)[i])
    cycle, slot = divmod(window * _WINDOW + i, _CYCLE)
    which, rank, counts = _cycle(self.weights)
    source = int(which[slot])
    return source, cycle * int(counts[source]) + int(rank[slot])


@functools.lru_cache(maxsize=1024)
def _window(seed: int, window: int) -> np.ndarray:
  return shuffled(_WINDOW, derive_seed(seed, window))


@functools.lru_cache(maxsize=64)
def _cycle(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The source at each place of a cycle, how often it was before in it, and how often in all."""
  counts = _apportion(weights)
  which = np.repeat(np.arange(len(counts)), counts)
  rank = np.concatenate([np.arange(count) for count in counts])
  order = np.argsort((rank + 0.5) / counts[which], kind="stable")
  return which[order], rank[order], counts


def _apportion(weights: Sequence[float]) -> np.ndarray:
  """Whole shares of a cycle, by largest remainders, none of them 0."""
  exact = np.array(weights, float) / sum(weights) * _CYCLE
  counts = np.maximum(np.floor(exact), 1).astype(int)
  while counts.sum() < _CYCLE:
    counts[np.argmax(exact - counts)] += 1
  while counts.sum() > _CYCLE:  # Tiny weights were raised to 1.
    counts[np.argmax(counts)] -= 1
  return counts


@functools.lru_cache(maxsize=4096)  # Neighbours in a stream ask for the same.
def derive_seed(*parts: int) -> int:
  """A seed that depends on all of these numbers, the same on every machine."""
  # Hashed, not added: else epoch 1 of seed 0 would be epoch 0 of seed 1.
  return int(np.random.SeedSequence(parts).generate_state(1)[0])


def shuffled(count: int, seed: int) -> np.ndarray:
  """The numbers below a bound in a random order that no release of NumPy will change."""
  return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
