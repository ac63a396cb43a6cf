# SPDX-License-Identifier: Apache-2.0
"""One video stream of a file: open it, list its frames, decode some of them.

A file is read twice. The first pass only lists the packets, so that frames are counted and timed
without decoding. The second decodes what the wanted frames need and jumps over the rest. Where
packets do not tell the frames (raw streams, hidden or packed frames, fields), the first pass
decodes the whole video instead, and the second counts.
"""

import bisect
import contextlib
import dataclasses
import errno
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from slowfast_jax.errors import UserError

VideoPath = str | os.PathLike | bytes | io.IOBase
Transform = Callable[[UInt8[np.ndarray, "h w C"]], Any]

# Containers of single videos. Playlists, concatenation scripts, devices and text "videos" are out:
# what they show depends on other files, or they are no videos.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,"
  "ogg,gif,mxf,nut,dv,rm,yuv4mpegpipe,mjpeg,wtv,mp3,wav,flac,aac"
)
# What a damaged file makes PyAV raise while packets are read; IndexError: a stream that the header
# did not announce.
_DAMAGE = (av.FFmpegError, OSError, IndexError)
_MP4_BOXES = (b"ftyp", b"mdat", b"moov", b"free", b"wide", b"skip")
# A jump costs a seek and refills the decoder; decoding a few frames costs less.
_MIN_FRAMES_JUMPED = 8
_DEFAULT_FPS = 25.0  # Of raw streams that do not say; FFmpeg's own choice.


class VideoError(UserError):
  """A video cannot be used. The message says which file, what is wrong and what to do."""

  def __init__(self, name: str, problem: str, remedy: str):
    super().__init__(f"{name}: {problem}; {remedy}")


@dataclasses.dataclass(frozen=True)
class Video:
  """An open container and the stream of it that is the video."""

  container: InputContainer
  stream: VideoStream


class VideoSource:
  """A video that can be opened again and again, and the name that errors give it."""

  def __init__(self, path: VideoPath):
    if isinstance(path, str | os.PathLike):
      self.name = os.fspath(path)
      self._head = self._head_of_file()
      # "file:" keeps a colon in the name from being read as a protocol.
      self._file: Any = "file:" + os.path.abspath(self.name)
    else:
      self._file = io.BytesIO(path) if isinstance(path, bytes) else path
      self.name = str(getattr(path, "name", "video in memory"))
      self._file.seek(0)
      self._head = self._file.read(8)
    if not self._head:
      raise VideoError(self.name, "the file is empty", "copy or download it again")

  def _head_of_file(self) -> bytes:
    path = pathlib.Path(self.name)
    if path.is_dir():
      raise VideoError(self.name, "is a directory", "give the path of one video file")
    if not path.exists():
      raise VideoError(self.name, "there is no such file", "check the path")
    if not path.is_file():
      raise VideoError(self.name, "is not a regular file", "give the path of one video file")
    try:
      with path.open("rb") as file:
        return file.read(8)
    except OSError as error:
      raise VideoError(self.name, f"cannot be read ({error.strerror})", "mend that") from error

  @contextlib.contextmanager
  def open(self) -> Iterator[Video]:
    """The container and its video stream, closed again on every way out."""
    if not isinstance(self._file, str):
      self._file.seek(0)
    # A file must not make us read other files or reach the network.
    options = {"protocol_whitelist": "file,pipe", "format_whitelist": _FORMATS}
    try:
      container = av.open(self._file, metadata_errors="ignore", options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
      raise self._unreadable(error) from error
    with container:
      yield Video(container, self._open_stream(container))

  def _unreadable(self, error: Exception) -> VideoError:
    reason = getattr(error, "strerror", None) or str(error)
    if getattr(error, "errno", None) == errno.EINVAL:  # From format_whitelist.
      reason = "its format is not one of single videos"
    elif self._head[4:] in _MP4_BOXES:
      return VideoError(
        self.name,
        "the MP4 file has no usable index (moov atom), as when a download or recording was cut",
        "copy or download it again",
      )
    if isinstance(error, EOFError):
      return VideoError(self.name, "ends before its first frame", "copy or download it again")
    return VideoError(
      self.name, f"is not a video file ({reason})", "convert it to MP4 or leave it out"
    )

  def _open_stream(self, container: InputContainer) -> VideoStream:
    if not container.streams:
      raise VideoError(
        self.name,
        "holds no audio or video at all, as when a recording was cut",
        "copy or download it again",
      )
    cover = av.stream.Disposition.attached_pic
    covers = [s for s in container.streams if s.disposition & cover]
    streams = [s for s in container.streams.video if s not in covers]
    if not streams:
      types = {"cover picture" if s in covers else s.type for s in container.streams}
      kinds = ", ".join(sorted(types))
      raise VideoError(
        self.name,
        f"has no video stream (it holds: {kinds})",
        "leave it out, or check that it is the right file",
      )
    try:
      context = streams[0].codec_context
      context.thread_count = 1  # Callers run one process a core; threads would only add cost.
      context.open(strict=False)
    except (av.FFmpegError, AttributeError, ValueError) as error:
      raise VideoError(self.name, "cannot decode its video codec", "convert it to H.264") from error
    return streams[0]


@dataclasses.dataclass(frozen=True)
class FrameIndex:
  """The frames of a video in the order of display.

  Attributes:
    times: seconds from the first frame.
    fps: average rate.
    duration: seconds, the last frame's own included.
    total: frames that the file promises; more than `times` where it was cut off.
    pts: the frames' timestamps in the stream; empty where frames are told by counting.
    keys: (pts, dts) of the packets where decoding can start, by pts.
  """

  times: list[float]
  fps: float
  duration: float
  total: int
  pts: list[int] = dataclasses.field(default_factory=list)
  keys: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)

  def start_of(self, i: int) -> tuple[int, int | None]:
    """The key packet from which frame i is decoded."""
    k = bisect.bisect_right(self.keys, self.pts[i], key=lambda key: key[0]) - 1
    return self.keys[k] if k >= 0 else (self.pts[0], None)

  def can_jump(self, here: int, there: int) -> bool:
    """Whether frame `there` is decoded without enough of the frames after `here` to seek."""
    if not self.pts:
      return False
    return bisect.bisect_left(self.pts, self.start_of(there)[0]) - here > _MIN_FRAMES_JUMPED

  def number(self, frame: VideoFrame) -> int | None:
    """The frame's place in the order of display."""
    i = bisect.bisect_left(self.pts, frame.pts) if frame.pts is not None else len(self.pts)
    return i if i < len(self.pts) and self.pts[i] == frame.pts else None


