# SPDX-License-Identifier: Apache-2.0
"""Writes small real video files whose every frame shows its own number."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8

_BITS = 10
os.environ.setdefault("SVT_LOG", "1")  # The AV1 encoder prints its settings otherwise.


def numbered_frame(number: int, height: int = 64, width: int = 96) -> UInt8[np.ndarray, "h w C"]:
  """A frame with its number as ten black or white bars below, and a red corner at the top left."""
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
  """How to write a video.

  Attributes:
    times: seconds of each frame; None = a constant rate. Frames before 0 go into an edit list.
    rotation: degrees counter-clockwise that a player is told to turn the frames.
    mirrored: a player is told to swap left and right after that.
    draw: the pixels of frame i, height and width; as they stand in the file, before any rotation.
    options: of the encoder.
    container_options: of the container.
  """

  num_frames: int = 60
  fps: int = 25
  height: int = 64
  width: int = 96
  codec: str = "libx264"
  pixels: str = "yuv420p"
  gop: int = 12
  times: Sequence[float] | None = None
  rotation: int = 0
  mirrored: bool = False
  audio: bool = False
  draw: Callable[[int, int, int], UInt8[np.ndarray, "h w C"]] = numbered_frame
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  container_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_video(path: pathlib.Path, spec: VideoSpec | None = None) -> pathlib.Path:
  """Writes a video and returns its path. The container follows the path's suffix."""
  spec = spec or VideoSpec()
  if spec.codec != "libsvtav1":
    return _write(path, spec)
  # Run by root, SVT-AV1 makes the thread that calls it a real-time one, and so all threads and
  # processes that this starts later: they would keep those that they wait for off the processor.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(_write, path, spec).result()


def _write(path: pathlib.Path, spec: VideoSpec) -> pathlib.Path:
  with av.open(str(path), "w", container_options=dict(spec.container_options)) as container:
    stream = container.add_stream(spec.codec, rate=spec.fps, options=dict(spec.options))
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pixels
    stream.gop_size = spec.gop
    tick = Fraction(1, spec.fps) if spec.times is None else Fraction(1, 1000)
    stream.codec_context.time_base = tick
    if spec.rotation or spec.mirrored:
      stream.set_display_rotation(spec.rotation, hflip=spec.mirrored)
    sound = container.add_stream("aac", rate=16000) if spec.audio else None
    for number in range(spec.num_frames):
      image = np.ascontiguousarray(spec.draw(number, spec.height, spec.width))
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.time_base = tick
      frame.pts = number if spec.times is None else round(spec.times[number] * 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if sound is not None:
      _mux_silence(container, sound)
  return path


def write_audio(path: pathlib.Path, cover: bool = False) -> pathlib.Path:
  """Writes a second of silence, with a cover picture if asked (MP3), but without any video."""
  with av.open(str(path), "w") as container:
    sound = container.add_stream("libmp3lame" if path.suffix == ".mp3" else "aac", rate=16000)
    if cover:
      picture = container.add_stream("mjpeg", rate=1)
      picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
      picture.disposition = av.stream.Disposition.attached_pic
      frame = av.VideoFrame.from_ndarray(numbered_frame(0), format="rgb24")
      frame.pts = 0
      container.mux(picture.encode(frame) + picture.encode())
    _mux_silence(container, sound)
  return path


def _mux_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
  frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
  frame.sample_rate = 16000
  container.mux(stream.encode(frame))
  container.mux(stream.encode())


def rewrite_packets(
  source: pathlib.Path, target: pathlib.Path, edit: Callable[[int, bytes], bytes]
) -> pathlib.Path:
  """Copies a video packet by packet, in decoding order, with the content that `edit` returns."""
  with av.open(str(source)) as old, av.open(str(target), "w") as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    packets = (p for p in old.demux(old.streams.video[0]) if p.size)
    for number, packet in enumerate(packets):
      copy = av.Packet(edit(number, bytes(packet)))
      copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
      copy.is_keyframe, copy.stream = packet.is_keyframe, stream
      new.mux(copy)
  return target
