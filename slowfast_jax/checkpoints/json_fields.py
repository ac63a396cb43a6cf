# SPDX-License-Identifier: Apache-2.0
"""Fields of a config.json, each with an error that says which file, which field and what to put."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from slowfast_jax.errors import UserError


def read_json(file: epath.Path) -> dict[str, Any]:
  """
  Raises:
    UserError: there is no such file, or it holds no JSON object.
  """
  if not file.exists():
    raise UserError(f"{file}: there is no such file; copy it from where the checkpoint comes from.")
  return parse_json(file.read_bytes(), file)


def parse_json(content: bytes, file: epath.Path) -> dict[str, Any]:
  """
  Raises:
    UserError: it is no JSON object.
  """
  try:
    values = json.loads(content)
  except ValueError as error:
    raise UserError(f"{file}: not readable as JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{file}: expected a JSON object, got {type(values).__name__}.")
  return values


class Fields:
  """Reads fields of a file. A field that is null counts as absent.

  Args:
    values: what the file has.
    file: its name, for errors; also the section, if it is one.
  """

  def __init__(self, values: Mapping[str, Any], file: object):
    self.values, self.file = values, file

  def __contains__(self, key: str) -> bool:
    return self.values.get(key) is not None

  def section(self, key: str) -> "Fields":
    """A nested object; empty if it is absent."""
    value = self.values.get(key)
    if value is not None and not isinstance(value, Mapping):
      raise self.error(key, "an object")
    return Fields(value or {}, f"{self.file}: {key}")

  def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
    value = self._get(key, default, f"a whole number of at least {least}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise self.error(key, f"a whole number of at least {least}")
    return value

  def integers(self, key: str) -> tuple[int, ...]:
    value = self._get(key, None, "a list of whole numbers")
    whole = isinstance(value, Sequence) and all(type(item) is int for item in value)
    if not whole or isinstance(value, str):
      raise self.error(key, "a list of whole numbers")
    return tuple(value)

  def number(self, key: str, default: float | None = None) -> float:
    value = self._get(key, default, "a number above 0")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
      raise self.error(key, "a number above 0")
    return float(value)

  def boolean(self, key: str, default: bool | None = None) -> bool:
    value = self._get(key, default, "true or false")
    if not isinstance(value, bool):
      raise self.error(key, "true or false")
    return value

  def text(self, key: str, default: str | None = None) -> str:
    value = self._get(key, default, "a string")
    if not isinstance(value, str):
      raise self.error(key, "a string")
    return value

  def choice(self, key: str, options: Sequence[str], default: str | None = None) -> str:
    value = self._get(key, default, _one_of(options))
    if value not in options:
      raise self.error(key, _one_of(options))
    return value

  def only(self, key: str, value: Any, why: str) -> None:
    """A field that may be absent, and else must have this value.

    Raises:
      UserError: it has another.
    """
    if key in self and self.values[key] != value:
      raise self.error(key, f"{json.dumps(value)} ({why})")

  def error(self, key: str, expected: str) -> UserError:
    got = json.dumps(self.values.get(key), default=str)
    return UserError(f"{self.file}: {key} must be {expected}, got {got}.")

  def _get(self, key: str, default: Any, expected: str) -> Any:
    if key in self:
      return self.values[key]
    if default is None:
      raise UserError(f"{self.file}: {key} is missing; it must be {expected}.")
    return default


def _one_of(options: Sequence[str]) -> str:
  return f"one of {', '.join(json.dumps(option) for option in options)}"