def packet_index(name: str, video: Video) -> FrameIndex | None:
  """Lists the frames from the packets alone, or returns None where those lack display times."""
  shown: list[tuple[int, int]] = []
  keys: list[tuple[int, int | None]] = []
  packets = 0
  with contextlib.suppress(*_DAMAGE):  # Cut off here; the rest counts as missing below.
    for packet in video.container.demux(video.stream):
      packets += bool(packet.size or packet.dts is not None)
      if not packet.size:  # A repeated frame of AVI, or the end.
        continue
      if packet.pts is None:
        return None
      if packet.is_keyframe:
        keys.append((packet.pts, packet.dts))
      if not packet.is_discard:  # Outside of the edit list: decoded, never shown.
        shown.append((packet.pts, packet.duration or 0))
  if not shown:
    raise _no_frames(name)
  pts = sorted({p for p, _ in shown})
  in_order = all(p == q for p, (q, _) in zip(pts, shown))
  # AVI knows no time of display: of a codec that reorders frames it gives the order of decoding.
  if len(pts) < len(shown) or (in_order and video.stream.codec_context.has_b_frames):
    return None
  missing = max(len(video.stream.index_entries) - packets, 0)
  index = _timed_index(video.stream, pts, max(shown)[1], missing)
  return dataclasses.replace(index, pts=pts, keys=sorted(keys, key=lambda key: key[0]))


def decoded_index(name: str, video: Video) -> FrameIndex:
  """Lists the frames by decoding all of them."""
  frames = _decoded(video.container.demux(video.stream), [])
  shown = [(frame.pts, frame.duration or 0) for frame in frames]
  if not shown:
    raise _no_frames(name)
  pts = [p for p, _ in shown if p is not None]
  if len(pts) == len(shown) and all(a < b for a, b in itertools.pairwise(pts)):
    return _timed_index(video.stream, pts, shown[-1][1], missing=0)
  fps = float(video.stream.average_rate or video.stream.guessed_rate or _DEFAULT_FPS)
  times = [i / fps for i in range(len(shown))]
  return FrameIndex(times, fps, len(times) / fps, len(times))


def _no_frames(name: str) -> VideoError:
  return VideoError(name, "holds no readable frame", "copy or download it again, or leave it out")


def _timed_index(stream: VideoStream, pts: list[int], last: int, missing: int) -> FrameIndex:
  """The index of frames with these timestamps, the last one lasting `last` ticks if not 0."""
  tick = float(stream.time_base or 0)
  times = [(p - pts[0]) * tick for p in pts]
  header_fps = float(stream.average_rate or 0)
  interval = times[-1] / (len(pts) - 1) if len(pts) > 1 else 1 / (header_fps or _DEFAULT_FPS)
  duration = times[-1] + (last * tick or interval)
  fps = len(pts) / duration
  # The header's rate is exact where it is right, but often a guess from the first few frames.
  if abs(header_fps - fps) < 0.02 * fps:
    fps = header_fps
  return FrameIndex(times, fps, duration + missing / fps, len(pts) + missing)


@dataclasses.dataclass
class Decoded:
  """What decoding gave.

  Attributes:
    images: upright RGB frames, or what `transform` made of them, by frame number.
    size: height and width of the first.
    rotation: the file's own, in degrees counter-clockwise.
    turn: what makes the stored frames upright; see `_turn`.
    misled: the index does not describe what the decoder found: not every packet is one frame, or
      seeking does not lead where it should. A decoded index will.
  """

  images: dict[int, Any] = dataclasses.field(default_factory=dict)
  size: tuple[int, int] = (0, 0)
  rotation: int = 0
  turn: tuple[bool, bool, bool] = (False, False, False)
  misled: bool = False


