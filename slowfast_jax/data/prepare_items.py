# SPDX-License-Identifier: Apache-2.0
"""Annotations to the items that `prepare` works on: one a media file, wherever that lies."""

import dataclasses
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slowfast_jax.data.annotations import AnnotationError, scan_annotations
from slowfast_jax.data.media import Media
from slowfast_jax.data.prepare_config import PrepareError
from slowfast_jax.data.prepare_record import Item


def read_items(annotations: pathlib.Path) -> tuple[list[Item], list[dict[str, Any]]]:
  """All items in the order of their first entries, and the entries that are wrong.

  Raises:
    PrepareError: no entry is usable.
  """
  items: dict[Any, Item] = {}
  errors = []
  for entry in scan_annotations(annotations):
    if isinstance(entry, AnnotationError):
      errors.append(error_entry(annotations.name, entry.line, 1, entry.reason))
      continue
    key = entry.media if entry.media is not None else len(items)
    item = items.setdefault(key, Item(entry.media, entry.kind, []))
    if item.kind != entry.kind:
      before = f"in line {item.entries[0].line} as {item.kind}"
      reason = f"{entry.media} is annotated as {entry.kind} here, {before}"
      errors.append(error_entry(annotations.name, entry.line, 1, reason))
    else:
      item.entries.append(entry)
  if not items:
    raise PrepareError(
      f"{annotations}: none of the {len(errors)} entries is usable; the first, line "
      f"{errors[0]['line']}: {errors[0]['reason']}"
    )
  return list(items.values()), errors


def place_items(items: list[Item], media: Media, dedup: bool = False) -> list[Item]:
  """The items with the places of their media; with `dedup`, one for media of equal content."""
  placed = [
    dataclasses.replace(item, medium=media.find(item.media)) if item.media is not None else item
    for item in items
  ]
  return _merge_equal(placed) if dedup else placed


def error_entry(file: str, line: int, conversations: int, reason: str) -> dict[str, Any]:
  """A line of `errors.jsonl`."""
  return {"file": file, "line": line, "conversations": conversations, "reason": reason}


def _merge_equal(items: list[Item]) -> list[Item]:
  digests = _digests(items)
  merged: list[Item] = []
  place: dict[tuple[str, str], int] = {}
  for i, item in enumerate(items):
    first = place.setdefault((item.kind, digests[i]), len(merged)) if i in digests else len(merged)
    if first == len(merged):
      merged.append(item)
      continue
    before, path = merged[first], item.media or ""
    entries, duplicates = [*before.entries, *item.entries], (*before.duplicates, path)
    merged[first] = dataclasses.replace(before, entries=entries, duplicates=duplicates)
  return merged


def _digests(items: list[Item]) -> dict[int, str]:
  """Hashes of the items that could be equal to another: only files of equal size are read."""
  by_size: dict[tuple[str, int], list[int]] = {}
  for i, item in enumerate(items):
    size = item.medium.num_bytes() if item.medium else None
    if size:
      by_size.setdefault((item.kind, size), []).append(i)
  doubtful = [i for group in by_size.values() if len(group) > 1 for i in group]

  def digest(i: int) -> str | None:
    medium = items[i].medium
    try:
      return medium.digest() if medium else None
    except OSError:  # Reading it again, to make its record, will say so.
      return None

  with ThreadPoolExecutor(4) as pool:  # Hashing releases the interpreter lock.
    found = zip(doubtful, pool.map(digest, doubtful))
    return {i: value for i, value in found if value is not None}
