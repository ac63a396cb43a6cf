# SPDX-License-Identifier: Apache-2.0
"""A video or picture file to the frames that a model takes, as its training took them."""

import dataclasses
import os
import pathlib
from typing import cast

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from slowfast_jax.checkpoints.store import Export, VideoConfig
from slowfast_jax.data.preprocess import Policy, preprocess
from slowfast_jax.data.video import Sampler, VideoPath, read_frames
from slowfast_jax.errors import UserError

# Files of these names are still pictures; all others are opened as videos.
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class ModelFrames:
  """Square frames and when they are shown.

  Attributes:
    images: pixels, not normalised.
    timestamps: seconds from the video's first frame.
    duration: seconds of the whole video.
    lost: damaged frames that are left out.
  """

  images: UInt8[np.ndarray, "F h w C"]
  timestamps: Float[np.ndarray, " F"]
  duration: float
  lost: int


def is_picture(path: VideoPath) -> bool:
  """Whether a file is opened as a still picture, by its name."""
  return isinstance(path, str | os.PathLike) and (
    pathlib.Path(os.fsdecode(path)).suffix.lower() in PICTURES
  )


def read_media(path: VideoPath, export: Export) -> ModelFrames:
  """Reads a picture as one frame, by the file's name, and anything else as a video.

  Raises:
    UserError: the file is missing, or neither.
  """
  if is_picture(path):
    return read_picture(pathlib.Path(os.fsdecode(cast(str, path))), export)
  return read_video(path, export)


def read_picture(path: pathlib.Path, export: Export) -> ModelFrames:
  """Reads a still picture. It is padded to a square, as in training: only videos are squeezed.

  Raises:
    UserError: the file is missing, no picture, or damaged.
  """
  vision = export.model.vision
  try:
    with Image.open(path) as opened:
      pixels = np.array(opened.convert("RGB"))
  except FileNotFoundError as error:
    raise UserError(f"{path}: there is no such file.") from error
  except (UnidentifiedImageError, OSError, SyntaxError) as error:
    raise UserError(f"{path}: not a picture that can be read: {error}") from error
  square = preprocess(pixels, vision.image_size, "pad", mean=vision.pixel_mean)
  return ModelFrames(square[None], np.zeros(1, np.float32), duration=0.0, lost=0)


def read_video(
  path: VideoPath,
  export: Export,
  video: VideoConfig | None = None,
  start: float | None = None,
  end: float | None = None,
) -> ModelFrames:
  """Reads the frames that the model of this export takes.

  Args:
    path: the file, or its content.
    export: the model.
    video: which frames are taken; None: those of its training.
    start, end: seconds of the part that frames are taken from; None: of the whole video.

  Raises:
    VideoError: the file is missing, no video, too damaged, or has no such part.
  """
  size, video = export.model.vision.image_size, video or export.video
  policy = cast(Policy, video.policy)
  frames = read_frames(
    path,
    video.num_frames,
    sampler=cast(Sampler, video.sampler),
    target_fps=video.target_fps,
    start=start,
    end=end,
    transform=lambda image: preprocess(image, size, policy),
  )
  return ModelFrames(
    np.stack(list(frames.images)), frames.timestamps, frames.duration, frames.decode_errors
  )
