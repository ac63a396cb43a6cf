# SPDX-License-Identifier: Apache-2.0
"""Reads a benchmark's questions from a local copy of its public release: Parquet or JSON.

A folder as it lies on the hub, after its archives of videos are unpacked; or one file.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slowfast_jax.errors import UserError

# Where releases keep their questions; the first pattern that a folder has files for is read.
_PATTERNS = (
  "{subset}/{split}-*.parquet",
  "{subset}/*.parquet",
  "data/{split}-*.parquet",
  "{split}-*.parquet",
  "{subset}/{split}.json*",
  "json/{subset}.json*",
  "{subset}.json*",
  "{split}.json*",
)
_SUFFIXES = (".parquet", ".json", ".jsonl")


def read_release(
  path: str | Path, subset: str, split: str, fields: Sequence[str]
) -> list[dict[str, Any]]:
  """Reads all rows of a subset, in order.

  Args:
    path: the release's folder, or a file of it.
    subset: the release's own name for this part of it.
    split: the same, of the split.
    fields: what every row must have.

  Raises:
    UserError: there is nothing to read, a file is damaged, or a row lacks a field.
  """
  rows: list[dict[str, Any]] = []
  for file in _files(Path(path), subset, split):
    read = _read_parquet if file.suffix == ".parquet" else _read_json
    for number, row in enumerate(read(file), start=1):
      _check(row, fields, f"{file}: row {number}")
      rows.append(row)
  if not rows:
    raise UserError(f"{path}: there is no question in it.")
  return rows


def unique_ids(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
  """The rows' values of these fields; repeated ones are numbered: "a", "a#2"."""
  seen: Counter[str] = Counter()
  found = []
  for row in rows:
    name = "/".join(str(row[field]) for field in fields)
    seen[name] += 1
    found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
  return found


def _files(path: Path, subset: str, split: str) -> list[Path]:
  if path.is_file():
    if path.suffix not in _SUFFIXES:
      raise UserError(f"{path}: expected a file of {', '.join(_SUFFIXES)}.")
    return [path]
  patterns = [pattern.format(subset=subset, split=split) for pattern in _PATTERNS]
  for pattern in patterns:
    if files := sorted(file for file in path.glob(pattern) if file.suffix in _SUFFIXES):
      return files
  raise UserError(
    f"{path}: there are no questions; looked for {', '.join(dict.fromkeys(patterns))}. Copy the "
    "public release there, or name its file."
  )


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
  import pyarrow as pa  # Here: it is large, and only this needs it.
  from pyarrow import parquet

  try:
    table = parquet.read_table(file)
  except (pa.ArrowException, OSError) as error:
    raise UserError(f"{file}: not a Parquet file that can be read: {error}") from error
  return itertools.chain.from_iterable(batch.to_pylist() for batch in table.to_batches())


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
  """A list, or one object a line."""
  try:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
      return iter([json.loads(line) for line in text.split("\n") if line.strip()])
    rows = json.loads(text)
  except ValueError as error:
    raise UserError(f"{file}: not readable as JSON: {error}") from error
  if not isinstance(rows, list):
    raise UserError(f"{file}: expected a JSON list, got {type(rows).__name__}.")
  return iter(rows)


def _check(row: Any, fields: Sequence[str], where: str) -> None:
  if not isinstance(row, dict):
    raise UserError(f"{where}: expected an object, got {type(row).__name__}.")
  missing = [field for field in fields if field not in row]
  if missing:
    raise UserError(f"{where}: lacks {', '.join(missing)}; it has {', '.join(row)}.")
