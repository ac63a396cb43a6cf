# SPDX-License-Identifier: Apache-2.0
"""Video files to frames: which frames a model sees, and their pixels with true timestamps.

A file is read twice. The first pass only lists the packets, so that frames are counted and timed
without decoding. The second decodes what the wanted frames need and jumps over the rest. A file
whose packets do not tell its frames (raw streams, hidden or packed frames) is decoded in full
instead. Frames that a damaged file cannot give are dropped and counted, never invented.
"""

import bisect
import contextlib
import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, Int, UInt8

Sampler = Literal["uniform", "fps"]
VideoPath = str | os.PathLike | bytes | BinaryIO

# Containers of single videos. Playlists, concatenation scripts, devices and text "videos" are out:
# what they show depends on other files, or they are no videos.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,av1,ivf,flv,"
  "live_flv,asf,ogg,gif,mxf,nut,dv,rm,yuv4mpegpipe,mjpeg,wtv,vob,mp3,wav,flac,aac"
)
# A jump costs a decoder flush and a seek; decoding a few frames costs less.
_MIN_FRAMES_JUMPED = 8
# Matroska rounds times to a millisecond.
_HALF_TICK = 0.0005
# Annotated clips end up to a rounded second after the video does.
_END_SLACK = 1.0


class VideoError(ValueError):
  """A video cannot be used. The message says which file, what is wrong and what to do."""

  def __init__(self, name: str, problem: str, remedy: str):
    super().__init__(f"{name}: {problem}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Frames:
  """The frames read from one video.

  Attributes:
    images: the frames, upright; with a `transform`, the list of what it returned.
    timestamps: seconds from the video's first frame.
    indices: frame numbers in the video.
    fps: average rate of the whole video.
    duration: seconds of the whole video.
    total_frames: frames in the whole video.
    height: of the upright frames as decoded.
    width: of the upright frames as decoded.
    decode_errors: frames that were wanted but could not be decoded; they are left out.
    rotation: degrees that the frames were turned counter-clockwise to stand upright.
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

  `uniform` spreads `num_frames` from the first to the last frame; a shorter video repeats frames.
  `fps` takes `target_fps` frames a second, thinned to `num_frames` where that is more; a shorter
  video gives fewer. Both are what the released models were trained and run with, rounding
  included: Python rounds halves to even.

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
  transform: Callable[[UInt8[np.ndarray, "h w C"]], Any] | None = None,
) -> Frames:
  """Reads the frames of a video that a model sees.

  Args:
    path: a file's path, or its content as bytes or as a seekable binary file.
    num_frames: at most so many; see `frame_indices`.
    sampler: see `frame_indices`.
    target_fps: see `frame_indices`.
    start: seconds from the first frame; sample only from here on.
    end: seconds from the first frame; sample only before it. Up to one second after the end of the
      video it means the end, for annotations in rounded seconds.
    transform: applied to each RGB frame as soon as it is decoded, so that only its results are
      held. A frame chosen twice is transformed once.

  Raises:
    VideoError: the file is missing, is no video, is damaged so that more than half of the wanted
      frames are lost, or `start` and `end` do not lie in it.
    ValueError: an argument is wrong whatever the file.
  """
  frame_indices(1, 1.0, num_frames, sampler, target_fps)  # Wrong arguments fail before the file.
  source = _Source(path)

  def choose(index: _Index) -> list[int]:
    first, stop = _span(source.name, index, start, end)
    chosen = frame_indices(stop - first, index.fps, num_frames, sampler, target_fps)
    return [first + i for i in chosen]

  with source.open() as video:
    index = _packet_index(source.name, video)
    if index is not None:
      chosen = choose(index)
      picture = _decode(video, index, chosen, transform)
  if index is None or picture.misled:
    with source.open() as video:
      index = _decoded_index(source.name, video)
    chosen = choose(index)
    with source.open() as video:
      picture = _decode(video, index, chosen, transform)
  images = _gather(source.name, index, chosen, picture)
  return images if transform else dataclasses.replace(images, images=np.stack(images.images))


class _Source:
  """A video that can be opened again and again, under the name that errors give it."""

  def __init__(self, path: VideoPath):
    if isinstance(path, bytes | bytearray | memoryview):
      path = io.BytesIO(path)
    if isinstance(path, str | os.PathLike):
      self.name = os.fspath(path)
      # "file:" keeps a colon in the name from being read as a protocol.
      self._file: Any = "file:" + os.path.abspath(self.name)
      self._check_path(pathlib.Path(self.name))
      with pathlib.Path(self.name).open("rb") as file:
        self._head = file.read(16)
    else:
      self.name = str(getattr(path, "name", "video in memory"))
      self._file = path
      path.seek(0)
      self._head = path.read(16)
    if not self._head:
      raise VideoError(self.name, "the file is empty", "copy or download it again")

  def _check_path(self, path: pathlib.Path) -> None:
    if path.is_dir():
      raise VideoError(self.name, "is a directory", "give the path of one video file")
    if not path.exists():
      raise VideoError(self.name, "there is no such file", "check the path")
    if not path.is_file():
      raise VideoError(self.name, "is not a regular file", "give the path of one video file")
    if not os.access(path, os.R_OK):
      raise VideoError(self.name, "may not be read", "change its permissions")

  @contextlib.contextmanager
  def open(self) -> Iterator["_Video"]:
    """The container and its video stream, closed again on every way out."""
    if not isinstance(self._file, str):
      self._file.seek(0)
    options = {"protocol_whitelist": "file,pipe", "format_whitelist": _FORMATS}
    try:
      container = av.open(self._file, metadata_errors="ignore", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
      raise self._unreadable(error) from error
    with container:
      yield _Video(container, self._stream(container))

  def _unreadable(self, error: Exception) -> VideoError:
    if self._head[4:8] in (b"ftyp", b"mdat", b"moov", b"free", b"wide", b"skip"):
      return VideoError(
        self.name,
        "the MP4 file has no readable index (moov atom), as when a download or recording was cut",
        "copy or download it again",
      )
    reason = getattr(error, "strerror", None) or str(error)
    return VideoError(
      self.name, f"is not a video file ({reason})", "convert it to MP4 or leave it out"
    )

  def _stream(self, container: InputContainer) -> VideoStream:
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
      kinds = sorted({s.type for s in container.streams}) or ["none"]
      raise VideoError(
        self.name,
        f"has no video stream (streams: {', '.join(kinds)})",
        "leave it out, or check that it is the right file",
      )
    stream = streams[0]
    try:
      stream.codec_context.thread_count = 1  # Workers are processes; threads only add cost here.
      stream.codec_context.open(strict=False)
    except (av.FFmpegError, AttributeError, ValueError) as error:
      raise VideoError(
        self.name, "its video codec is unknown here", "convert it to H.264"
      ) from error
    return stream


@dataclasses.dataclass(frozen=True)
class _Video:
  container: InputContainer
  stream: VideoStream


@dataclasses.dataclass(frozen=True)
class _Index:
  """The frames of a video in the order of display.

  Attributes:
    times: seconds from the first frame.
    fps: average rate.
    duration: seconds, the last frame's own included.
    total: frames that the file promises; more than `times` where it was cut off.
    pts: the stream's timestamps; None where frames are told by counting.
    keys: (pts, dts) of the packets where decoding can start, by pts.
  """

  times: list[float]
  fps: float
  duration: float
  total: int
  pts: list[int] | None = None
  keys: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Picture:
  """What decoding gave: images by frame number, and what went wrong."""

  images: dict[int, Any] = dataclasses.field(default_factory=dict)
  size: tuple[int, int] = (0, 0)
  rotation: int = 0
  misled: bool = False


def _packet_index(name: str, video: _Video) -> _Index | None:
  """The index as the packets tell it, or None where they lack timestamps."""
  stream, shown, keys, packets, cut = video.stream, [], [], 0, False
  try:
    for packet in video.container.demux(stream):
      if not packet.size:
        continue
      packets += 1
      if packet.pts is None:
        return None
      if packet.is_keyframe:
        keys.append((packet.pts, packet.dts))
      if not packet.is_discard:  # Outside of the edit list: decoded, never shown.
        shown.append((packet.pts, packet.duration or 0))
  except av.FFmpegError:
    cut = True
  if not shown:
    raise _no_frames(name)
  pts, last = sorted({p for p, _ in shown}), max(shown)[1]
  if len(pts) < len(shown):
    return None
  missing = max(stream.frames - packets, 0) if cut else 0
  index = _index(stream, pts, last, missing)
  return dataclasses.replace(index, pts=pts, keys=sorted(keys, key=lambda key: key[0]))


def _decoded_index(name: str, video: _Video) -> _Index:
  """The index as the decoder tells it; frames are then found by counting."""
  stream, shown = video.stream, []
  for frame in _frames(video.container.demux(stream)):
    shown.append((frame.pts, frame.duration or 0))
  if not shown:
    raise _no_frames(name)
  pts = [p for p, _ in shown]
  if None not in pts and all(a < b for a, b in zip(pts, pts[1:])):
    return _index(stream, pts, shown[-1][1], missing=0)
  fps = float(stream.average_rate or stream.guessed_rate or 25)
  times = [i / fps for i in range(len(pts))]
  return _Index(times, fps, len(pts) / fps, len(pts))


def _index(stream: VideoStream, pts: list[int], last: int, missing: int) -> _Index:
  tick = float(stream.time_base)
  times = [(p - pts[0]) * tick for p in pts]
  rate = float(stream.average_rate or 0)
  # The last frame lasts as long as it says, else as long as the others, else as the header says.
  duration = times[-1] + (
    last * tick or (times[-1] / (len(pts) - 1) if len(pts) > 1 else 1 / (rate or 25.0))
  )
  fps = len(pts) / duration
  # The header's rate is exact where it is right, but often a guess from the first few frames.
  if abs(rate - fps) < 0.02 * fps:
    fps = rate
  return _Index(times, fps, duration + missing / fps, len(pts) + missing)


def _span(name: str, index: _Index, start: float | None, end: float | None) -> tuple[int, int]:
  """The frames [first, stop) that are shown in [start, end); at least the one on screen there."""
  low, high = start or 0.0, index.duration if end is None else end
  lasts = f"the video lasts {index.duration:.2f} seconds"
  if not 0 <= low < index.duration:
    raise VideoError(name, f"start = {low} lies outside: {lasts}", "choose another start")
  if not high <= index.duration + _END_SLACK:
    raise VideoError(name, f"end = {high} lies outside: {lasts}", "choose another end, or None")
  if high <= low:
    raise VideoError(name, f"end = {high} is not after start = {low}", "choose another span")
  times = index.times + [i / index.fps for i in range(len(index.times), index.total)]
  first = bisect.bisect_left(times, low - _HALF_TICK)
  stop = index.total if end is None else bisect.bisect_left(times, high - _HALF_TICK)
  if first >= stop:
    first = max(stop - 1, 0)
  return first, max(stop, first + 1)


def _decode(video: _Video, index: _Index, chosen: list[int], transform) -> _Picture:
  """Decodes the chosen frames in one sweep, jumping to a later key frame where that saves work."""
  picture, todo, errors = _Picture(), sorted(set(chosen), reverse=True), []
  while todo and todo[-1] < len(index.times):
    packets = _packets_from(video, index, todo[-1])
    if packets is None:
      picture.misled = True
      return picture
    for i, frame in _numbered(_frames(packets, errors), index):
      while todo and todo[-1] < i:
        todo.pop()
      if not todo:
        break
      if todo[-1] == i:
        todo.pop()
        if frame.is_corrupt:
          errors.append(i)
        else:
          _develop(picture, i, frame, transform)
      if todo and _key_frame(index, todo[-1]) > i + _MIN_FRAMES_JUMPED:
        break
    else:
      break
  lost = [i for i in set(chosen) if i not in picture.images and i < len(index.times)]
  # The decoder is content and yet frames are missing: not every packet is a frame.
  picture.misled = bool(lost) and not errors and index.pts is not None
  return picture


def _develop(picture: _Picture, i: int, frame: VideoFrame, transform) -> None:
  turns = (frame.rotation // 90) % 4
  size = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
  if not picture.images:
    picture.size, picture.rotation = size, turns * 90
  elif size != picture.size:  # Some streams change size midway.
    height, width = picture.size if turns % 2 == 0 else picture.size[::-1]
    frame = frame.reformat(width=width, height=height)
  image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
  picture.images[i] = image if transform is None else transform(image)


def _key_frame(index: _Index, i: int) -> int:
  """The number of the first frame that is decoded from the same key frame as frame i."""
  if index.pts is None:
    return 0
  k = bisect.bisect_right(index.keys, index.pts[i], key=lambda key: key[0]) - 1
  return bisect.bisect_left(index.pts, index.keys[k][0]) if k >= 0 else 0


def _packets_from(video: _Video, index: _Index, i: int) -> Iterator | None:
  """Packets from the last key frame before frame i on, or None where seeking does not lead there.

  Seeking is by display or by decoding time, depending on the container. Both are tried.
  """
  if index.pts is None:
    return video.container.demux(video.stream)
  k = bisect.bisect_right(index.keys, index.pts[i], key=lambda key: key[0]) - 1
  key = index.keys[max(k, 0)] if index.keys else (index.pts[0], None)
  for target in dict.fromkeys(t for t in key if t is not None):
    try:
      video.container.seek(target, stream=video.stream)
      for packet in (packets := video.container.demux(video.stream)):
        if packet.pts == key[0]:
          return _chain(packet, packets)
        if None not in (packet.dts, key[1]) and packet.dts > key[1]:
          break
    except av.FFmpegError:
      continue
  return None


def _chain(packet: av.Packet, packets: Iterator) -> Iterator:
  yield packet
  yield from packets


def _frames(packets: Iterator, errors: list | None = None) -> Iterator[VideoFrame]:
  """Decodes packets; a broken one costs the frames in it, not the rest."""
  errors = [] if errors is None else errors
  try:
    for packet in packets:
      try:
        yield from packet.decode()
      except av.FFmpegError as error:
        errors.append(error)
  except av.FFmpegError as error:
    errors.append(error)


def _numbered(frames: Iterator[VideoFrame], index: _Index) -> Iterator[tuple[int, VideoFrame]]:
  if index.pts is None:
    yield from enumerate(frames)
    return
  for frame in frames:
    i = bisect.bisect_left(index.pts, frame.pts) if frame.pts is not None else len(index.pts)
    if i < len(index.pts) and index.pts[i] == frame.pts:
      yield i, frame


def _gather(name: str, index: _Index, chosen: list[int], picture: _Picture) -> Frames:
  kept = [i for i in chosen if i in picture.images]
  lost = len(set(chosen)) - len(picture.images)
  if 2 * lost > len(set(chosen)):
    raise VideoError(
      name,
      f"{lost} of the {len(set(chosen))} wanted frames are damaged or missing",
      "copy or download it again, or leave it out",
    )
  images = [picture.images[i] for i in kept]
  return Frames(
    images=images,
    timestamps=np.array([index.times[i] for i in kept], np.float32),
    indices=np.array(kept, np.int32),
    fps=index.fps,
    duration=index.duration,
    total_frames=index.total,
    height=picture.size[0],
    width=picture.size[1],
    decode_errors=lost,
    rotation=picture.rotation,
  )


def _no_frames(name: str) -> VideoError:
  return VideoError(name, "holds no frame", "copy or download it again, or leave it out")
