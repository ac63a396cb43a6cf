# SPDX-License-Identifier: Apache-2.0
"""A video file to the frames that a model takes, as its training took them."""

import dataclasses
from typing import cast

import numpy as np
from jaxtyping import Float, UInt8

from slowfast_jax.checkpoints.store import Export
from slowfast_jax.data.preprocess import Policy, preprocess
from slowfast_jax.data.video import Sampler, VideoPath, read_frames


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


def read_video(path: VideoPath, export: Export) -> ModelFrames:
  """Reads the frames that the model of this export takes.

  Raises:
    VideoError: the file is missing, no video, or too damaged.
  """
  size, video = export.model.vision.image_size, export.video
  frames = read_frames(
    path,
    video.num_frames,
    sampler=cast(Sampler, video.sampler),
    target_fps=video.target_fps,
    transform=lambda image: preprocess(image, size, cast(Policy, video.policy)),
  )
  return ModelFrames(
    np.stack(list(frames.images)), frames.timestamps, frames.duration, frames.decode_errors
  )
