# SPDX-License-Identifier: Apache-2.0
"""Small synthetic scenes, written as real H.264 files: brief flashes while night turns to day.

A scene is a moving, textured, nearly grey background over which four coloured shapes flash, one
after the other, each for a fraction of a second. The flashes are placed so that some sampled frame
always shows each of them, and so that the few frames that become fast tokens almost never do: what
the questions ask about is visible to the slow tokens only.

Slow tokens carry no temporal position (permuting them changes nothing), so the order of two flashes
has to be legible in the pictures themselves. It is: the light rises steadily from the first frame
to the last, and the background around a flash tells the time of day.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from jaxtyping import Float, Int, UInt8, UInt16
from PIL import Image

from slowfast_jax.data.video import frame_indices

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
TIMES = ("night", "dawn", "morning", "noon")
# As on a map, and a single word each: two words are learned one after the other.
PLACES = ("northwest", "northeast", "southwest", "southeast")
_RGB = {
  "red": (235, 30, 30),
  "green": (20, 200, 50),
  "blue": (50, 70, 255),
  "yellow": (250, 220, 0),
}

# Part of a file's fingerprint: raise it when the same scene would be drawn or encoded differently.
_RENDERER = 3
# x264's constant quantizer: about 40 kB a clip. Its rate control would look at earlier frames, and
# every later one would depend a little on what flashed.
_QUANTIZER = 24
_GAP = 0.5  # Seconds of empty background between two flashes, at least.
_SPAN = 3.0  # Seconds between the first and the last flash's starts, at least.
_HIDDEN = 0.95  # The share of flashes that may not touch a fast token's frame.


@dataclass(frozen=True)
class Geometry:
  """Which moments of a clip a model sees, and which of these its fast tokens keep."""

  num_frames: int = 32
  fast_stride: int = 8

  @property
  def fast_frames(self) -> range:
    """Sampled frames that become fast tokens."""
    return range(0, self.num_frames, self.fast_stride)


@dataclass(frozen=True)
class Event:
  """One flash: it is on in every frame whose time lies in [start, end)."""

  shape: str
  colour: str
  place: str
  start: float  # Seconds from the clip's first frame.
  end: float
  centre_xy: tuple[int, int]  # Pixels.
  radius: int  # Pixels.


@dataclass(frozen=True)
class Background:
  """A window that drifts over a large texture while the light rises."""

  origin_xy: tuple[float, float]  # Pixels of the texture.
  velocity_xy: tuple[float, float]  # Pixels a second.
  sway: tuple[float, float]  # Pixels, cycles a second.
  contrast: float
  tint_uv: tuple[int, int]  # Offsets from grey of the two chroma planes.
  light: tuple[float, float]  # Mean brightness (0 to 255) at the first and the last frame.


@dataclass(frozen=True)
class Scene:
  """Everything that determines a clip's pixels."""

  seed: int
  size: int  # Pixels, both sides.
  fps: int
  duration: float  # Seconds.
  events: tuple[Event, ...]  # In order of time.
  background: Background

  @property
  def total_frames(self) -> int:
    return round(self.duration * self.fps)

  @property
  def fingerprint(self) -> str:
    """Names the scene and the way it is drawn; the video file carries it."""
    return hashlib.sha256(f"{_RENDERER} {_QUANTIZER} {self!r}".encode()).hexdigest()[:16]


def time_of_day(scene: Scene, event: Event) -> str:
  """The quarter of its day, that is of the clip, in which a flash begins."""
  quarter = int(len(TIMES) * max(event.start, 0.0) / scene.duration)
  return TIMES[min(quarter, len(TIMES) - 1)]


def sample_times(scene: Scene, geometry: Geometry) -> Float[np.ndarray, " F"]:
  """Seconds of the frames a model sees: the `uniform` sampler's choice."""
  return _uniform(scene.total_frames, geometry) / scene.fps


