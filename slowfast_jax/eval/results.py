# SPDX-License-Identifier: Apache-2.0
"""What a run of an evaluation leaves behind: predictions line by line, then the results.

predictions.jsonl only grows, one line a question, so a run that is killed at any moment goes on
where it was. run.json says what the lines were made with: lines of different runs never mix.

Several processes cannot append to one file, least of all over a network. There every append is a
file of its own in a folder beside it, whole or not there at all; in the end they are merged.
"""

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from slowfast_jax.errors import UserError
from slowfast_jax.files import replace_json, replace_text

# What processes append at the same time.
PARTS = "predictions.parts"
PREDICTIONS, RUN, RESULTS = "predictions.jsonl", "run.json", "results.json"
SUBMISSION, JUDGEMENTS, REPORT = "submission.json", "judgements.jsonl", "report.html"


class PredictionsFile:
  """predictions.jsonl in a folder: what is done already, and a place to append.

  Args:
    folder: made if it is not there.
    run: what the predictions depend on, JSON values.
    retry_errors: forget the lines that have an error, so that they are asked again.
    names: of the two files; a judge's verdicts are kept in the same way.

  Raises:
    UserError: the folder holds predictions of another run, or lines that are none.
  """

  def __init__(
    self,
    folder: Path,
    run: Mapping[str, Any],
    retry_errors: bool = False,
    names: tuple[str, str] = (PREDICTIONS, RUN),
  ):
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / names[0]
    # Of several processes that were killed before they merged.
    parts = read_parts(folder) if names[0] == PREDICTIONS else []
    if self._path.exists() or parts:
      _check_run(folder, run, names)
    replace_json(folder / names[1], run)
    self.done = newest(self._read(), parts)
    if retry_errors and any(line["error"] for line in self.done.values()):
      self.done = {i: line for i, line in self.done.items() if not line["error"]}
      replace_text(self._path, "".join(map(_encode, self.done.values())))
    self._file: BinaryIO = self._path.open("ab")

  def __enter__(self) -> "PredictionsFile":
    return self

  def __exit__(self, *exception: object) -> None:
    self._file.close()

  def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines, each with an "id" and an "error"; they are on the disk when this returns."""
    for line in lines:
      self._file.write(_encode(line).encode())
      self.done[line["id"]] = dict(line)
    self._file.flush()
    os.fsync(self._file.fileno())

  def _read(self) -> list[dict[str, Any]]:
    """The lines so far; what a killed run left of a last line is cut off."""
    if not self._path.exists():
      return []
    content = self._path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
      with self._path.open("r+b") as file:
        file.truncate(len(whole))
    return parse_lines(whole, self._path)


class PredictionParts:
  """The same for one of several processes; what all of them did is done.

  Args:
    folder: shared by all processes.
    run, retry_errors: as of `PredictionsFile`.
    first: for one of the processes, which describes the run.

  Raises:
    UserError: as of `PredictionsFile`.
  """

  def __init__(
    self, folder: Path, run: Mapping[str, Any], retry_errors: bool = False, *, first: bool
  ):
    self._folder = folder / PARTS
    self._folder.mkdir(parents=True, exist_ok=True)
    self.done = read_all(folder)
    if self.done:
      _check_run(folder, run, (PREDICTIONS, RUN))
    if first:
      replace_json(folder / RUN, run)
    if retry_errors:
      self.done = {i: line for i, line in self.done.items() if not line["error"]}

  def __enter__(self) -> "PredictionParts":
    return self

  def __exit__(self, *exception: object) -> None:
    pass  # Nothing is open.

  def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """As of `PredictionsFile`."""
    new = [dict(line) for line in lines]
    path = self._folder / f"{uuid.uuid4().hex}.jsonl"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
      file.write("".join(map(_encode, new)).encode())
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
    self.done |= {line["id"]: line for line in new}


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
  """All lines by their questions, merged or not."""
  path = folder / PREDICTIONS
  content = path.read_bytes() if path.exists() else b""
  return newest(parse_lines(content[: content.rfind(b"\n") + 1], path), read_parts(folder))


def read_parts(folder: Path) -> list[dict[str, Any]]:
  """The lines that are not merged yet."""
  files = sorted((folder / PARTS).glob("*.jsonl"))
  return [line for file in files for line in parse_lines(file.read_bytes(), file)]


def newest(*parts: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Lines by their questions; an answer stands, whatever error came before or after it."""
  found: dict[str, dict[str, Any]] = {}
  for line in itertools.chain(*parts):
    if line["id"] not in found or found[line["id"]]["error"]:
      found[line["id"]] = line
  return found


def merge_parts(folder: Path, order: Sequence[str]) -> None:
  """Makes one predictions.jsonl of everything, its questions in this order, if there are parts."""
  if (folder / PARTS).exists():
    lines = read_all(folder)
    replace_text(folder / PREDICTIONS, "".join(_encode(lines[name]) for name in order))
    shutil.rmtree(folder / PARTS)


def parse_lines(content: bytes, path: Path) -> list[dict[str, Any]]:
  """The lines of a file of predictions.

  Raises:
    UserError: one is no prediction; the message names it.
  """
  lines = []
  for number, text in enumerate(content.splitlines(), start=1):
    try:
      line = json.loads(text)
      lines.append({**line, "id": line["id"], "error": line["error"]})
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}:{number}: not a prediction; repair or delete the line.") from error
  return lines


def _check_run(folder: Path, run: Mapping[str, Any], names: tuple[str, str]) -> None:
  path = folder / names[1]
  try:
    before = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path}: not readable, so nothing says what {names[0]} was made with: {error}; use "
      "another --workdir."
    ) from error
  changed = [name for name in {**before, **run} if before.get(name) != run.get(name)]
  if changed:
    changes = ", ".join(f"{n} was {before.get(n)!r} and is {run.get(n)!r}" for n in changed)
    raise UserError(
      f"{folder} holds the {names[0]} of another run: {changes}. Use another --workdir."
    )


def _encode(line: Mapping[str, Any]) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
