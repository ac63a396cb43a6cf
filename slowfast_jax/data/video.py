# SPDX-License-Identifier: Apache-2.0
"""Video files to frames: which frames a model sees, and their pixels with true timestamps.

Timestamps are the stream's own, not frame number / rate, which is wrong by seconds for videos of
variable rate. Frames that a damaged file cannot give are dropped and counted, never invented.
"""

import bisect
import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from slowfast_jax.data.video_stream import (
  Decoded,
  FrameIndex,
  Transform,
  VideoError,
  VideoPath,
  VideoSource,
  decode,
  decoded_index,
  packet_index,
)

__all__ = ["Frames", "Sampler", "VideoError", "VideoPath", "frame_indices", "read_frames"]

Sampler = Literal["uniform", "fps"]

# Matroska rounds times to a millisecond.
_HALF_TICK = 0.0005
# Clips annotated in rounded seconds may end so much after the video does.
_END_SLACK = 1.0


@dataclasses.dataclass(frozen=True)
class Frames:
  """The frames read from one video.

  Attributes:
    images: the frames, upright; with a `transform`, the list of what it returned.
    timestamps: seconds from the video's first frame.
    indices: frame numbers in the video.
    fps: average rate of the whole video.
    duration: seconds of the whole video.
    total_frames: frames of the whole video.
    height: of the upright frames before any `transform`.
    width: of the upright frames before any `transform`.
    decode_errors: frames that were wanted but could not be decoded; they are left out.
    rotation: what the file asked for and `images` have had, in degrees counter-clockwise.
  """

  images: UInt8[np.ndarray, "T h w C"] | list[Any]
  timestamps: Float[np.ndarray, " T"]
  indices: Int[np.ndarray, " T"]
  fps: float
  duration: float
  total_frames: int
  height: int
  width: int
  decode_errors: int
  rotation: int


def frame_indices(
  total_frames: int,
  video_fps: float,
  num_frames: int,
  sampler: Sampler = "uniform",
  target_fps: float = 2.0,
) -> list[int]:
  """Which frames of a video a model sees, in order.

  `uniform` spreads `num_frames` from the first frame to the last; a shorter video repeats frames,
  and `video_fps` and `target_fps` do not matter. `fps` takes `target_fps` frames a second, thinned
  to `num_frames` where that is more; a shorter video gives fewer. Both are what the released models
  were trained and run with, rounding included: Python rounds halves to even.

  Raises:
    ValueError: a count or rate is not positive, or the sampler is unknown.
  """
  if total_frames < 1 or num_frames < 1:
    raise ValueError(
      f"total_frames and num_frames must be at least 1, got {total_frames} and {num_frames}."
    )
  if sampler == "uniform":
    return [int(i) for i in np.linspace(0, total_frames - 1, num_frames)]
  if sampler != "fps":
    raise ValueError(f'sampler must be "uniform" or "fps", got {sampler!r}.')
  if not (0 < video_fps < math.inf and 0 < target_fps < math.inf):
    raise ValueError(
      'sampler "fps" needs a positive video_fps and target_fps in frames a second, '
      f"got {video_fps} and {target_fps}."
    )
  step = max(round(video_fps / min(target_fps, video_fps)), 1)
  candidates = range(0, total_frames, step)
  if len(candidates) < num_frames:
    return list(candidates)
  stride = len(candidates) / num_frames
  return [candidates[round((i + 1) * stride - 1)] for i in range(num_frames)]


def read_frames(
  path: VideoPath,
  num_frames: int,
  *,
  sampler: Sampler = "uniform",
  target_fps: float = 2.0,
  start: float | None = None,
  end: float | None = None,
  transform: Transform | None = None,
) -> Frames:
  """Reads the frames of a video that a model sees.

  Args:
    path: a file's path, or its content as bytes or as a seekable binary file.
    num_frames: at most so many; see `frame_indices`.
    sampler: see `frame_indices`; rates are relative to the video's average rate.
    target_fps: see `frame_indices`.
    start: seconds from the first frame; sample only from here on.
    end: seconds from the first frame; sample only before it. Up to one second after the end of the
      video it means the end, for annotations in rounded seconds.
    transform: applied to each RGB frame as soon as it is decoded, so that only its results are
      held. A frame that is chosen twice is transformed once.

  Raises:
    VideoError: the file is missing, is no video, is damaged so that more than half of the wanted
      frames are lost, or `start` and `end` do not lie in it.
    ValueError: an argument is wrong whatever the file.
  """
  frame_indices(1, 1.0, num_frames, sampler, target_fps)  # Wrong arguments fail before the file.
  source = VideoSource(path)

  def choose(index: FrameIndex) -> list[int]:
    first, stop = _span(source.name, index, start, end)
    chosen = frame_indices(stop - first, index.fps, num_frames, sampler, target_fps)
    return [first + i for i in chosen]

  with source.open() as video:
    index = packet_index(source.name, video)
    if index is not None:
      chosen = choose(index)
      decoded = decode(video, index, chosen, transform)
  if index is None or decoded.misled:
    with source.open() as video:
      index = decoded_index(source.name, video)
    chosen = choose(index)
    with source.open() as video:
      decoded = decode(video, index, chosen, transform)
  return _gather(source.name, index, chosen, decoded, stack=transform is None)


def _span(name: str, index: FrameIndex, start: float | None, end: float | None) -> tuple[int, int]:
  """The frames [first, stop) that begin in [start, end), or else the one on screen there."""
  low, high = start or 0.0, index.duration if end is None else end
  lasts = f"the video lasts {index.duration:.2f} seconds"
  if not 0 <= low < index.duration:
    raise VideoError(name, f"start = {low:g} lies outside: {lasts}", "choose another start")
  if not high <= index.duration + _END_SLACK:
    raise VideoError(name, f"end = {high:g} lies outside: {lasts}", "choose another end, or None")
  if high <= low:
    raise VideoError(name, f"end = {high:g} is not after start = {low:g}", "choose another span")
  # Frames that a cut file only promises lie where its rate puts them.
  times = index.times + [i / index.fps for i in range(len(index.times), index.total)]
  first = bisect.bisect_left(times, low - _HALF_TICK)
  stop = bisect.bisect_left(times, high - _HALF_TICK)
  return (first, stop) if first < stop else (stop - 1, stop)


def _gather(
  name: str, index: FrameIndex, chosen: list[int], decoded: Decoded, stack: bool
) -> Frames:
  """The chosen frames in order, without the lost ones."""
  wanted = len(set(chosen))
  lost = wanted - len(decoded.images)
  if 2 * lost > wanted:
    raise VideoError(
      name,
      f"{lost} of the {wanted} wanted frames are damaged or missing",
      "copy or download it again, or leave it out",
    )
  kept = [i for i in chosen if i in decoded.images]
  images = [decoded.images[i] for i in kept]
  return Frames(
    images=np.stack(images) if stack else images,
    timestamps=np.array([index.times[i] for i in kept], np.float32),
    indices=np.array(kept, np.int32),
    fps=index.fps,
    duration=index.duration,
    total_frames=index.total,
    height=decoded.size[0],
    width=decoded.size[1],
    decode_errors=lost,
    rotation=decoded.rotation,
  )
