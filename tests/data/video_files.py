# SPDX-License-Identifier: Apache-2.0
"""Writes small real video files whose every frame tells its own number."""

import dataclasses
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8

_BITS = 10


def numbered_frame(number: int, height: int = 64, width: int = 96) -> UInt8[np.ndarray, "h w C"]:
  """A frame with its number as ten black or white bars, and a red corner at the top left."""
  image = np.full((height, width, 3), 128, np.uint8)
  for bit in range(_BITS):
    left, right = bit * width // _BITS, (bit + 1) * width // _BITS
    image[height // 2 :, left:right] = 255 if number >> bit & 1 else 0
  image[: height // 4, : width // 4] = (220, 20, 20)
  return image


def read_number(image: UInt8[np.ndarray, "h w C"]) -> int:
  """The number that `numbered_frame` wrote, after any lossy codec."""
  height, width, _ = image.shape
  row = image[height * 5 // 8 : height * 7 // 8].mean((0, 2))
  centres = [int((bit + 0.5) * width / _BITS) for bit in range(_BITS)]
  return sum(int(row[x] > 128) << bit for bit, x in enumerate(centres))


@dataclasses.dataclass(frozen=True)
class VideoSpec:
  """How to write a video. `times`: seconds of each frame; None = a constant rate."""

  num_frames: int = 60
  fps: int = 25
  height: int = 64
  width: int = 96
  codec: str = "libx264"
  gop: int = 12
  times: Sequence[float] | None = None
  rotation: int = 0
  format: str | None = None
  options: dict[str, str] = dataclasses.field(default_factory=dict)
  pixels: str = "yuv420p"
  container_options: dict[str, str] = dataclasses.field(default_factory=dict)
  audio: bool = False


def write_video(path: pathlib.Path, spec: VideoSpec = VideoSpec()) -> pathlib.Path:
  """Writes the video and returns its path. The container follows the file's suffix."""
  with av.open(
    str(path), "w", format=spec.format, container_options=spec.container_options
  ) as container:
    stream = container.add_stream(spec.codec, rate=spec.fps, options=spec.options)
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pixels
    stream.gop_size = spec.gop
    tick = Fraction(1, spec.fps) if spec.times is None else Fraction(1, 1000)
    stream.codec_context.time_base = tick
    if spec.rotation:
      stream.set_display_rotation(spec.rotation)
    sound = container.add_stream("aac", rate=16000) if spec.audio else None
    for number in range(spec.num_frames):
      image = numbered_frame(number, spec.height, spec.width)
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.time_base = tick
      frame.pts = number if spec.times is None else round(spec.times[number] * 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if sound is not None:
      _write_silence(container, sound)
  return path


def write_audio(path: pathlib.Path, codec: str = "aac") -> pathlib.Path:
  """Writes a second of silence without any picture."""
  with av.open(str(path), "w") as container:
    _write_silence(container, container.add_stream(codec, rate=16000))
  return path


def _write_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
  frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
  frame.sample_rate = 16000
  container.mux(stream.encode(frame))
  container.mux(stream.encode())
