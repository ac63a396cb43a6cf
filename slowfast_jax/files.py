# SPDX-License-Identifier: Apache-2.0
"""Small files that are there as a whole or not at all, whatever stops the program."""

import json
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
  """Writes UTF-8 text, in place of what was there before; on a bucket too, as an `epath.Path`."""
  partial = path.with_name(path.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def replace_json(path: Path, value: Any, indent: int | None = 2) -> None:
  """Writes a JSON value, in place of what was there before."""
  replace_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