def decode(
  video: Video, index: FrameIndex, wanted: list[int], transform: Transform | None
) -> Decoded:
  """Decodes the wanted frames in one sweep, jumping to later key frames where that saves work.

  Damaged frames are left out.
  """
  result = Decoded()
  errors: list[Any] = []
  wanted = sorted({i for i in wanted if i < len(index.times)})
  target = wanted[0] if wanted else None
  while target is not None:
    packets = _packets_for(video, index, target)
    if packets is None:
      return Decoded(misled=True)
    target, last = None, -1
    if index.pts:
      packets = _skipping(packets, video.stream, {index.pts[i] for i in wanted})
    for i, frame in _numbered(_decoded(packets, errors), index):
      if i < last:
        return Decoded(misled=True)
      last, nearest = i, bisect.bisect_left(wanted, i)
      if nearest < len(wanted) and wanted[nearest] == i:
        nearest += 1
        if not _develop(result, i, frame, transform):
          errors.append(i)
        if nearest < len(wanted) and index.can_jump(i, wanted[nearest]):
          target = wanted[nearest]
          break
      if nearest == len(wanted):
        break
  # The decoder found no fault and yet frames are missing: not every packet was a frame.
  result.misled = bool(index.pts) and not errors and len(result.images) < len(wanted)
  return result


def _packets_for(video: Video, index: FrameIndex, i: int) -> Iterator[av.Packet] | None:
  """Packets from the key frame of frame i on, or None where seeking does not lead there.

  Some containers seek by the time of display, some by that of decoding. Both are tried.
  """
  if not index.pts:
    return video.container.demux(video.stream)
  pts, dts = index.start_of(i)
  for target in (pts, dts):
    with contextlib.suppress(*_DAMAGE):
      if target is None:
        continue
      video.container.seek(target, stream=video.stream)
      packets = video.container.demux(video.stream)
      for packet in packets:
        if packet.pts == pts:
          return itertools.chain([packet], packets)
        if packet.dts is not None and dts is not None and packet.dts > dts:
          break
  return None


def _skipping(
  packets: Iterator[av.Packet], stream: VideoStream, wanted: set[int]
) -> Iterator[av.Packet]:
  """Lets the decoder pass over unwanted frames that no other frame needs: a third of the work."""
  for packet in packets:
    unwanted = packet.pts is not None and packet.pts not in wanted
    stream.codec_context.skip_frame = "NONREF" if unwanted else "DEFAULT"
    yield packet


def _decoded(packets: Iterator[av.Packet], errors: list[Any]) -> Iterator[VideoFrame]:
  """Decodes packets. A broken one costs the frames in it, not the rest."""
  try:
    for packet in packets:
      try:
        yield from packet.decode()
      except _DAMAGE as error:
        errors.append(error)
  except _DAMAGE as error:
    errors.append(error)


def _numbered(frames: Iterator[VideoFrame], index: FrameIndex) -> Iterator[tuple[int, VideoFrame]]:
  if not index.pts:
    yield from enumerate(frames)
    return
  for frame in frames:
    i = index.number(frame)
    if i is not None:
      yield i, frame


def _develop(result: Decoded, i: int, frame: VideoFrame, transform: Transform | None) -> bool:
  """Adds a frame to the result, upright, in RGB and of the first frame's size, unless damaged."""
  if frame.is_corrupt:
    return False
  try:
    image = frame.to_ndarray(format="rgb24", threads=1)
  except _DAMAGE:
    return False
  if not result.images:
    result.rotation, result.turn = frame.rotation % 360, _turn(frame)
  image = _upright(image, *result.turn)
  if not result.images:
    result.size = image.shape[:2]
  elif image.shape[:2] != result.size:  # Some streams change their size midway.
    height, width = result.size
    image = av.VideoFrame.from_ndarray(image).to_ndarray(format="rgb24", width=width, height=height)
  result.images[i] = image if transform is None else transform(image)
  return True


def _turn(frame: VideoFrame) -> tuple[bool, bool, bool]:
  """The file's display matrix as cameras write it: transpose, then flip rows, then columns."""
  # Asking a frame for its side data keeps its pixels until the next garbage collection, so only
  # one frame is asked, and only where it is turned. Upside down but not turned (a lone vertical
  # flip) thus goes unseen; no camera writes that.
  matrix: Any = frame.side_data.get("DISPLAYMATRIX") if frame.rotation else None
  if matrix is None:
    return False, False, False
  # A pixel at (x, y) is to be shown at (a x + c y, b x + d y).
  a, b, _, c, d = (int(m) for m in np.frombuffer(bytes(matrix), np.int32)[:5])
  if abs(a) < abs(b):
    return True, b < 0, c < 0
  return False, d < 0, a < 0


def _upright(
  image: UInt8[np.ndarray, "h w C"], transpose: bool, flip_rows: bool, flip_columns: bool
) -> UInt8[np.ndarray, "H W C"]:
  if transpose:
    image = image.transpose(1, 0, 2)
  return np.ascontiguousarray(image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
