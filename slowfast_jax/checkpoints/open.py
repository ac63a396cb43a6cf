# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint of whatever kind it is."""

import dataclasses
import os

from etils import epath
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.checkpoints.hf import open_hf
from slowfast_jax.checkpoints.json_fields import read_json
from slowfast_jax.checkpoints.source import Source, place
from slowfast_jax.checkpoints.store import CONFIG_FILE, FORMAT, open_export
from slowfast_jax.models.int8 import check_int8, with_int8_weights


def load_checkpoint(
  folder: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: str | None = None,
  *,
  int8: bool = False,
) -> Export:
  """Opens a checkpoint, its parameters straight on their devices.

  Args:
    folder: an export, the folder of a run that has one, or a Hugging Face folder of the released
      layout.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters, e.g. "float32"; None: as they are stored.
    int8: round the decoder's weights once they are read, see `models.int8`; for answering alone.

  Raises:
    UserError: the folder holds none of these, a part of it is missing or damaged, or int8 weights
      need a package that is not installed.
  """
  if int8:
    check_int8()  # Before a large model is read.
  export = place(open_checkpoint(folder), mesh, dtype)
  if not int8:
    return export
  return dataclasses.replace(export, params=with_int8_weights(export.params))


def open_checkpoint(folder: str | os.PathLike) -> Source:
  """A checkpoint whose parameters are not read yet; errors as of `load_checkpoint`."""
  return open_hf(folder) if is_huggingface(folder) else open_export(folder)


def is_huggingface(folder: str | os.PathLike) -> bool:
  """Whether the folder has the config.json of a Hugging Face folder; errors if that is damaged."""
  file = epath.Path(folder).absolute() / CONFIG_FILE
  if not file.exists():
    return False
  values = read_json(file)
  return "model_type" in values and values.get("format") != FORMAT
