# SPDX-License-Identifier: Apache-2.0
"""LLaVA-style annotations, JSON or JSONL, checked entry by entry with the line of every problem.

An entry is `{"id": ..., "video": PATH, "conversations": [{"from": "human", "value": TEXT}, {"from":
"gpt", "value": TEXT}, ...]}`, with "image" instead of "video" for a still image and neither for
text. Other fields travel along untouched. Files come from strangers, so nothing is assumed.
"""

import dataclasses
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any

from slowfast_jax.errors import UserError

ROLES = ("system", "human", "gpt")
# No conversation is near: what is longer is a mistake or an attack, and would fill memory.
_MAX_ENTRY, _MAX_PATH, _MAX_ID = 4 * 2**20, 1024, 1024
_OWN_FIELDS = frozenset({"id", "video", "image", "conversations"})
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


class AnnotationError(UserError):
  """A problem of an annotation file, as "FILE:LINE: what is wrong".

  Attributes:
    line: where the problem is, from 1.
    reason: the problem alone, without file and line.
  """

  def __init__(self, path: str | os.PathLike, line: int, reason: str):
    super().__init__(f"{os.fspath(path)}:{line}: {reason}")
    self.line, self.reason = line, reason


@dataclasses.dataclass(frozen=True)
class Annotation:
  """One conversation about one video, one still image or nothing but text.

  Attributes:
    id: as annotated, else the media path and the number of the entry.
    media: path below the media folder, normalised, with forward slashes; None for text.
    kind: "video", "image" or "text".
    conversations: the turns {"from", "value"} of this entry's conversation, as LLaVA names them.
    line: where the entry starts, from 1.
    extra: every other field of the entry, verbatim.
  """

  id: str
  media: str | None
  kind: str
  conversations: list[dict[str, str]]
  line: int
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class _EntryError(ValueError):
  """What is wrong with an entry whose line only the caller knows."""


def read_annotations(path: str | os.PathLike) -> list[Annotation]:
  """Reads all entries of a file, or raises an AnnotationError that lists its first problems."""
  entries: list[Annotation] = []
  problems: list[AnnotationError] = []
  for item in scan_annotations(path):
    if isinstance(item, AnnotationError):
      problems.append(item)
    else:
      entries.append(item)
  if problems:
    first = problems[0]
    others = [f"line {problem.line}: {problem.reason}" for problem in problems[1:4]]
    if len(problems) > 4:
      others.append(f"and {len(problems) - 4} more")
    raise AnnotationError(path, first.line, "; ".join([first.reason, *others]))
  return entries


def scan_annotations(path: str | os.PathLike) -> Iterator[Annotation | AnnotationError]:
  """Yields every entry of a file in its order, or the problem that stands in its place.

  Raises:
    AnnotationError: where the file cannot be read on: not UTF-8, or broken JSON inside a list.
  """
  text = _read_text(path)
  is_list = text.lstrip(" \t\r\n").startswith("[")
  values = (_list_values if is_list else _line_values)(path, text)
  first_by_id: dict[str, Annotation] = {}
  number = 0
  for number, (line, value) in enumerate(values, start=1):
    if isinstance(value, AnnotationError):
      yield value
      continue
    try:
      entry = _parse_entry(value, line, number)
      _check_id(entry, first_by_id)
    except _EntryError as error:
      # Lists are often written as one endless line, which says little about the place.
      yield AnnotationError(path, line, f"entry {number}: {error}" if is_list else str(error))
    else:
      yield entry
  if not number:
    raise AnnotationError(path, 1, "the file has no entries")


def _read_text(path: str | os.PathLike) -> str:
  try:
    with open(path, "rb") as file:
      data = file.read()
  except OSError as error:
    raise UserError(f"{os.fspath(path)}: cannot read annotations: {error.strerror}") from error
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise AnnotationError(path, line, "the file is not UTF-8; save it as UTF-8") from None


def _line_values(path, text: str) -> Iterator[tuple[int, Any]]:
  """JSON Lines: a broken line spoils only itself."""
  # Not splitlines(): JSON strings may hold U+2028 and its kin.
  for line, content in enumerate(text.split("\n"), start=1):
    content = content.strip(" \t\r")
    if not content:
      continue
    try:
      yield line, _DECODER.decode(content)
    except (json.JSONDecodeError, _EntryError, RecursionError) as error:
      yield line, AnnotationError(path, line, _json_reason(error))


def _list_values(path, text: str) -> Iterator[tuple[int, Any]]:
  """One JSON list: each element with the line on which it starts."""
  position, line, counted = text.index("[") + 1, 1, 0
  try:
    position = _skip_space(text, position)
    more = not text.startswith("]", position)
    while more:
      line, counted = line + text.count("\n", counted, position), position
      value, position = _DECODER.raw_decode(text, position)
      yield line, value
      position = _skip_space(text, position)
      more = text.startswith(",", position)
      if more:
        position = _skip_space(text, position + 1)
      elif not text.startswith("]", position):
        raise json.JSONDecodeError('expected "," or "]" after a list element', text, position)
    end = _skip_space(text, position + 1)
    if end != len(text):
      raise json.JSONDecodeError("text after the end of the list", text, end)
  except json.JSONDecodeError as error:
    raise AnnotationError(path, error.lineno, _json_reason(error)) from None
  except (_EntryError, RecursionError) as error:
    raise AnnotationError(path, line, _json_reason(error)) from None


