# SPDX-License-Identifier: Apache-2.0
"""Safetensors: one file, or shards with an index, read and written a piece at a time.

The format is a length (8 bytes, little endian), a JSON header, and the tensors' bytes. Both ways go
through plain file IO: a memory map would count every page that was read as this process's memory.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from slowfast_jax.checkpoints.layout import contiguous
from slowfast_jax.errors import UserError

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

# Bytes of an element. Those of no weight (masks, ids) are carried along.
_SIZES = {
  "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
  "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
  "C64": 8,
}  # fmt: skip
DTYPES: Mapping[str, np.dtype] = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

_LONGEST_HEADER = 100 << 20  # As the safetensors library has it.


@dataclasses.dataclass(frozen=True)
class RawTensor:
  """A tensor that nothing computes with: its bytes as a file has them."""

  dtype: str
  shape: tuple[int, ...]
  data: bytes


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Where a tensor is.

  Attributes:
    dtype: the format's code, e.g. "BF16".
    start: its first byte in the file.
  """

  dtype: str
  shape: tuple[int, ...]
  file: epath.Path
  start: int

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * _SIZES[self.dtype]


class SafetensorsFiles:
  """The tensors of a folder or a file, by name; nothing but headers is read ahead.

  Raises:
    UserError: there are no safetensors, or a file is missing, cut off or damaged.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = epath.Path(path)
    self._open: dict[epath.Path, BinaryIO] = {}
    self.tensors: dict[str, StoredTensor] = {}
    for file in _find_files(self.path):
      for name, tensor in read_header(file).items():
        if name in self.tensors:
          raise UserError(
            f"{file}: the tensor {name} is also in {self.tensors[name].file.name}; keep one."
          )
        self.tensors[name] = tensor
    _check_index(self.path, self.tensors)

  def __enter__(self) -> "SafetensorsFiles":
    return self

  def __exit__(
    self,
    exception_type: type[BaseException] | None,
    exception: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for file in self._open.values():
      file.close()
    self._open.clear()

  @property
  def num_bytes(self) -> int:
    return sum(tensor.num_bytes for tensor in self.tensors.values())

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A tensor of float32, float16 or bfloat16, or its rows start..stop alone."""
    tensor = self.tensors[name]
    dtype, shape = DTYPES[tensor.dtype], tensor.shape
    if stop is not None:
      shape = (stop - start, *shape[1:])
    offset = start * math.prod(tensor.shape[1:]) * dtype.itemsize
    return self._bytes(tensor, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

  def read_raw(self, name: str) -> RawTensor:
    tensor = self.tensors[name]
    data = self._bytes(tensor, 0, tensor.num_bytes).tobytes()
    return RawTensor(tensor.dtype, tensor.shape, data)

  def _bytes(self, tensor: StoredTensor, offset: int, count: int) -> np.ndarray:
    if tensor.file not in self._open:
      self._open[tensor.file] = tensor.file.open("rb")
    file = self._open[tensor.file]
    file.seek(tensor.start + offset)
    found = np.empty(count, np.uint8)
    view, got = memoryview(found.data), 0
    while got < count:
      more = file.readinto(view[got:])  # type: ignore[attr-defined]
      if not more:
        raise UserError(f"{tensor.file}: it became shorter while it was read.")
      got += more
    return found


def read_header(file: epath.Path) -> dict[str, StoredTensor]:
  """What a file holds; the sizes are checked against the file's.

  Raises:
    UserError: the file is missing, cut off or no safetensors file.
  """
  if not file.exists():
    raise UserError(f"{file}: there is no such file; copy the checkpoint again.")
  size = file.stat().length
  with file.open("rb") as stream:
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
    if length > _LONGEST_HEADER or 8 + length > size:
      raise UserError(f"{file}: no safetensors file, or its start is damaged ({size} bytes).")
    text = stream.read(length)
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors = {name: _stored(entry, file, 8 + length) for name, entry in header.items()}
    spans = [entry["data_offsets"] for entry in header.values()]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{file}: its header is damaged: {error}; copy the file again.") from error
  expected = 8 + length + max((stop for _, stop in spans), default=0)
  if size != expected:
    raise UserError(
      f"{file}: cut off or damaged: its header says {expected} bytes, it has {size}; copy it again."
    )
  return tensors


def _stored(entry: dict[str, Any], file: epath.Path, data_start: int) -> StoredTensor:
  if entry["dtype"] not in _SIZES:
    raise ValueError(f"unknown dtype {entry['dtype']!r}")
  start, stop = entry["data_offsets"]
  tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), file, data_start + start)
  if start < 0 or stop - start != tensor.num_bytes:
    raise ValueError(f"{entry['dtype']} {entry['shape']} does not take {stop - start} bytes")
  return tensor


