# SPDX-License-Identifier: Apache-2.0
"""Opens a checkpoint of whatever kind it is."""

import os

from etils import epath
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.checkpoints.hf import open_hf
from slowfast_jax.checkpoints.json_fields import read_json
from slowfast_jax.checkpoints.source import Source, place
from slowfast_jax.checkpoints.store import CONFIG_FILE, FORMAT, open_export


def load_checkpoint(
  folder: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> Export:
  """Opens a checkpoint, its parameters straight on their devices.

  Args:
    folder: an export, the folder of a run that has one, or a Hugging Face folder of the released
      layout.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters, e.g. "float32"; None: as they are stored.

  Raises:
    UserError: the folder holds none of these, or a part of it is missing or damaged.
  """
  return place(open_checkpoint(folder), mesh, dtype)


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
