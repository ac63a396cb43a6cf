# SPDX-License-Identifier: Apache-2.0
"""What a mixture amounts to: samples, epochs and tokens of each source."""

import dataclasses
import os
from collections.abc import Sequence

from slowfast_jax.data.chat import SYSTEM_PROMPT
from slowfast_jax.data.mixture import read_mixture
from slowfast_jax.data.needs import count_lengths
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.stats import words
from slowfast_jax.data.tfds import open_records
from slowfast_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SourceShare:
  """One source of a mixture.

  Attributes:
    name, licence: as the mixture file says.
    records: that it has.
    samples: that it has, one a conversation.
    share: of all samples that are drawn.
    drawn: samples.
    epochs: how often each of its samples comes.
    tokens: text tokens drawn; words, where no tokenizer counted.
    frames: drawn.
  """

  name: str
  licence: str
  records: int
  samples: int
  share: float
  drawn: int
  epochs: float
  tokens: int
  frames: int


def measure_mixture(
  path: str | os.PathLike, tokenizer: Tokenizer | None = None, samples: int | None = None
) -> list[SourceShare]:
  """Counts what so many samples of a mixture are.

  Args:
    path: a mixture file, see `slowfast_jax.data.mixture`.
    tokenizer: counts tokens; None counts words.
    samples: to draw; None = as many as the sources have together.

  Raises:
    UserError: the file or a source of it cannot be read.
  """
  listed = read_mixture(path)
  sources = [open_records(entry.path) for entry in listed]
  sizes = [len(source.index) for source in sources]
  weights = [size if entry.weight is None else entry.weight for entry, size in zip(listed, sizes)]
  total = sum(sizes) if samples is None else samples
  shares = []
  for entry, source, size, weight in zip(listed, sources, sizes, weights):
    share = weight / sum(weights)
    epochs = share * total / size if size else 0.0
    length, frames = _amounts(source, tokenizer)
    shares.append(
      SourceShare(
        name=entry.name,
        licence=entry.licence,
        records=len(source),
        samples=size,
        share=share,
        drawn=round(share * total),
        epochs=epochs,
        tokens=round(epochs * length),
        frames=round(epochs * frames),
      )
    )
  return shares


def format_mixture(shares: Sequence[SourceShare], unit: str) -> str:
  """A table for a terminal.

  Args:
    shares: of all sources.
    unit: what `tokens` counts.
  """
  head = ["source", "share", "samples", "drawn", "epochs", unit, "frames", "licence"]
  rows = [head]
  for s in shares:
    counts = [f"{s.samples:,}", f"{s.drawn:,}", f"{s.epochs:.2f}", f"{s.tokens:,}", f"{s.frames:,}"]
    rows.append([s.name, f"{s.share:.1%}", *counts, s.licence or "not given"])
  sums = [f"{sum(getattr(s, name) for s in shares):,}" for name in ("samples", "drawn")]
  amounts = [f"{sum(getattr(s, name) for s in shares):,}" for name in ("tokens", "frames")]
  rows.append(["all", "100.0%", *sums, "", *amounts, ""])
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1]))]
    lines.append("  ".join([*cells, row[-1]]).rstrip())
  return "\n".join(lines)


def _amounts(source: RecordSource, tokenizer: Tokenizer | None) -> tuple[int, int]:
  """Tokens (or words) and frames of one epoch."""
  per_record = [text.frames * len(text.conversations) if text else 0 for text in source.texts()]
  if tokenizer is None:
    return sum(words(source.texts())), sum(per_record)
  return int(count_lengths(source, tokenizer, SYSTEM_PROMPT).text.sum()), sum(per_record)