def event_frames(event: Event, timestamps: Sequence[float] | Float[np.ndarray, " F"]) -> list[int]:
  """Which of the sampled frames show the event."""
  return [i for i, time in enumerate(timestamps) if event.start <= time < event.end]


def make_scene(seed: int, geometry: Geometry, size: int = 96) -> Scene:
  """Draws a scene; a pure function of its arguments.

  Raises:
    ValueError: the size is odd or too small for the shapes to be told apart.
  """
  if size < 32 or size % 2:
    raise ValueError(f"size must be an even number of pixels, at least 32, got {size}.")
  rng = np.random.default_rng(seed)
  fps = int(rng.integers(24, 31))
  total = round(rng.uniform(8.0, 16.0) * fps)
  spans = _event_spans(rng, total, fps, geometry)
  looks = zip(rng.permutation(SHAPES), rng.permutation(COLOURS), strict=True)
  events = tuple(
    _event(rng, str(shape), str(colour), span, size)
    for (shape, colour), span in zip(looks, spans, strict=True)
  )
  return Scene(seed, size, fps, total / fps, events, _background(rng, size))


def render(scene: Scene) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """The clip's frames as RGB, before compression."""
  for planes in _paint(scene):
    yield av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")


def render_moment(scene: Scene, frame: int) -> UInt8[np.ndarray, "h w 3"]:
  """One of the clip's frames as RGB."""
  (planes,) = _paint(scene, [frame])
  return av.VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")


def write_video(scene: Scene, path: str | os.PathLike) -> None:
  """Encodes the clip as H.264 in mp4; the file appears under its name only when it is whole."""
  path = os.fspath(path)
  partial = f"{path}.{os.getpid()}.partial"
  try:
    with av.open(partial, "w", format="mp4") as container:
      container.metadata["comment"] = scene.fingerprint
      stream = container.add_stream("libx264", rate=Fraction(scene.fps))
      stream.width = stream.height = scene.size
      stream.pix_fmt = "yuv420p"
      stream.codec_context.thread_count = 1
      stream.options = {"preset": "ultrafast", "qp": str(_QUANTIZER), "g": "60", "forced-idr": "1"}
      for planes, fresh in zip(_paint(scene), _fresh_starts(scene), strict=True):
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pict_type = PictureType.I if fresh else PictureType.NONE
        container.mux(stream.encode(frame))
      container.mux(stream.encode())
    os.replace(partial, path)
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def is_written(scene: Scene, path: str | os.PathLike) -> bool:
  """Whether the file is there and shows exactly this scene."""
  if not os.path.exists(path):
    return False
  try:
    with av.open(os.fspath(path)) as container:
      return container.metadata.get("comment") == scene.fingerprint
  except av.FFmpegError:
    return False


def _fresh_starts(scene: Scene) -> list[bool]:
  """Frames to encode without reference to earlier ones: the first after each flash.

  Without them a flash leaves a faint ghost in the frames predicted from it, for up to two seconds,
  and a model could read from a fast token's frame what that frame does not show.
  """
  on = [
    any(event.start <= i / scene.fps < event.end for event in scene.events)
    for i in range(scene.total_frames)
  ]
  return [before and not now for before, now in zip([False, *on], on, strict=False)]


def _uniform(total: int, geometry: Geometry) -> Int[np.ndarray, " F"]:
  return np.array(frame_indices(total, 1.0, geometry.num_frames, "uniform"))


