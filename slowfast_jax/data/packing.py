# SPDX-License-Identifier: Apache-2.0
"""Samples to rows of `Batch`: fast positions spliced into text, targets, masks and the pooling map.

Training, evaluation and chat all build their rows here, so they cannot disagree.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.errors import UserError
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.shapes import FAST, PROMPT, QUERY_SETS, RESPONSE, Batch


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Static shapes of a row, and the rules that fill them.

  Attributes:
    num_frames: F, frames of a row.
    decoder_length: T, decoder positions of a row; longer samples are cut on the right.
    text_bound: X, the most positions of a row that query slow tokens. Of texts without frames,
      which query nothing, so many are learned at most: the loss counts on it.
    image_size: height and width of a frame in pixels.
    tokens_per_frame: fast tokens of a frame, after the compressor's spatial stride.
    sampling_stride: the compressor keeps every n-th frame.
    temporal_stride: the compressor averages n frames into one.
    min_fast_frames: fewest fast frames that the strides may leave of a longer video.
    max_fast_frames: Q, fast frames of a row; 0: what one video of num_frames needs.
    query_set: which positions query slow tokens.
    pooled: whether the tokens of the row's frames are pooled as those of videos; those of still
      images never are, so these have no place in it (semantics section 1.5).
    slow: whether the model has a slow path. Without one, rows hold only the frames that become
      fast tokens: nothing would read the others, and encoding them is most of the work.
  """

  num_frames: int
  decoder_length: int
  text_bound: int
  image_size: tuple[int, int]
  tokens_per_frame: int
  sampling_stride: int = 1
  temporal_stride: int = 4
  min_fast_frames: int = 16
  max_fast_frames: int = 0
  query_set: str = "text-only"
  pooled: bool = False
  slow: bool = True

  def __post_init__(self):
    if self.query_set not in QUERY_SETS:
      raise UserError(f"query_set must be one of {QUERY_SETS}, got {self.query_set!r}.")
    for field in ("num_frames", "decoder_length", "text_bound", "tokens_per_frame"):
      if getattr(self, field) < 1:
        raise UserError(f"{field} must be at least 1, got {getattr(self, field)}.")
    if self.max_fast_frames == 0:
      object.__setattr__(self, "max_fast_frames", len(self.pooling(self.num_frames)))

  def pooling(self, num_frames: int) -> Float[np.ndarray, "Q F"]:
    """The compressor's temporal map of one video. Shared: do not write to it."""
    return _pooling(num_frames, self.sampling_stride, self.temporal_stride, self.min_fast_frames)

  def used_frames(self, num_frames: int) -> Int[np.ndarray, " n"]:
    """Which frames of a video the model needs."""
    if self.slow:
      return np.arange(num_frames)
    return np.flatnonzero(self.pooling(num_frames).any(axis=0))

  @property
  def row_frames(self) -> int:
    """F of a row."""
    return len(self.used_frames(self.num_frames))

  def num_fast_tokens(self, num_frames: int) -> int:
    """Decoder positions that a video of so many frames takes."""
    return len(self.pooling(num_frames)) * self.tokens_per_frame


@dataclasses.dataclass(frozen=True)
class Sample:
  """A conversation with its frames.

  Attributes:
    ids: token ids, IMAGE_TOKEN where a video or image goes.
    loss_mask: 1 where the id is learned, else 0; None: nothing is.
    num_frames: frames of each video or image, in the order of the placeholders.
    frames: all of them, in that order; None where there are none.
  """

  ids: Sequence[int]
  loss_mask: Sequence[int] | None = None
  num_frames: tuple[int, ...] = ()
  frames: UInt8[np.ndarray, "n h w C"] | Float[np.ndarray, "n h w C"] | None = None


@dataclasses.dataclass(frozen=True)
class _Merged:
  """A sample's decoder positions, fast ones spliced in and cut to the decoder's length."""

  tokens: Int[np.ndarray, " n"]
  kind: Int[np.ndarray, " n"]
  learned: Bool[np.ndarray, " n"]


def build_row(samples: Sequence[Sample], geometry: Geometry) -> Batch:
  """Packs samples into one row, a `Batch` with B = 1.

  Fast token j of the row's flattened [Q, p] grid belongs to the row's j-th FAST position. The
  frames of a single sample that fills the row are not copied.

  Raises:
    UserError: a sample contradicts itself, or the samples exceed a bound of the geometry.
  """
  row = _padding(geometry, _row_frames(samples, geometry))
  first_position = first_query = first_frame = first_fast = bounded = 0
  for segment, sample in enumerate(samples, start=1):
    merged = _merge(sample, geometry)
    position = first_position + len(merged.tokens)
    _fit("decoder_length", position, geometry.decoder_length)
    _write_text(row, merged, slice(first_position, position), segment)

    queries = querying_positions(merged.kind, geometry.query_set)
    query = first_query + len(queries)
    bounded += len(queries) if (merged.kind == FAST).any() else int(merged.learned.sum())
    _fit("text_bound", bounded, geometry.text_bound)
    row.text_index[0, first_query:query] = first_position + queries

    for num_frames in sample.num_frames:
      if geometry.pooled and num_frames == 1:
        raise UserError(
          f"A still image has no place in a row of {geometry.num_frames} frames, whose tokens are "
          "pooled as those of videos; give data.buckets a shape of 1 frame."
        )
      used = geometry.used_frames(num_frames)
      block = geometry.pooling(num_frames)[:, used]
      frame, fast = first_frame + len(used), first_fast + len(block)
      _fit("max_fast_frames", fast, geometry.max_fast_frames)
      row.frame_segments[0, first_frame:frame] = segment
      row.pooling[0, first_fast:fast, first_frame:frame] = block
      first_frame, first_fast = frame, fast
    first_position, first_query = position, query
  return row


