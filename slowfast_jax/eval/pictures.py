# SPDX-License-Identifier: Apache-2.0
"""Videos that a release keeps as a folder of pictures, one a frame."""

from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.data.preprocess import Policy, preprocess
from slowfast_jax.data.video import frame_indices
from slowfast_jax.errors import UserError
from slowfast_jax.generate.video import ModelFrames

_SUFFIXES = (".jpg", ".png")
# Pictures a second of the only such release, TVQA's in MVBench.
_FPS = 3.0


def read_picture_folder(folder: Path, export: Export) -> ModelFrames:
  """Reads evenly spaced pictures, in the order of their names; few are repeated.

  Raises:
    UserError: there are none, or one is damaged.
  """
  files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
  if not files:
    raise UserError(f"{folder}: there are no pictures ({', '.join(_SUFFIXES)}) in this folder.")
  chosen = frame_indices(len(files), _FPS, export.video.num_frames, "uniform")
  pictures = {i: _read(files[i], export) for i in set(chosen)}
  return ModelFrames(
    np.stack([pictures[i] for i in chosen]),
    np.array(chosen, np.float32) / _FPS,
    duration=len(files) / _FPS,
    lost=0,
  )


def _read(file: Path, export: Export) -> np.ndarray:
  try:
    with Image.open(file) as opened:
      pixels = np.array(opened.convert("RGB"))
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{file}: not a picture that can be read: {error}") from error
  return preprocess(pixels, export.model.vision.image_size, cast(Policy, export.video.policy))
