# SPDX-License-Identifier: Apache-2.0
"""Strangers' images and videos to frames, in worker processes: what they do there harms nobody.

Sizes that a file claims are checked before anything of that size is made. What a file does not
claim, but does, meets the worker's limits of memory and time.
"""

import contextlib
import dataclasses
import io
import queue
import signal
import sys
from collections.abc import Iterator
from typing import cast

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from slowfast_jax.data.preprocess import Policy, preprocess
from slowfast_jax.data.video import Sampler, read_frames
from slowfast_jax.data.video_stream import VideoSource
from slowfast_jax.data.workers import Failure, Workers
from slowfast_jax.errors import UserError
from slowfast_jax.serve.errors import ApiError
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.sniff import Kind

# Address space of a worker: a libc arena, FFmpeg's tables and a few of the largest frames.
_WORKER_BYTES = 4 * 2**30
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


@dataclasses.dataclass(frozen=True)
class FrameSpec:
  """Which frames a model takes, and how.

  Attributes:
    size: height and width.
    num_frames, sampler, target_fps, policy: see `checkpoints.export.VideoConfig`.
    mean: colour of the bands beside a picture.
  """

  size: int
  num_frames: int
  sampler: str
  target_fps: float
  policy: str
  mean: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
  """Frames as a model takes them.

  Attributes:
    images: pixels, not normalised.
    timestamps: seconds of each.
    duration: seconds of the video; 0 of a picture.
  """

  images: UInt8[np.ndarray, "F h w C"]
  timestamps: Float[np.ndarray, " F"]
  duration: float


@dataclasses.dataclass(frozen=True)
class DecodeJob:
  """What a worker gets."""

  content: bytes
  kind: Kind
  spec: FrameSpec
  limits: Limits


def decode(job: DecodeJob) -> DecodedMedia | ApiError:
  """Reads an image or video, or says why not. Runs in a worker process."""
  _confine()
  try:
    read = _read_picture if job.kind == "image" else _read_video
    return read(job)
  except ApiError as refusal:
    return refusal
  except (UserError, OSError, SyntaxError, ValueError) as error:
    return _unreadable(str(error))
  except MemoryError:
    return _too_large("Decoding it takes too much memory")


def _confine() -> None:
  """Bounds this process's memory; a signal to the whole group must not end running requests."""
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  if sys.platform != "win32":
    import resource

    with contextlib.suppress(ValueError):  # The system allows even less.
      resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, _WORKER_BYTES))


def _read_picture(job: DecodeJob) -> DecodedMedia:
  # Our own limit stands before it.
  Image.MAX_IMAGE_PIXELS = None
  with Image.open(io.BytesIO(job.content), formats=_PICTURE_FORMATS) as opened:
    _check_pixels(*opened.size, job.limits)
    pixels = np.array(opened.convert("RGB"))
  square = preprocess(pixels, job.spec.size, "pad", mean=job.spec.mean)
  return DecodedMedia(square[None], np.zeros(1, np.float32), 0.0)


def _read_video(job: DecodeJob) -> DecodedMedia:
  _check_video(job.content, job.limits)
  spec = job.spec
  frames = read_frames(
    job.content,
    spec.num_frames,
    sampler=cast(Sampler, spec.sampler),
    target_fps=spec.target_fps,
    transform=lambda image: preprocess(image, spec.size, cast(Policy, spec.policy)),
  )
  _check_seconds(frames.duration, job.limits)
  return DecodedMedia(np.stack(list(frames.images)), frames.timestamps, frames.duration)


def _check_video(content: bytes, limits: Limits) -> None:
  """What the header claims, then what the packets amount to, without decoding any."""
  with VideoSource(content).open() as video:
    stream = video.stream
    _check_pixels(stream.width or 0, stream.height or 0, limits)
    _check_frames(stream.frames or 0, limits)
    tick = float(stream.time_base or 0)
    _check_seconds(float(stream.duration or 0) * tick, limits)
    first = last = None
    for count, packet in enumerate(video.container.demux(stream), start=1):
      _check_frames(count - 1, limits)
      if packet.pts is not None:
        first = packet.pts if first is None else min(first, packet.pts)
        last = packet.pts if last is None else max(last, packet.pts)
    if first is not None and last is not None:
      _check_seconds((last - first) * tick, limits)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
  if width * height > limits.pixels:
    raise _too_large(
      f"It has {width} x {height} pixels; at most {limits.megapixels:g} million are read"
    )


def _check_frames(count: int, limits: Limits) -> None:
  if count > limits.video_frames:
    raise _too_large(f"It has more than {limits.video_frames} frames")


def _check_seconds(seconds: float, limits: Limits) -> None:
  if seconds > limits.video_seconds:
    raise _too_large(f"It lasts longer than {limits.video_seconds:g} seconds")


def _too_large(reason: str) -> ApiError:
  return ApiError(413, f"{reason}; send a shorter or smaller one.", "media_too_large")


def _unreadable(reason: str) -> ApiError:
  return ApiError(400, f"It cannot be read: {reason}", "unreadable_media")


class DecodePool:
  """Worker processes for threads that wait for one result each.

  Args:
    count: worker processes.
    spec: what the model takes.
    limits: of a file.
  """

  def __init__(self, count: int, spec: FrameSpec, limits: Limits):
    self._spec, self._limits = spec, limits
    self._all = [Workers(decode, 1, limits.decode_seconds) for _ in range(count)]
    self._idle: queue.Queue[Workers] = queue.Queue()

  def __enter__(self) -> "DecodePool":
    for workers in self._all:
      self._idle.put(workers.__enter__())
    return self

  def __exit__(self, *_) -> None:
    for workers in self._all:
      workers.__exit__()

  def decode(self, content: bytes, kind: Kind) -> DecodedMedia:
    """Waits for a worker and its result.

    Raises:
      ApiError: the content is too large, damaged, or takes its worker too long or down.
    """
    with self._borrow() as workers:
      (result,) = workers.map([DecodeJob(content, kind, self._spec, self._limits)])
    if isinstance(result, Failure):
      raise _unreadable(result.reason.removesuffix(" (--timeout)"))
    if isinstance(result, ApiError):
      raise result
    return cast(DecodedMedia, result)

  @contextlib.contextmanager
  def _borrow(self) -> Iterator[Workers]:
    workers = self._idle.get()
    try:
      yield workers
    finally:
      self._idle.put(workers)