def collate(rows: Sequence[Batch]) -> Batch:
  """Stacks rows of the same geometry along B."""
  names = [field.name for field in dataclasses.fields(Batch)]
  return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})


def empty_row(geometry: Geometry) -> Batch:
  """A row of padding: it has no target and no slow token."""
  return _padding(geometry, _row_frames([], geometry))


def _padding(geometry: Geometry, frames: np.ndarray) -> Batch:
  T, F, Q, X = (
    geometry.decoder_length,
    geometry.row_frames,
    geometry.max_fast_frames,
    geometry.text_bound,
  )
  return Batch(
    tokens=np.zeros((1, T), np.int32),
    kind=np.zeros((1, T), np.int8),
    positions=np.zeros((1, T), np.int32),
    segments=np.zeros((1, T), np.int32),
    targets=np.zeros((1, T), np.int32),
    loss_weights=np.zeros((1, T), np.float32),
    frames=frames,
    frame_segments=np.zeros((1, F), np.int32),
    pooling=np.zeros((1, Q, F), np.float32),
    text_index=np.full((1, X), -1, np.int32),
  )


def querying_positions(kind: Int[np.ndarray, " n"], query_set: str) -> Int[np.ndarray, " m"]:
  """Positions of one sample that query its slow tokens; none where it has no visual position."""
  visual = kind == FAST
  if not visual.any():
    return np.zeros(0, np.int64)
  if query_set == "all":
    return np.arange(len(kind))
  text = (kind == PROMPT) | (kind == RESPONSE)
  if query_set == "text-only-masksystem":
    text[: np.argmax(visual)] = False
  return np.flatnonzero(text)


def _merge(sample: Sample, geometry: Geometry) -> _Merged:
  ids = np.asarray(sample.ids, np.int32)
  learned = np.zeros(len(ids), bool)
  if sample.loss_mask is not None:
    if len(sample.loss_mask) != len(ids):
      raise UserError(f"A sample has {len(ids)} ids and {len(sample.loss_mask)} of loss_mask.")
    learned |= np.asarray(sample.loss_mask, bool)
  placeholder = ids == IMAGE_TOKEN
  if placeholder.sum() != len(sample.num_frames):
    raise UserError(
      f"A sample has {placeholder.sum()} placeholder(s) ({IMAGE_TOKEN}) in its ids and "
      f"{len(sample.num_frames)} video(s) or image(s); write one placeholder for each."
    )
  kind = np.where(placeholder, FAST, np.where(learned, RESPONSE, PROMPT)).astype(np.int8)
  repeats = np.ones(len(ids), np.int64)
  repeats[placeholder] = [geometry.num_fast_tokens(n) for n in sample.num_frames]
  stop = geometry.decoder_length
  if not sample.num_frames:
    stop = min(stop, int(np.searchsorted(np.cumsum(learned), geometry.text_bound, "right")))
  columns = (np.where(placeholder, 0, ids), kind, learned & ~placeholder)
  return _Merged(*(np.repeat(column, repeats)[:stop] for column in columns))


def _write_text(row: Batch, merged: _Merged, positions: slice, segment: int) -> None:
  count = len(merged.tokens)
  row.tokens[0, positions] = merged.tokens
  row.kind[0, positions] = merged.kind
  row.positions[0, positions] = np.arange(count)
  row.segments[0, positions] = segment
  if count > 1:
    predicting = slice(positions.start, positions.stop - 1)
    row.targets[0, predicting] = merged.tokens[1:]
    row.loss_weights[0, predicting] = merged.learned[1:]


def _row_frames(samples: Sequence[Sample], geometry: Geometry) -> np.ndarray:
  """Frames of all samples, one after the other, then zeros: [1, F, h, w, C]."""
  for sample in samples:
    got = None if sample.frames is None else sample.frames.shape
    expected = (sum(sample.num_frames), *geometry.image_size, 3)
    if got != expected and (got is not None or sample.num_frames):
      raise UserError(f"A sample's frames must have shape {expected}, got {got}.")
  frames = [_used(sample, geometry) for sample in samples if sample.frames is not None]
  count = sum(len(part) for part in frames)
  _fit("num_frames", count, geometry.row_frames)
  if len(frames) == 1 and count == geometry.row_frames:
    return frames[0][None]
  # uint8 pixels in training; the Python interface also takes frames that are normalised.
  dtype = np.result_type(*frames) if frames else np.uint8
  row = np.zeros((1, geometry.row_frames, *geometry.image_size, 3), dtype)
  if frames:
    np.concatenate(frames, out=row[0, :count])
  return row


def _used(sample: Sample, geometry: Geometry) -> np.ndarray:
  assert sample.frames is not None
  if geometry.slow:
    return sample.frames
  starts = np.cumsum([0, *sample.num_frames])
  used = [start + geometry.used_frames(n) for start, n in zip(starts, sample.num_frames)]
  return sample.frames[np.concatenate(used)]


def _fit(bound: str, needed: int, available: int) -> None:
  if needed > available:
    raise UserError(
      f"{bound} is {available} and the row needs {needed}, {needed - available} too many: "
      f"raise {bound}, or put less in a row."
    )


@functools.lru_cache(maxsize=256)
def _pooling(*arguments: int) -> Float[np.ndarray, "Q F"]:
  matrix = pooling_matrix(*arguments)
  matrix.flags.writeable = False
  return matrix
