# SPDX-License-Identifier: Apache-2.0
"""Files of a JSON object a line, each with its step: what metrics.jsonl and telemetry.jsonl are."""

import json
import math
import time
from typing import Any

import jax
from etils import epath

from slowfast_jax.files import replace_text

# Marks a line of metrics.jsonl that has the results of an evaluation, not of a step.
EVALUATED = "evaluated"

_REWRITE_SECONDS = 30.0


class LineFile:
  """Appends lines; process 0 writes, all others do nothing.

  Files of a bucket cannot be appended to: there the whole file is written anew, now and then.

  Args:
    file: made if it is not there.
    step: lines of later steps are dropped, for a resumed run writes them again.
  """

  def __init__(self, file: epath.Path, step: int):
    self._file, self._stream = file, None
    self._lines: list[str] = []  # Of a file in a bucket.
    self._written = time.monotonic()
    if jax.process_index() != 0:
      return
    kept = [json.dumps(line) + "\n" for line in read_lines(file) if line["step"] <= step]
    replace_text(file, "".join(kept))
    if "://" in str(file):
      self._lines = kept
    else:
      self._stream = file.open("a")

  def write(self, line: dict[str, Any]) -> None:
    """Numbers that are not finite become null: JSON has none."""
    if jax.process_index() != 0:
      return
    text = json.dumps(_finite(line), allow_nan=False) + "\n"
    if self._stream is not None:
      self._stream.write(text)
      self._stream.flush()
      return
    self._lines.append(text)
    if time.monotonic() - self._written > _REWRITE_SECONDS:
      self.flush()

  def flush(self) -> None:
    """All lines are in the file when this returns."""
    if self._lines:
      replace_text(self._file, "".join(self._lines))
      self._written = time.monotonic()

  def close(self) -> None:
    self.flush()
    if self._stream is not None:
      self._stream.close()


def read_lines(file: epath.Path) -> list[dict[str, Any]]:
  """All lines; a last one that a killed run left half written is left out."""
  if not file.exists():
    return []
  lines = []
  for line in file.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except ValueError:
      break
  return lines


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
