# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints, read straight onto the devices and written so that others open them.

The layout is that of semantics section 7: config.json and safetensors, whose names `tables.py` has.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import einops
import numpy as np
from etils import epath
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export, HubFiles
from slowfast_jax.checkpoints.folders import replaced
from slowfast_jax.checkpoints.hf_config import (
  CONFIG_FILE,
  LLM_TYPES,
  OFFICIAL_TYPE,
  official_files,
  parse_official,
)
from slowfast_jax.checkpoints.hf_parts import load_parts, open_parts
from slowfast_jax.checkpoints.hf_read import EMBEDDING, HEAD, match
from slowfast_jax.checkpoints.hub_files import TOKENIZER_FILES, open_tokenizer, small_files
from slowfast_jax.checkpoints.json_fields import Fields, read_json
from slowfast_jax.checkpoints.parts import Locate, Piece
from slowfast_jax.checkpoints.safetensors_files import (
  DTYPE_CODES,
  SafetensorsFiles,
  SafetensorsWriter,
)
from slowfast_jax.checkpoints.source import (
  Source,
  as_numpy,
  check_dtype,
  parameter_cuts,
  parameter_shapes,
  place,
  source_of,
)
from slowfast_jax.checkpoints.tables import (
  OFFICIAL_VISION,
  Slot,
  is_unused,
  official_slots,
  split_axis,
)
from slowfast_jax.errors import UserError

__all__ = ["load_hf", "load_parts", "open_hf", "open_parts", "save_hf", "write_hf"]

# As transformers has it.
MAX_SHARD_BYTES = 5_000_000_000


def load_hf(
  folder: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> Export:
  """Opens a released checkpoint.

  Args:
    folder: with config.json and safetensors.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters; None: as they are stored.

  Raises:
    UserError: the folder is none, or its files do not fit each other; lists every tensor that does
      not.
  """
  return place(open_hf(folder), mesh, dtype)


def open_hf(folder: str | os.PathLike) -> Source:
  """A released checkpoint whose parameters are not read yet; errors as of `load_hf`."""
  path = epath.Path(folder).absolute()
  fields = Fields(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
  if fields.values.get("model_type") in LLM_TYPES:
    raise UserError(
      f"{path}: a plain language model ({fields.values['model_type']}); a slow-fast model is made "
      f"of it and a vision encoder by `slowfast convert --llm {path} --vision DIR --to orbax OUT`."
    )
  fields.choice("model_type", [OFFICIAL_TYPE])
  files = SafetensorsFiles(path)
  vision = {
    name.removeprefix(OFFICIAL_VISION): tensor.shape
    for name, tensor in files.tensors.items()
    if name.startswith(OFFICIAL_VISION)
  }
  small = small_files(path)
  export = parse_official(small, path, vision)
  model = export.model
  unused = functools.partial(is_unused, vision=model.vision, vision_prefix=OFFICIAL_VISION)
  tensors = match(files, official_slots(model, parameter_shapes(model)), unused)
  with files:
    raw = {name: files.read_raw(name) for name in tensors.unused}
  hub = HubFiles(small, raw, tensors.head_copy)
  export = dataclasses.replace(export, tokenizer=open_tokenizer(path), hub=hub)

  def pieces(locate: Locate | None) -> Iterator[Piece]:
    with files:
      yield from tensors.pieces(parameter_cuts(model))

  return Source(export, tensors.dtypes(), pieces, tensors.num_bytes)


def save_hf(
  folder: str | os.PathLike,
  export: Export,
  dtype: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a folder in the released layout.

  Args:
    folder: where to; a checkpoint that is there is replaced.
    export: the model. What it was opened with (tokenizer, unused tensors) is written too.
    dtype: of the parameters; None: as they are.
    max_shard_bytes: files have at most so many bytes.

  Raises:
    UserError: the folder has something else in it.
  """
  write_hf(folder, source_of(export), dtype, max_shard_bytes=max_shard_bytes)


def write_hf(
  folder: str | os.PathLike,
  source: Source,
  dtype: str | None = None,
  tell: Callable[[int], None] = lambda count: None,
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes the released layout a piece at a time; arguments as of `save_hf` and `write_export`."""
  wanted = check_dtype(dtype)
  if "://" in os.fspath(folder):
    raise UserError(f"{folder}: Hugging Face folders are written to local disks only.")
  export = source.export
  model = export.model
  slots = official_slots(model, parameter_shapes(model))
  dtypes = {slot: wanted or _dtype_of(slot, source) for slot in slots}
  by_param: dict[str, list[Slot]] = {}
  for slot in slots:
    by_param.setdefault(slot.param, []).append(slot)
  with replaced(folder) as new:
    _write_small_files(new, export, next(iter(dtypes.values())))
    writer = SafetensorsWriter(new, _description(export, dtypes), max_shard_bytes=max_shard_bytes)
    for piece in source.pieces(None):
      tell(piece.array.nbytes)
      for slot, array, start in _tensors_of(piece, by_param[piece.name]):
        array = array.astype(dtypes[slot], copy=False)
        writer.write(slot.source, array, start)
        if slot.source == EMBEDDING and _has_head_copy(export):
          writer.write(HEAD, array, start)
    if export.hub is not None:
      for name, tensor in export.hub.unused.items():
        writer.write_raw(name, tensor)
    writer.close()


def _write_small_files(folder: epath.Path, export: Export, dtype: np.dtype) -> None:
  files = official_files(export, dtype.name)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  if export.tokenizer is not None and not any(name in files for name in TOKENIZER_FILES):
    export.tokenizer.save(folder)


def _has_head_copy(export: Export) -> bool:
  return export.hub is not None and export.hub.head_copy and export.model.decoder.tie_embeddings


def _description(
  export: Export, dtypes: dict[Slot, np.dtype]
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Everything that the files will have."""
  described = {slot.source: (DTYPE_CODES[dtype], slot.shape) for slot, dtype in dtypes.items()}
  if _has_head_copy(export):
    described[HEAD] = described[EMBEDDING]
  if export.hub is not None:
    described |= {name: (raw.dtype, raw.shape) for name, raw in export.hub.unused.items()}
  return described


def _dtype_of(slot: Slot, source: Source) -> np.dtype:
  dtypes = source.dtypes[slot.param]
  return dtypes[0] if slot.layer is None or len(dtypes) == 1 else dtypes[slot.layer]


def _tensors_of(piece: Piece, slots: list[Slot]) -> Iterator[tuple[Slot, np.ndarray, int]]:
  """The tensors, or rows of one, that a piece amounts to: (slot, array, first row)."""
  array = as_numpy(piece.array)
  if slots[0].layer is None:
    assert piece.axis in (None, split_axis(slots[0].pattern))
    yield slots[0], _to_source(slots[0], array), piece.start
    return
  assert piece.axis in (None, 0)
  for i, layer in enumerate(array, piece.start):
    yield slots[i], _to_source(slots[i], layer), 0


def _to_source(slot: Slot, array: np.ndarray) -> np.ndarray:
  source, target = slot.pattern.split("->")
  return einops.rearrange(array, f"{target} -> {source}")
