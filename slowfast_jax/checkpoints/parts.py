# SPDX-License-Identifier: Apache-2.0
"""The parameters of an export: several small Orbax checkpoints, so that none needs much memory.

`params/part-00000/`, `part-00001/`, ... each hold about PART_BYTES. An array has its dotted path as
name; one that is too large for that is cut along an axis into pieces, named `PATH@AXIS:START`, for
instance `decoder.layers.mlp.up.kernel@0:17` for layer 17. In version 1 `params/` itself is the
only checkpoint, and nothing is cut.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from slowfast_jax.checkpoints.trees import check_names, first_line, stored_arrays
from slowfast_jax.errors import UserError

# Orbax takes up to three times this while it writes.
PART_BYTES = 64 << 20

_PIECE = re.compile(r"(?P<name>.+)@(?P<axis>\d+):(?P<start>\d+)")


@dataclasses.dataclass(frozen=True)
class Piece:
  """A parameter, or a part of one.

  Attributes:
    name: the parameter's dotted path.
    array: NumPy on the host, or JAX on the devices.
    axis, start: where it is cut out; None: it is the whole parameter.
  """

  name: str
  array: Any
  axis: int | None = None
  start: int = 0

  @property
  def key(self) -> str:
    return self.name if self.axis is None else f"{self.name}@{self.axis}:{self.start}"


# Where on the mesh an array goes: (name, shape, the axis along which it was cut) -> its sharding.
Locate = Callable[[str, tuple[int, ...], int | None], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Cut:
  """Where a piece begins, and how long it is."""

  axis: int | None
  start: int
  size: int


def cuts(shape: tuple[int, ...], itemsize: int, stacked: bool, axis: int | None) -> list[Cut]:
  """How a parameter is cut into pieces of about PART_BYTES.

  Args:
    shape: of the parameter.
    itemsize: bytes of a number.
    stacked: its first axis is that of layers; then a piece is a layer.
    axis: along which one that is no stack can be cut; None: it cannot.
  """
  num_bytes = math.prod(shape) * itemsize
  if num_bytes <= PART_BYTES or (axis is None and not stacked):
    return [Cut(None, 0, 0)]
  if stacked:
    return [Cut(0, i, 1) for i in range(shape[0])]
  assert axis is not None
  size = max(1, PART_BYTES * shape[axis] // num_bytes)
  return [Cut(axis, i, min(size, shape[axis] - i)) for i in range(0, shape[axis], size)]


class PartsWriter:
  """Collects pieces and writes a part whenever there are enough."""

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self._checkpointer = ocp.StandardCheckpointer()
    self._waiting: dict[str, Any] = {}
    self._count = 0

  def add(self, piece: Piece) -> None:
    waiting = sum(array.nbytes for array in self._waiting.values())
    if self._waiting and waiting + piece.array.nbytes > PART_BYTES:
      self._flush()
    self._waiting[piece.key] = piece.array

  def close(self) -> None:
    """Returns when everything is written."""
    if self._waiting:
      self._flush()
    self._checkpointer.close()

  def _flush(self) -> None:
    self._checkpointer.save(self._folder / f"part-{self._count:05d}", self._waiting)
    self._checkpointer.wait_until_finished()
    self._count += 1
    self._waiting = {}


@dataclasses.dataclass(frozen=True)
class _Stored:
  """An array of a part, or a piece of one."""

  part: epath.Path
  key: str
  name: str
  axis: int | None
  start: int
  shape: tuple[int, ...]
  dtype: np.dtype


class PartsReader:
  """The parameters of an export, of version 1 or 2.

  Args:
    folder: `params/`.
    expected: the model's parameters by name; anything with a shape.

  Raises:
    UserError: they are damaged, or others than expected.
  """

  def __init__(self, folder: epath.Path, expected: Mapping[str, Any]):
    self._folder = folder
    parts = sorted(folder.glob("part-*")) or [folder]
    with self._explained():
      self._stored = [entry for part in parts for entry in _read_part(part)]
    check_names(folder, self._whole_shapes(), expected)

  @property
  def num_bytes(self) -> int:
    return _bytes(self._stored)

  @property
  def dtypes(self) -> dict[str, tuple[np.dtype, ...]]:
    """Of every parameter: its dtype, or that of each of its pieces in their order."""
    found: dict[str, list[_Stored]] = {}
    for entry in sorted(self._stored, key=lambda entry: entry.start):
      found.setdefault(entry.name, []).append(entry)
    return {name: tuple(entry.dtype for entry in entries) for name, entries in found.items()}

  def pieces(self, locate: Locate | None) -> Iterator[Piece]:
    """All arrays, a few at a time.

    Args:
      locate: where on the mesh they are read to; None: to NumPy arrays.
    """
    group: list[_Stored] = []
    for i, entry in enumerate(self._stored):
      group.append(entry)
      after = self._stored[i + 1] if i + 1 < len(self._stored) else None
      if after is None or after.part != entry.part or _bytes([*group, after]) > PART_BYTES:
        with self._explained():
          arrays = _restore(group, locate)
        while group:
          entry = group.pop(0)
          yield Piece(entry.name, arrays.pop(entry.key), entry.axis, entry.start)

  def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes that the pieces amount to."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in sorted(self._stored, key=lambda entry: entry.start):
      before = shapes.get(entry.name)
      if entry.axis is None:
        shapes[entry.name] = entry.shape
      elif entry.start == (0 if before is None else before[entry.axis]):
        shape = list(entry.shape)
        shape[entry.axis] += entry.start
        shapes[entry.name] = tuple(shape)
    return shapes

  def _explained(self) -> "_Explained":
    return _Explained(self._folder)


class _Explained:
  """Errors of a damaged folder as errors of the user; Orbax raises a bare Exception for some."""

  def __init__(self, folder: epath.Path):
    self._folder = folder

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    # Too little memory is not the folder's fault.
    unrelated = (UserError, MemoryError, jax.errors.JaxRuntimeError)
    if isinstance(error, Exception) and not isinstance(error, unrelated):
      raise UserError(
        f"{self._folder}: the parameters are missing or damaged ({first_line(error)}); copy the "
        "export again, or run the command again that made it."
      ) from error


def _read_part(part: epath.Path) -> list[_Stored]:
  handler = ocp.StandardCheckpointHandler()
  try:
    stored = stored_arrays(handler, part)
  finally:
    handler.close()
  entries = []
  for key, array in stored.items():
    match = _PIECE.fullmatch(key)
    name, axis, start = (
      (key, None, 0) if match is None else (match["name"], int(match["axis"]), int(match["start"]))
    )
    entries.append(_Stored(part, key, name, axis, start, tuple(array.shape), np.dtype(array.dtype)))
  return entries


def _bytes(entries: list[_Stored]) -> int:
  return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)


def _restore(entries: list[_Stored], locate: Locate | None) -> dict[str, Any]:
  """Some arrays of one part."""
  item: dict[str, Any] = {}
  how: dict[str, ocp.RestoreArgs] = {}
  for entry in entries:
    if locate is None:
      # An array of this shape that takes no memory.
      item[entry.key] = np.broadcast_to(np.zeros((), entry.dtype), entry.shape)
      how[entry.key] = ocp.RestoreArgs(restore_type=np.ndarray)
    else:
      sharding = locate(entry.name, entry.shape, entry.axis)
      item[entry.key] = jax.ShapeDtypeStruct(entry.shape, entry.dtype, sharding=sharding)
      how[entry.key] = ocp.ArrayRestoreArgs(sharding=sharding)
  handler = ocp.PyTreeCheckpointHandler()
  try:
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    return handler.restore(entries[0].part, args=args)
  finally:
    handler.close()