def _event_spans(
  rng: np.random.Generator, total: int, fps: int, geometry: Geometry
) -> list[tuple[float, float]]:
  """Start and end of the four flashes, in order.

  A flash is longer than the gap between two sampled frames, so some sampled frame shows it whatever
  its phase. It begins and ends half way between two video frames: no rounding of a timestamp can
  change which frames show it.
  """
  count, sampled = len(SHAPES), _uniform(total, geometry)
  fast = sampled[list(geometry.fast_frames)]
  gap = int(np.diff(sampled).max())
  shortest = max(round(0.4 * fps), gap + 1)
  longest = max(round(0.8 * fps), shortest)
  longest = min(longest, max(shortest, round(1.75 * gap)))
  hidden = rng.random(count) < _HIDDEN
  for _ in range(10_000):
    lengths = rng.integers(shortest, longest + 1, count)
    free = total - int(lengths.sum()) - round(_GAP * fps) * (count - 1)
    if free < 1:
      break
    starts = np.sort(rng.integers(0, free, count)) + np.arange(count) * round(_GAP * fps)
    starts[1:] += np.cumsum(lengths)[:-1]
    ends = starts + lengths
    seen = ((fast[:, None] >= starts) & (fast[:, None] < ends)).any(axis=0)
    if not (seen & hidden).any() and starts[-1] - starts[0] >= _SPAN * fps:
      spans = zip(starts.tolist(), ends.tolist(), strict=True)
      return [((a - 0.5) / fps, (b - 0.5) / fps) for a, b in spans]
  raise ValueError(
    f"{count} flashes do not fit between the fast frames of {geometry}: "
    "use more frames or a larger fast_stride."
  )


def _event(
  rng: np.random.Generator, shape: str, colour: str, span: tuple[float, float], size: int
) -> Event:
  """Puts the flash into a random quadrant."""
  return place_event(rng, shape, colour, int(rng.integers(len(PLACES))), span, size)