def _find_files(path: epath.Path) -> list[epath.Path]:
  if not path.is_dir():
    if not path.exists():
      raise UserError(f"{path}: there is no such folder or file.")
    if not path.name.endswith(".safetensors"):
      raise UserError(f"{path}: not a .safetensors file.{_how_to_convert(path.name)}")
    return [path]
  if (path / SINGLE_FILE).exists():
    return [path / SINGLE_FILE]
  if (path / INDEX_FILE).exists():
    return [path / name for name in sorted(set(_weight_map(path / INDEX_FILE).values()))]
  found = sorted(path.glob("*.safetensors"))
  if len(found) == 1:
    return found
  if found:
    names = ", ".join(file.name for file in found[:3])
    raise UserError(
      f"{path}: {len(found)} files ({names}...) and no {INDEX_FILE}; copy the index too, or give "
      "one file."
    )
  raise UserError(
    f"{path}: no safetensors in it.{_how_to_convert(*(file.name for file in path.iterdir()))}"
  )


def _how_to_convert(*names: str) -> str:
  pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
  if not pickled:
    return f" Expected {SINGLE_FILE}, or shards with {INDEX_FILE}."
  return (
    f" {sorted(pickled)[0]} is a pickle, which may run any code when it is opened, so it is not "
    "read. Convert it where PyTorch is: `safetensors.torch.save_file(torch.load(FILE, "
    f'weights_only=True, map_location="cpu"), "{SINGLE_FILE}")`, or with transformers: '
    "`AutoModel.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)`."
  )


def _weight_map(index: epath.Path) -> dict[str, str]:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    if not all(isinstance(file, str) for file in weight_map.values()):
      raise ValueError("its weight_map is not one of names to files")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index}: not an index of shards: {error!r}; copy it again.") from error
  missing = [
    name for name in sorted(set(weight_map.values())) if not (index.parent / name).exists()
  ]
  if missing:
    raise UserError(
      f"{index.parent}: {len(missing)} of its shards are missing: {', '.join(missing[:5])}; "
      "copy the checkpoint again."
    )
  return weight_map


def _check_index(path: epath.Path, tensors: Mapping[str, StoredTensor]) -> None:
  if not path.is_dir() or (path / SINGLE_FILE).exists() or not (path / INDEX_FILE).exists():
    return
  lost = [name for name in _weight_map(path / INDEX_FILE) if name not in tensors]
  if lost:
    raise UserError(
      f"{path}: {len(lost)} tensors of {INDEX_FILE} are in none of its shards: "
      f"{', '.join(lost[:3])}; shards and index belong to different checkpoints."
    )


class SafetensorsWriter:
  """Writes tensors of a known description, in any order and piece by piece.

  Args:
    folder: a local folder that is there.
    tensors: dtype code and shape by name, in the order of the files.
    max_shard_bytes: files have at most so many bytes, or one tensor; None: there is one file.
    name: of the file, where it is one.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    max_shard_bytes: int | None = None,
    name: str = SINGLE_FILE,
  ):
    self._tensors = dict(tensors)
    self._left = {name: _num_bytes(*spec) for name, spec in self._tensors.items()}
    self._total = sum(self._left.values())
    shards = _shards(self._left, max_shard_bytes)
    stem = name.removesuffix(".safetensors")
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    self._files: list[BinaryIO] = []
    self._closing = contextlib.ExitStack()
    self._places: dict[str, tuple[BinaryIO, int]] = {}
    self._weight_map: dict[str, str] = {}
    for file_name, shard in zip([name] if len(shards) == 1 else names, shards):
      file = Path(folder, file_name).open("wb")  # noqa: SIM115
      self._files.append(self._closing.enter_context(file))
      self._places.update(self._start_file(file, shard))
      self._weight_map.update(dict.fromkeys(shard, file_name))
    self._index = Path(folder, f"{name}.index.json") if len(shards) > 1 else None

  def _start_file(self, file: BinaryIO, shard: list[str]) -> dict[str, tuple[BinaryIO, int]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in shard:
      dtype, shape = self._tensors[name]
      start, end = end, end + self._left[name]
      header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors are aligned.
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
    return {name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in shard}

  def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
    """Rows of a tensor from `start` on; they have its dtype."""
    self._write(name, array.shape, start, contiguous(array).reshape(-1).view(np.uint8))

  def write_raw(self, name: str, tensor: RawTensor) -> None:
    self._write(name, tensor.shape, 0, np.frombuffer(tensor.data, np.uint8))

  def _write(self, name: str, rows: tuple[int, ...], start: int, data: np.ndarray) -> None:
    dtype, shape = self._tensors[name]
    assert rows[1:] == shape[1:], (name, rows, shape)
    file, place = self._places[name]
    file.seek(place + start * _num_bytes(dtype, shape[1:]))
    file.write(data.data)
    self._left[name] -= data.size

  def close(self) -> None:
    """Completes the files; every tensor has been written by then."""
    left = [name for name, count in self._left.items() if count]
    assert not left, f"not written: {left[:3]}"
    for file in self._files:
      file.flush()
      os.fsync(file.fileno())
    self._closing.close()
    if self._index is not None:
      index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
      self._index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
  return math.prod(shape) * _SIZES[dtype]


def _shards(sizes: Mapping[str, int], most: int | None) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if most is not None and shards[-1] and filled + size > most:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards
