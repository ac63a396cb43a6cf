# SPDX-License-Identifier: Apache-2.0
"""What a run of an evaluation leaves behind: predictions line by line, then the results.

predictions.jsonl only grows, one line a question, so a run that is killed at any moment goes on
where it was. run.json says what the lines were made with: lines of different runs never mix.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from slowfast_jax.errors import UserError
from slowfast_jax.files import replace_json, replace_text

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
    if self._path.exists():
      _check_run(folder, run, names)
    replace_json(folder / names[1], run)
    self.done = {line["id"]: line for line in self._read()}
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