def place_event(
  rng: np.random.Generator,
  shape: str,
  colour: str,
  place: int,
  span: tuple[float, float],
  size: int,
) -> Event:
  """A flash near the middle of its quadrant, never across a middle line."""
  radius = int(rng.integers(round(0.17 * size), round(0.21 * size) + 1))
  jitter = round(0.02 * size)
  # The corner is even, because a chroma sample covers two by two pixels.
  corner = [(size // 4 - radius + int(rng.integers(-jitter, jitter + 1))) // 2 * 2 for _ in "xy"]
  half = size // 4 * 2
  x, y = (max(0, min(c, size // 2 - 2 * radius)) + radius for c in corner)
  centre = (x + half * (place % 2), y + half * (place // 2))
  return Event(shape, colour, PLACES[place], *span, centre_xy=centre, radius=radius)


def _background(rng: np.random.Generator, size: int) -> Background:
  angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.3) * size
  return Background(
    origin_xy=tuple(rng.uniform(0, _texture(size).shape[0] - size, 2).tolist()),
    velocity_xy=(float(speed * np.cos(angle)), float(speed * np.sin(angle))),
    sway=(float(rng.uniform(0, 0.06) * size), float(rng.uniform(0.1, 0.4))),
    contrast=float(rng.uniform(0.5, 1.0)),
    tint_uv=(int(rng.integers(-5, 6)), int(rng.integers(-5, 6))),
    light=(float(rng.uniform(32, 48)), float(rng.uniform(162, 178))),
  )


@functools.lru_cache(maxsize=2)
def _texture(size: int) -> UInt16[np.ndarray, "H W"]:
  """Smooth noise at three scales around 128; none so coarse that a window's mean would wander."""
  side, rng = 8 * size, np.random.default_rng(0)
  total = np.zeros((side, side), np.float32)
  for cells, weight in ((128, 1.0), (64, 1.2), (32, 0.8)):
    noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    total += weight * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
  total = 128 + 26 * total / total.std()
  return np.clip(total, 72, 184).astype(np.uint16)


@functools.lru_cache(maxsize=64)
def _mask(shape: str, radius: int) -> Float[np.ndarray, "h w"]:
  """The shape's coverage of each pixel in a square of twice the radius."""
  fine = 8
  axis = (np.arange(2 * radius * fine) + 0.5) / (radius * fine) - 1
  u, v = axis[None, :], axis[:, None]
  inside = {
    "circle": u**2 + v**2 <= 0.92**2,
    "square": np.maximum(abs(u), abs(v)) <= 0.8,
    "triangle": (v <= 0.8) & (abs(u) <= (v + 0.95) * 0.55),
    "cross": (np.maximum(abs(u), abs(v)) <= 0.96) & (np.minimum(abs(u), abs(v)) <= 0.3),
  }[shape]
  side = 2 * radius
  return inside.reshape(side, fine, side, fine).mean(axis=(1, 3))


@functools.lru_cache(maxsize=8)
def _yuv(colour: str) -> tuple[float, float, float]:
  """BT.601 with limited range: what a decoder assumes of a small picture."""
  r, g, b = (value / 255 for value in _RGB[colour])
  luma = 0.299 * r + 0.587 * g + 0.114 * b
  return 16 + 219 * luma, 128 + 224 * (b - luma) / 1.772, 128 + 224 * (r - luma) / 1.402


def _paint(
  scene: Scene, moments: Sequence[int] | None = None
) -> Iterator[UInt8[np.ndarray, "h w"]]:
  """All frames, or some, in the encoder's own layout: luma, then two quarter-size chroma planes.

  Drawing in it, not in RGB, halves the cost of a clip: the background's chroma is constant, and no
  frame has to be converted. The array is reused from frame to frame.
  """
  size, back, texture = scene.size, scene.background, _texture(scene.size)
  planes = np.empty((size * 3 // 2, size), np.uint8)
  chroma = planes[size:].reshape(2, size // 2, size // 2)
  times = np.arange(scene.total_frames) / scene.fps
  path, light = _path(back, times, texture.shape[0] - size), _light(back, times)
  if moments is not None:
    times, path, light = times[moments], path[moments], light[moments]
  for time, (x, y), level in zip(times, path, light, strict=True):
    gain, offset = int(512 * level * back.contrast / 256), int(256 * level * (1 - back.contrast))
    window = texture[y : y + size, x : x + size]
    planes[:size] = (window * np.uint16(gain) + np.uint16(offset + 16 * 256)) >> 8
    chroma[0], chroma[1] = (128 + tint for tint in back.tint_uv)
    for event in scene.events:
      if event.start <= time < event.end:
        _stamp(planes[:size], chroma, event)
    yield planes


def _path(back: Background, times: Float[np.ndarray, " F"], room: int) -> Int[np.ndarray, "F 2"]:
  """Corners of the window; it turns round at the texture's border."""
  amplitude, frequency = back.sway
  sway = amplitude * np.sin(2 * np.pi * frequency * times)
  drift = np.array(back.origin_xy) + times[:, None] * np.array(back.velocity_xy)
  straight = drift + np.stack([sway, -sway], axis=1)
  return (room - np.abs(straight % (2 * room) - room)).astype(np.int64)


def _light(back: Background, times: Float[np.ndarray, " F"]) -> Float[np.ndarray, " F"]:
  """Mean luma above black, of 219, rising from night to day."""
  night, day = back.light
  return (night + (day - night) * times / times[-1]) * 219 / 255


def _stamp(
  luma: UInt8[np.ndarray, "h w"], chroma: UInt8[np.ndarray, "2 h2 w2"], event: Event
) -> None:
  """Draws the flash over the frame."""
  mask = _mask(event.shape, event.radius)
  side = mask.shape[0]
  half_mask = mask.reshape(side // 2, 2, side // 2, 2).mean(axis=(1, 3))
  x, y = (c - event.radius for c in event.centre_xy)
  bright, *tones = _yuv(event.colour)
  _blend(luma[y : y + side, x : x + side], mask, bright)
  for plane, tone in zip(chroma, tones, strict=True):
    _blend(plane[y // 2 : (y + side) // 2, x // 2 : (x + side) // 2], half_mask, tone)


def _blend(area: UInt8[np.ndarray, "h w"], mask: Float[np.ndarray, "h w"], value: float) -> None:
  area[...] = np.rint(area + (value - area) * mask).astype(np.uint8)
