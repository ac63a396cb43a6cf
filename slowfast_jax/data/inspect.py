# SPDX-License-Identifier: Apache-2.0
"""What is in a records folder, as text for a terminal; `sheet` makes a page of it."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import simplejpeg

from slowfast_jax.data.records import Record, RecordsError, RecordSource

_BINS = 8
_BAR_WIDTH = 30


@dataclasses.dataclass(frozen=True)
class RecordFacts:
  """Facts of one record; `num_bytes` of its frames."""

  kind: str
  frames: int
  lost_frames: int
  duration: float
  source_size: tuple[int, int]
  frame_size: tuple[int, int]
  num_bytes: int
  conversations: int
  question_words: int
  answer_words: int


@dataclasses.dataclass(frozen=True)
class FolderFacts:
  """Facts of a records folder; `sample` holds those of some records, spread over all."""

  path: str
  records: int
  conversations: int
  shards: int
  num_bytes: int
  sample: list[RecordFacts]


def folder_facts(source: RecordSource, sample_size: int = 500) -> FolderFacts:
  """Reads the facts; of a large folder, from a part of its records."""
  return FolderFacts(
    path=source.path,
    records=len(source),
    conversations=len(source.index),
    shards=len(source.shards),
    num_bytes=source.num_bytes,
    sample=[_record_facts(record) for record in spread(source, sample_size)],
  )


def format_facts(facts: FolderFacts) -> str:
  """The facts as text for a terminal."""
  sample = facts.sample
  kinds = collections.Counter(record.kind for record in sample)
  lines = [
    f"{facts.path}: {facts.records} records, {facts.conversations} conversations, "
    f"{facts.num_bytes / 1e6:.1f} MB in {facts.shards} shards",
  ]
  if len(sample) < facts.records:
    lines.append(f"From here on: {len(sample)} records, spread evenly.")
  lines.append(f"kinds: {_counts(kinds)}")
  pictured = [record for record in sample if record.frames]
  if pictured:
    sizes = collections.Counter(_pixels(record.frame_size) for record in pictured)
    sources = collections.Counter(_pixels(record.source_size) for record in pictured)
    each = sum(record.num_bytes for record in pictured) / sum(record.frames for record in pictured)
    lines.append(f"stored frames: {_counts(sizes)}, {each / 1e3:.1f} kB each")
    lines.append(f"source sizes: {_counts(sources)}")
  if lost := sum(record.lost_frames for record in sample):
    lines.append(f"frames missing because their videos are damaged: {lost}")
  videos = [record for record in sample if record.kind == "video"]
  charts: dict[str, list[float]] = {
    "frames a video": [video.frames for video in videos],
    "duration in seconds": [video.duration for video in videos],
    "conversations a record": [record.conversations for record in sample],
    "words asked a conversation": [r.question_words / max(r.conversations, 1) for r in sample],
    "words answered a conversation": [r.answer_words / max(r.conversations, 1) for r in sample],
  }
  for title, values in charts.items():
    if values:
      lines += ["", title, *histogram(values)]
  return "\n".join(lines)


def histogram(values: Sequence[float]) -> list[str]:
  """Lines of a text histogram; the upper bound of a bin belongs to the next."""
  low, high = min(values), max(values)
  whole = all(float(value).is_integer() for value in values)
  step = (high - low) / _BINS
  if whole:
    step = math.ceil((high - low + 1) / _BINS)
  if not step:
    return [f"  {low:.6g} everywhere"]
  bins = collections.Counter(min(int((value - low) / step), _BINS - 1) for value in values)
  labels = [_bin_label(low + i * step, step, whole) for i in range(max(bins) + 1)]
  width, most = max(map(len, labels)), max(bins.values())
  bars = ["█" * math.ceil(bins[i] / most * _BAR_WIDTH) for i in range(len(labels))]
  return [
    f"  {label:>{width}}  {bar} {bins[i]}" for i, (label, bar) in enumerate(zip(labels, bars))
  ]


def spread(source: RecordSource, count: int) -> Iterator[Record]:
  """So many records, or all, spread evenly."""
  count = min(count, len(source))
  for i in range(count):
    yield source[i * len(source) // count]


def _record_facts(record: Record) -> RecordFacts:
  words = {"human": 0, "gpt": 0, "system": 0}
  for turns in record.conversations:
    for turn in turns:
      words[turn["from"]] += len(turn["value"].split())
  return RecordFacts(
    kind=record.metadata["kind"],
    frames=len(record.frames),
    lost_frames=record.metadata.get("decode_errors", 0),
    duration=record.duration,
    source_size=(record.height, record.width),
    frame_size=_frame_size(record),
    num_bytes=sum(map(len, record.frames)),
    conversations=len(record.conversations),
    question_words=words["human"],
    answer_words=words["gpt"],
  )


def _frame_size(record: Record) -> tuple[int, int]:
  if not record.frames:
    return 0, 0
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(record.frames[0])
  except ValueError as error:
    raise RecordsError(f"record {record.id!r}: its first frame is no JPEG: {error}") from error
  return height, width


def _counts(counter: collections.Counter) -> str:
  parts = [f"{count} {name}" for name, count in counter.most_common(5)]
  if len(counter) > 5:
    parts.append(f"and {len(counter) - 5} more")
  return ", ".join(parts)


def _pixels(size: tuple[int, int]) -> str:
  return f"of {size[1]}x{size[0]}"


def _bin_label(start: float, step: float, whole: bool) -> str:
  if not whole:
    return f"{start:.1f} to {start + step:.1f}"
  return f"{start:.0f}" if step == 1 else f"{start:.0f} to {start + step - 1:.0f}"
