# SPDX-License-Identifier: Apache-2.0
"""Distributions of a data set: frames, duration, turns and tokens; as text and as pictures."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slowfast_jax.data.annotations import Annotation, read_annotations
from slowfast_jax.data.chat import SYSTEM_PROMPT, encode_chat
from slowfast_jax.data.inspect import histogram
from slowfast_jax.data.records import RecordText
from slowfast_jax.data.tfds import open_records
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError

_SIZE, _MARGIN, _BINS = (900, 420), (70, 50, 20, 60), 40
_INK, _BAR, _LINE, _PAPER = (40, 40, 46), (66, 110, 180), (200, 90, 50), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Series:
  """Numbers of one kind.

  Attributes:
    name: of its file.
    title: what is counted.
    values: of every video, record or conversation.
  """

  name: str
  title: str
  values: list[float]

  def summary(self) -> dict[str, float]:
    quantiles = np.quantile(self.values, [0, 0.5, 0.9, 0.99, 1]).tolist()
    names = ("min", "median", "p90", "p99", "max")
    total = {"count": len(self.values), "sum": math.fsum(self.values)}
    return {**total, "mean": total["sum"] / len(self.values), **dict(zip(names, quantiles))}


@dataclasses.dataclass(frozen=True)
class Stats:
  """The distributions of a data set, without those that it has no number of."""

  path: str
  records: int
  conversations: int
  series: list[Series]

  def to_json(self) -> dict:
    series = {series.name: series.summary() for series in self.series}
    return {"records": self.records, "conversations": self.conversations, **series}


def gather(path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Stats:
  """Reads a records folder, of which no frame, or an annotation file.

  Raises:
    UserError: it is neither, or an entry or the records are broken.
  """
  if pathlib.Path(path).is_file():
    texts: Iterable[RecordText | None] = map(_text_of, read_annotations(path))
  else:
    texts = open_records(path).texts()
  values: dict[str, list[float]] = {name: [] for name in ("frames", "duration", "turns", "tokens")}
  conversations: list[float] = []
  for text in texts:
    if text is None:
      continue
    conversations.append(len(text.conversations))
    if text.kind == "video" and text.frames:
      values["frames"].append(text.frames)
      values["duration"].append(text.duration)
    for turns in text.conversations:
      values["turns"].append(len(turns))
      values["tokens"].append(_length(turns, tokenizer))
  titles = {
    "frames": "frames of a video",
    "duration": "seconds of a video",
    "turns": "turns of a conversation",
    "tokens": f"{'text tokens' if tokenizer else 'words'} of a conversation",
  }
  series = [Series(name, titles[name], numbers) for name, numbers in values.items() if numbers]
  each = Series("conversations", "conversations of a record", conversations)
  extra = [each] if conversations and max(conversations) > 1 else []
  return Stats(os.fspath(path), len(conversations), len(values["turns"]), series + extra)


def format_stats(stats: Stats) -> str:
  """The distributions as text for a terminal."""
  lines = [f"{stats.path}: {stats.records} records, {stats.conversations} conversations"]
  for series in stats.series:
    summary = series.summary()
    numbers = ", ".join(f"{k} {summary[k]:.6g}" for k in ("mean", "median", "p90", "p99", "max"))
    lines += ["", f"{series.title}: {numbers}; {summary['sum']:.6g} in all"]
    lines += histogram(series.values)
  return "\n".join(lines)


def write_pictures(stats: Stats, folder: str | os.PathLike) -> list[pathlib.Path]:
  """Draws each distribution to a PNG of its name."""
  folder = pathlib.Path(folder)
  files = []
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for series in stats.series:
      files.append(folder / f"{series.name}.png")
      draw_histogram(series).save(files[-1])
  except OSError as error:
    raise UserError(f"{folder}: pictures cannot be written: {error.strerror}") from error
  return files


def draw_histogram(series: Series) -> Image.Image:
  """The distribution as bars, with its median and 99th percentile."""
  low, high = min(series.values), max(series.values)
  whole = all(float(value).is_integer() for value in series.values)
  if whole:  # Bins of one whole number each, or of several.
    width = math.ceil((high - low + 1) / _BINS)
    edges = np.arange(low, high + width + 0.5, width) - 0.5
  else:
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
  counts, _ = np.histogram(series.values, edges)
  picture = Image.new("RGB", _SIZE, _PAPER)
  draw = ImageDraw.Draw(picture)
  left, top, right, bottom = _MARGIN
  x0, y0, x1, y1 = left, top, _SIZE[0] - right, _SIZE[1] - bottom

  def x_of(value: float) -> float:
    return x0 + (value - edges[0]) / (edges[-1] - edges[0]) * (x1 - x0)

  for count, start, stop in zip(counts, edges, edges[1:]):
    if count:
      height = max((y1 - y0) * count / counts.max(), 1)
      draw.rectangle((x_of(start), y1 - height, max(x_of(stop) - 1, x_of(start)), y1), _BAR)
  draw.line((x0, y1, x1, y1), _INK)
  summary = series.summary()
  _text(draw, ((x0 + x1) / 2, 16), f"{series.title} ({len(series.values):,})", 18, "ma")
  _text(draw, (x0 - 8, y0), f"{counts.max():,}", 13, "rm")
  _text(draw, (x0 - 8, y1), "0", 13, "rm")
  for value in np.linspace(low, high, 5) if high > low else [low]:
    value = round(value) if whole else value
    _text(draw, (x_of(value), y1 + 6), f"{value:,}" if whole else f"{value:.4g}", 13, "ma")
  for name in ("median", "p99"):
    x = x_of(summary[name])
    draw.line((x, y0, x, y1), _LINE)
  note = ", ".join(f"{name} {summary[name]:.6g}" for name in ("mean", "median", "p99"))
  _text(draw, ((x0 + x1) / 2, y1 + 30), note, 14, "ma", _LINE)
  return picture


def _text(
  draw: ImageDraw.ImageDraw,
  place: tuple[float, float],
  text: str,
  size: int,
  anchor: str,
  colour: tuple[int, int, int] = _INK,
) -> None:
  draw.text(place, text, colour, font=ImageFont.load_default(size), anchor=anchor)


def _text_of(entry: Annotation) -> RecordText:
  return RecordText(entry.kind, 0, 0.0, [entry.conversations])


def _length(turns: Sequence[dict[str, str]], tokenizer: Tokenizer | None) -> int:
  if tokenizer is None:
    return sum(len(turn["value"].split()) for turn in turns)
  try:
    return sum(id >= 0 for id in encode_chat(tokenizer, turns, SYSTEM_PROMPT).ids)
  except UserError:  # `slowfast data validate` tells.
    return 0


def words(texts: Iterable[RecordText | None]) -> Iterator[int]:
  """Words of every conversation."""
  for text in texts:
    for turns in text.conversations if text else []:
      yield _length(turns, None)
