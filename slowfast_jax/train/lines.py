# SPDX-License-Identifier: Apache-2.0
"""Files of a JSON object a line, each with its step: what metrics.jsonl and telemetry.jsonl are."""

import json
import math
from typing import Any

import jax
from etils import epath

# Marks a line of metrics.jsonl that has the results of an evaluation, not of a step.
EVALUATED = "evaluated"


class LineFile:
  """Appends lines; process 0 writes, all others do nothing.

  Args:
    file: made if it is not there.
    step: lines of later steps are dropped, for a resumed run writes them again.
  """

  def __init__(self, file: epath.Path, step: int):
    self._file = _open_after(file, step) if jax.process_index() == 0 else None

  def write(self, line: dict[str, Any]) -> None:
    """Numbers that are not finite become null: JSON has none."""
    if self._file is not None:
      self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
      self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


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


def _open_after(file: epath.Path, step: int):
  kept = [line for line in read_lines(file) if line["step"] <= step]
  new = file.with_name(file.name + ".new")
  new.write_text("".join(json.dumps(line) + "\n" for line in kept))
  new.replace(file)
  return file.open("a")


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(one) for name, one in value.items()}
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