def _skip_space(text: str, position: int) -> int:
  found = _NOT_SPACE.search(text, position)
  return found.start() if found else len(text)


def _json_reason(error: Exception) -> str:
  if isinstance(error, json.JSONDecodeError):
    return f"not JSON: {error.msg} (column {error.colno})"
  if isinstance(error, RecursionError):
    return "not readable: nested too deeply"
  return str(error)


def _reject_constant(name: str):
  raise _EntryError(f"not JSON: {name} is not a JSON number; use null or leave the field out")


def _finite(text: str) -> float:
  number = float(text)
  if math.isinf(number):
    raise _EntryError(f"the number {text} is too large")
  return number


def _whole(text: str) -> int:
  if len(text) > 100:  # Python refuses thousands of digits in its own words.
    raise _EntryError(f"a number has {len(text)} digits")
  return int(text)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise _EntryError(f'the field "{twice}" appears twice in one object')
  return fields


_DECODER = json.JSONDecoder(
  parse_constant=_reject_constant,
  parse_float=_finite,
  parse_int=_whole,
  object_pairs_hook=_unique_fields,
)


def _parse_entry(value: Any, line: int, number: int) -> Annotation:
  if not isinstance(value, dict):
    raise _EntryError(f"expected an object with conversations, got {_show(value)}")
  try:
    size = len(json.dumps(value, ensure_ascii=False).encode())
  except UnicodeEncodeError:
    raise _EntryError("a text holds half of a surrogate pair, which is no character") from None
  except RecursionError:
    raise _EntryError("not readable: nested too deeply") from None
  if size > _MAX_ENTRY:
    raise _EntryError(
      f"has {size / 2**20:.1f} MiB, more than the {_MAX_ENTRY >> 20} MiB of an entry"
    )
  kind, media = _parse_media(value)
  turns = _parse_turns(value)
  identity = value.get("id")
  if identity is None:
    identity = f"{media or 'text'}:{number}"
  elif isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
    raise _EntryError(f'"id" must be a text or an integer, got {_show(identity)}')
  elif len(str(identity)) > _MAX_ID:
    raise _EntryError(f'"id" has {len(str(identity))} characters, more than {_MAX_ID}')
  extra = {name: field for name, field in value.items() if name not in _OWN_FIELDS}
  return Annotation(str(identity), media, kind, turns, line, extra)


def _parse_media(value: dict[str, Any]) -> tuple[str, str | None]:
  given = [kind for kind in ("video", "image") if value.get(kind) is not None]
  if not given:
    return "text", None
  if len(given) == 2:
    raise _EntryError('an entry has either "video" or "image", not both')
  kind = given[0]
  path = value[kind]
  if not isinstance(path, str) or not path.strip():
    raise _EntryError(f'"{kind}" must be the path of one file, got {_show(path)}')
  if len(path.encode()) > _MAX_PATH:
    raise _EntryError(f'"{kind}" has {len(path.encode())} bytes, more than {_MAX_PATH}')
  if any(ord(character) < 32 for character in path):
    raise _EntryError(f'"{kind}" has control characters: {_show(path)}')
  if posixpath.isabs(path) or ".." in re.split(r"[/\\]", path) or re.match(r"[A-Za-z]:\\", path):
    raise _EntryError(
      f'"{kind}" must be a path below the media folder, without "..", got {_show(path)}'
    )
  path = posixpath.normpath(path)
  if path == ".":
    raise _EntryError(f'"{kind}" must be the path of one file, got {_show(value[kind])}')
  return kind, path


def _parse_turns(value: dict[str, Any]) -> list[dict[str, str]]:
  if "conversations" not in value:
    raise _EntryError(f'no field "conversations"; the entry has {sorted(value)}')
  turns = value["conversations"]
  if not isinstance(turns, list) or not turns:
    raise _EntryError(f'"conversations" must be a list of turns, got {_show(turns)}')
  checked = []
  for number, turn in enumerate(turns, start=1):
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
      raise _EntryError(f'turn {number} must have "from" and "value", got {_show(turn)}')
    if turn["from"] not in ROLES:
      raise _EntryError(f'turn {number}: "from" must be one of {ROLES}, got {_show(turn["from"])}')
    if not isinstance(turn["value"], str):
      raise _EntryError(f'turn {number}: "value" must be a text, got {_show(turn["value"])}')
    checked.append({"from": turn["from"], "value": turn["value"]})
  _check_order([turn["from"] for turn in checked])
  return checked


def _check_order(roles: Iterable[str]) -> None:
  roles = list(roles)
  spoken = roles[1:] if roles[0] == "system" else roles
  expected = [("human", "gpt")[position % 2] for position in range(len(spoken))]
  if not spoken or spoken != expected:
    raise _EntryError(f'turns must go "human", "gpt", "human", ... after any "system", got {roles}')


def _check_id(entry: Annotation, first_by_id: dict[str, Annotation]) -> None:
  """One id may name several conversations of one video, but not two videos nor one thing twice."""
  first = first_by_id.setdefault(entry.id, entry)
  if first is entry:
    return
  if first.media is None or first.media != entry.media:
    raise _EntryError(
      f"the id {_show(entry.id)} of {_show(entry.media)} was used in line {first.line} for "
      f"{_show(first.media)}; give each its own id"
    )
  if first.conversations == entry.conversations:
    raise _EntryError(f"repeats line {first.line}: same id, same media, same conversation")


def _show(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 80 else text[:77] + "..."
