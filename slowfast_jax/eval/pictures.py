# SPDX-License-Identifier: Apache-2.0
"""Videos that a release keeps as a folder of pictures, one a frame."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.data.preprocess import Policy, preprocess
from slowfast_jax.data.video import frame_indices
from slowfast_jax.errors import UserError
from slowfast_jax.generate.video import ModelFrames

T = TypeVar("T")

_SUFFIXES = (".jpg", ".png")
# Pictures a second of the only such release, TVQA's in MVBench.
_FPS = 3.0


def read_picture_folder(folder: Path, export: Export) -> ModelFrames:
  """Reads evenly spaced pictures, in the order of their names; few are repeated.

  Raises:
    UserError: there are none, or one is damaged.
  """
  size, policy = export.model.vision.image_size, cast(Policy, export.video.policy)
  pictures, timestamps = read_pictures(
    folder, export.video.num_frames, lambda image: preprocess(image, size, policy)
  )
  duration = len(_files(folder)) / _FPS
  return ModelFrames(np.stack(pictures), timestamps, duration=duration, lost=0)


def read_pictures(
  folder: Path, count: int, transform: Callable[[UInt8[np.ndarray, "h w C"]], T]
) -> tuple[list[T], Float[np.ndarray, " T"]]:
  """What `transform` makes of evenly spaced pictures, and their times in seconds.

  Raises:
    UserError: there are none, or one is damaged.
  """
  files = _files(folder)
  if not files:
    raise UserError(f"{folder}: there are no pictures ({', '.join(_SUFFIXES)}) in this folder.")
  chosen = frame_indices(len(files), _FPS, count, "uniform")
  pictures = {i: transform(_read(files[i])) for i in set(chosen)}
  return [pictures[i] for i in chosen], np.array(chosen, np.float32) / _FPS


def _files(folder: Path) -> list[Path]:
  return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)


def _read(file: Path) -> UInt8[np.ndarray, "h w C"]:
  try:
    with Image.open(file) as opened:
      return np.array(opened.convert("RGB"))
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{file}: not a picture that can be read: {error}") from error
