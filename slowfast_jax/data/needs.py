# SPDX-License-Identifier: Apache-2.0
"""What each sample needs of a row, known without its frames: the ground of packing and buckets.

Tokens are counted once for a tokenizer and kept beside the records, where they can be written.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from slowfast_jax.data.chat import IMAGE_TOKEN, encode_chat
from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.records import RecordText
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError


@runtime_checkable
class TextSource(Protocol):
  """What counting needs of a `RecordSource`."""

  index: Int[np.ndarray, "n 2"]

  def texts(self) -> Iterable[RecordText | None]: ...


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Sizes of the samples of a source, in the order of its index.

  Attributes:
    text: token ids, without placeholders; 0 for a sample that cannot be encoded.
    before: of these, before the first placeholder; all, where there is none.
    learned: of these, that are learned.
    frames: of its video or image; 0 for text.
  """

  text: Int[np.ndarray, " n"]
  before: Int[np.ndarray, " n"]
  learned: Int[np.ndarray, " n"]
  frames: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Needs:
  """What samples take of a row's bounds: decoder positions, querying positions, (fast) frames.

  Of a text alone, which queries nothing, learned positions take the place of querying ones.
  """

  positions: Int[np.ndarray, " n"]
  queries: Int[np.ndarray, " n"]
  frames: Int[np.ndarray, " n"]
  fast_frames: Int[np.ndarray, " n"]

  def fit(self, geometry: Geometry) -> np.ndarray:
    """Which samples fit whole into a row of their own."""
    return np.all(self.stacked() <= capacity(geometry), axis=1)

  def stacked(self) -> Int[np.ndarray, "n 4"]:
    return np.stack([self.positions, self.queries, self.frames, self.fast_frames], axis=1)


def capacity(geometry: Geometry) -> Int[np.ndarray, " 4"]:
  """A row's bounds, in the order of `Needs.stacked`."""
  bounds = (geometry.decoder_length, geometry.text_bound, geometry.row_frames)
  return np.array([*bounds, geometry.max_fast_frames])


def count_lengths(
  source: TextSource, tokenizer: Tokenizer, system: str, targets: str = "assistant"
) -> Lengths:
  """Encodes every conversation, as `encode_chat` does, or finds that this was done before."""
  file = _cache_file(source, tokenizer, system, targets)
  if file is not None and file.exists():
    with contextlib.suppress(OSError, ValueError, EOFError):
      table = np.load(file, allow_pickle=False)
      if table.shape == (4, len(source.index)):
        return Lengths(*table)
  table = _count(source, tokenizer, system, targets)
  if file is not None:
    with contextlib.suppress(OSError):  # A folder that may only be read: counted every time.
      partial = file.with_name(f"{file.name}.{os.getpid()}.partial.npy")
      np.save(partial, table)
      os.replace(partial, file)
  return Lengths(*table)


def needs_of(lengths: Lengths, geometry: Geometry) -> Needs:
  """What samples need of rows of a geometry, without regard to whether they fit."""
  sizes = [0, *np.unique(lengths.frames[lengths.frames > 0])]
  place = np.searchsorted(sizes, lengths.frames)
  used = np.array([len(geometry.used_frames(int(n))) if n else 0 for n in sizes])[place]
  fast = np.array([len(geometry.pooling(int(n))) if n else 0 for n in sizes])[place]
  positions = lengths.text + fast * geometry.tokens_per_frame
  queries = {
    "text-only": lengths.text,
    "text-only-masksystem": lengths.text - lengths.before,
    "all": positions,
  }[geometry.query_set]
  return Needs(positions, np.where(lengths.frames > 0, queries, lengths.learned), used, fast)


def _count(
  source: TextSource, tokenizer: Tokenizer, system: str, targets: str
) -> Int[np.ndarray, "4 n"]:
  table = np.zeros((4, len(source.index)), np.int32)
  pairs = {(int(r), int(c)): i for i, (r, c) in enumerate(source.index)}
  for place, counts in _counts(source, tokenizer, system, targets):
    if place in pairs:
      table[:, pairs[place]] = counts
  return table


def _counts(
  source: TextSource, tokenizer: Tokenizer, system: str, targets: str
) -> Iterator[tuple[tuple[int, int], tuple[int, int, int, int]]]:
  for record, text in enumerate(source.texts()):
    if text is None:
      continue
    for conversation, turns in enumerate(text.conversations):
      try:
        chat = encode_chat(tokenizer, turns, system, targets, int(text.frames > 0))
      except UserError:
        continue  # Left out, and told, when its turn comes.
      count = len(chat.ids) - (text.frames > 0)
      before = chat.ids.index(IMAGE_TOKEN) if text.frames else count
      yield (record, conversation), (count, before, sum(chat.loss_mask), text.frames)


def _cache_file(
  source: TextSource, tokenizer: Tokenizer, system: str, targets: str
) -> pathlib.Path | None:
  folder = getattr(source, "path", "")
  if not folder or "://" in folder:
    return None
  index = np.ascontiguousarray(source.index).tobytes()
  digest = hashlib.sha256()
  split = str(getattr(source, "split", ""))
  for text in (tokenizer.fingerprint(), system, split, targets):
    digest.update(hashlib.sha256(text.encode()).digest())
  digest.update(hashlib.sha256(index).digest())
  return pathlib.Path(folder) / f"lengths-{digest.hexdigest()[:16]}.npy"
