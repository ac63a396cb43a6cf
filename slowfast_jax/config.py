# SPDX-License-Identifier: Apache-2.0
"""Loads an experiment: a Python file with `get_config()`, changed by `--config.a.b=v`, then locked.

`FILE:ARG` calls `get_config(ARG)`: one file can hold the stages of one experiment.
The type of a field is the type of the value that the file gives it, so an override can change a
number but never turn it into something else, and a misspelt name is an error, not a new field.
"""

import ast
import difflib
import inspect
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from slowfast_jax.errors import UsageError, UserError

_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_PREFIX = "--config."


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """Reads the config file, applies the overrides in order, and locks the result.

  Args:
    path: a file, or `FILE:ARG`; `configs/NAME.py` also finds the configs that the package ships.
    overrides: words of the command line, `--config.SECTION.FIELD=VALUE`.

  Raises:
    UserError: there is no such config, or the file does not define one.
    UsageError: an override names no field or its value has the wrong type.
  """
  name, arguments = _split(path)
  file = find_config(name)
  try:
    get_config = runpy.run_path(str(file)).get("get_config")
  except SyntaxError as error:
    raise UserError(f"{error.filename}:{error.lineno}: not valid Python: {error.msg}.") from error
  if not callable(get_config):
    raise UserError(f"{file}: expected a function get_config() that returns a ConfigDict.")
  config = _call(get_config, arguments, file)
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"{file}: get_config() must return an ml_collections.ConfigDict, got {type(config).__name__}."
    )
  for override in overrides:
    _apply(config, override)
  # Only now: a field that is computed from another one must see what an override made of it.
  return config.copy_and_resolve_references().lock()


def find_config(path: str | Path) -> Path:
  """The file itself, or the shipped config of that name (`configs/demo.py`) if there is none."""
  path = Path(path)
  if path.is_file():
    return path
  folder = _shipped_folder()
  if len(path.parts) == 2 and path.parts[0] == "configs" and (folder / path.name).is_file():
    return folder / path.name
  shipped = sorted(f"configs/{file.name}" for file in folder.glob("*.py"))
  near = difflib.get_close_matches(str(path), shipped, n=1)
  hint = f" Did you mean {near[0]}?" if near else ""
  raise UserError(
    f"{path}: there is no such config file.{hint} Shipped: {', '.join(shipped) or 'none'}."
  )


def _shipped_folder() -> Path:
  """`configs/` lies in the package when that is a wheel, and beside it in a checkout."""
  package = Path(__file__).parent
  installed = package / "configs"
  return installed if installed.is_dir() else package.parent / "configs"


def _split(path: str | Path) -> tuple[str, list[str]]:
  """The file, and what `get_config` is called with."""
  name, extension, rest = str(path).partition(".py")
  if rest[:1] != ":":
    return str(path), []
  return name + extension, [rest[1:]]


def _call(get_config: Callable[..., Any], arguments: list[str], file: Path) -> Any:
  # Bound first: a TypeError inside of get_config is a bug of the file and keeps its traceback.
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    given = f"the argument {arguments[0]!r}" if arguments else "no argument"
    raise UsageError(f"{file}: get_config() does not fit {given} ({error}).") from error
  return get_config(*arguments)


def _apply(config: ml_collections.ConfigDict, override: str) -> None:
  name, equals, text = override.removeprefix(_PREFIX).partition("=")
  if not override.startswith(_PREFIX) or not equals:
    raise UsageError(f"{override}: expected --config.SECTION.FIELD=VALUE.")
  *sections, field = name.split(".")
  node: Any = config
  for section in sections:
    node = node.get(section) if isinstance(node, ml_collections.ConfigDict) else None
  if not isinstance(node, ml_collections.ConfigDict) or field not in node:
    near = difflib.get_close_matches(name, _field_names(config), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(config)}."
    raise UsageError(f"{override}: the config has no field {name!r}. {hint}")
  if isinstance(node[field], ml_collections.ConfigDict):
    fields = ", ".join(f"{name}.{key}" for key in node[field])
    raise UsageError(f"{override}: {name} is a section; set one of its fields: {fields}.")
  try:
    node[field] = _parse(text, node[field], node.get_type(field))
  except (ValueError, SyntaxError) as error:
    expected = _describe(node[field], node.get_type(field))
    raise UsageError(
      f"{override}: expected {expected} for {name} (now {node[field]!r}), got {text!r}."
    ) from error


def _field_names(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
  names = []
  for key, value in config.items():
    names.append(prefix + key)
    if isinstance(value, ml_collections.ConfigDict):
      names += _field_names(value, f"{prefix}{key}.")
  return names


def _parse(text: str, now: Any, kind: type) -> Any:
  """The value that the text stands for, of the field's type; a ValueError if it is none."""
  if kind is bool:
    if text.lower() not in _BOOLS:
      raise ValueError(text)
    return _BOOLS[text.lower()]
  if kind is str:
    return text
  if kind in (int, float):
    return kind(text)
  if kind in (tuple, list):
    return _parse_sequence(text, now, kind)
  if kind is type(None):  # Nothing is known about the type: a Python literal, else the text.
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError):
      return text
  raise ValueError(text)


def _parse_sequence(text: str, now: Sequence[Any], kind: type) -> Any:
  """`(1, 2)`, `[1, 2]` or `1,2`; every item has the type of the items that stand there now."""
  kinds = {type(item) for item in now}
  if kinds == {str} and text[:1] not in "([":
    return kind(text.split(","))  # A shell eats quotes: names,like,these need none.
  value = ast.literal_eval(text)
  if not isinstance(value, tuple | list):
    raise ValueError(text)
  if len(kinds) == 1:
    (item_kind,) = kinds
    if item_kind is float:
      value = [float(item) if type(item) is int else item for item in value]
    if any(type(item) is not item_kind for item in value):
      raise ValueError(text)
  return kind(value)


def _describe(now: Any, kind: type) -> str:
  kinds = sorted({type(item).__name__ for item in now}) if kind in (tuple, list) else []
  return kind.__name__ + (f" of {' or '.join(kinds)}" if kinds else "")
