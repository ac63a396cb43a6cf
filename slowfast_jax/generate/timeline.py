# SPDX-License-Identifier: Apache-2.0
"""A picture of what an answer was read from: frames in a strip, attention below, along time."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _STRIP_FRAMES = 1440, 48, 14
_CHART_HEIGHT, _GAP = 200, 6
_PAPER, _INK, _QUIET, _GRID = (255, 255, 255), (31, 35, 40), (110, 118, 129), (222, 226, 230)
_CURVE, _FILL, _EVENT, _EVENT_INK = (9, 105, 218), (191, 219, 254), (255, 236, 179), (154, 103, 0)
# Drawn larger and scaled down: Pillow's lines are not smooth by themselves.
_SCALE = 2


@dataclasses.dataclass(frozen=True)
class Timeline:
  """What the picture shows.

  Attributes:
    frames: the frames that the model saw.
    timestamps: seconds of each.
    duration: seconds of the whole video.
    profile: share of the attention that each frame got; sums to 1.
    question: shown above.
    answer: shown below the question.
    windows: (start, end) seconds of events worth marking.
  """

  frames: UInt8[np.ndarray, "F h w C"]
  timestamps: Float[np.ndarray, " F"]
  duration: float
  profile: Float[np.ndarray, " F"]
  question: str
  answer: str
  windows: Sequence[tuple[float, float]] = ()


def draw_timeline(timeline: Timeline) -> Image.Image:
  """The picture, 1440 pixels wide."""
  canvas = _Canvas(timeline)
  canvas.heading()
  canvas.chart()
  canvas.strip()
  return canvas.finish()


class _Canvas:
  """Lays the parts out from top to bottom, in pixels of the finished picture."""

  def __init__(self, timeline: Timeline):
    self._t = timeline
    self._heading = [
      (line, size, colour)
      for text, size, colour in (
        (timeline.question, 24, _INK),
        (f"Answer: {timeline.answer.strip() or '(empty)'}", 20, _CURVE),
      )
      for line in _wrap(text, size, _WIDTH - 2 * _MARGIN)
    ]
    inner = _WIDTH - 2 * _MARGIN
    self._columns = min(_STRIP_FRAMES, len(timeline.frames))
    side = (inner - (_STRIP_FRAMES - 1) * _GAP) / _STRIP_FRAMES
    height, width = timeline.frames.shape[1:3]
    self._frame = (side, side * height / width)
    self._strip_top = 32 + sum(int(1.5 * size) for _, size, _ in self._heading) + 16
    self._chart_top = self._strip_top + self._frame[1] + 40
    self._chart_bottom = self._chart_top + _CHART_HEIGHT
    total = int(self._chart_bottom + 56)
    self._image = Image.new("RGB", (_WIDTH * _SCALE, total * _SCALE), _PAPER)
    self._draw = ImageDraw.Draw(self._image)
    # The last frame is on screen until the video ends.
    self._end = max(timeline.duration, float(timeline.timestamps[-1]), 1e-3)

  def heading(self) -> None:
    y = 32.0
    for line, size, colour in self._heading:
      self._text((_MARGIN, y), line, size, colour)
      y += int(1.5 * size)

  def strip(self) -> None:
    """One frame for each stretch of time: the one that was read most."""
    t, (width, height) = self._t, self._frame
    parts = np.array_split(np.arange(len(t.frames)), self._columns)
    strongest = int(np.argmax(t.profile))
    used = self._columns * width + (self._columns - 1) * _GAP
    left = _MARGIN + (_WIDTH - 2 * _MARGIN - used) / 2
    for column, part in enumerate(parts):
      frame = int(part[np.argmax(t.profile[part])])
      x = left + column * (width + _GAP)
      box = (x, self._strip_top, x + width, self._strip_top + height)
      picture = Image.fromarray(t.frames[frame])
      size = (round(width * _SCALE), round(height * _SCALE))
      picture = picture.resize(size, Image.Resampling.BICUBIC)
      self._image.paste(picture, (round(box[0] * _SCALE), round(box[1] * _SCALE)))
      colour = _CURVE if frame == strongest else _GRID
      # A thread from each picture to its moment.
      self._line(
        [(x + width / 2, box[3] + 2), (self._x(t.timestamps[frame]), self._chart_top - 6)],
        colour,
        2 if frame == strongest else 1,
      )
      if frame == strongest:
        self._rectangle(tuple(v + d for v, d in zip(box, (-3, -3, 3, 3))), None, _CURVE, 3)

  def chart(self) -> None:
    t, bottom = self._t, self._chart_bottom
    even = 1 / len(t.profile)
    self._top = 1.15 * max(float(t.profile.max()), 2 * even)
    for start, end in t.windows:
      # A flash of a few frames must still be seen.
      left, right = self._x(start), max(self._x(end), self._x(start) + 3)
      self._rectangle((left, self._chart_top, right, bottom), _EVENT)
    corners = self._steps()
    self._draw.polygon(
      self._scaled([(_MARGIN, bottom), *corners, (_WIDTH - _MARGIN, bottom)]), fill=_FILL
    )
    self._line(corners, _CURVE, 2)
    for x in range(_MARGIN, _WIDTH - _MARGIN, 12):
      self._line([(x, self._y(even)), (x + 6, self._y(even))], _QUIET, 1)
    peak = int(np.argmax(t.profile))
    at, anchor = (_WIDTH - _MARGIN, "ra") if 2 * peak < len(t.profile) else (_MARGIN, "la")
    self._text((at, self._y(even) - 18), "if spread evenly", 13, _QUIET, anchor)
    self._line([(_MARGIN, bottom), (_WIDTH - _MARGIN, bottom)], _QUIET, 1)
    for second in _ticks(self._end):
      self._line([(self._x(second), bottom), (self._x(second), bottom + 5)], _QUIET, 1)
      self._text((self._x(second), bottom + 9), _clock(second), 14, _QUIET, "ma")
    middle = self._x((t.timestamps[peak] + self._until(peak)) / 2)
    label = f"{100 * t.profile[peak]:.0f}% at {_clock(float(t.timestamps[peak]), exact=True)}"
    middle = min(max(middle, _MARGIN + 60), _WIDTH - _MARGIN - 60)
    self._text((middle, self._y(t.profile[peak]) - 20), label, 15, _CURVE, "ma")
    note = "share of the attention to slow tokens that each frame gets"
    if t.windows:
      self._rectangle((_MARGIN, bottom + 34, _MARGIN + 12, bottom + 46), _EVENT, _EVENT_INK)
      self._text((_MARGIN + 20, bottom + 32), "what is asked about is visible", 13, _QUIET)
    self._text((_WIDTH - _MARGIN, bottom + 32), note, 13, _QUIET, "ra")

  def finish(self) -> Image.Image:
    width, height = self._image.size
    return self._image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS)

  def _steps(self) -> list[tuple[float, float]]:
    """A frame's share from its moment to the next frame's."""
    corners = []
    for i, share in enumerate(self._t.profile):
      start = 0.0 if i == 0 else float(self._t.timestamps[i])
      corners += [(self._x(start), self._y(share)), (self._x(self._until(i)), self._y(share))]
    return corners

  def _until(self, frame: int) -> float:
    times = self._t.timestamps
    return self._end if frame + 1 == len(times) else float(times[frame + 1])

  def _x(self, seconds: float) -> float:
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * min(max(float(seconds) / self._end, 0.0), 1.0)

  def _y(self, share: float) -> float:
    return self._chart_bottom - _CHART_HEIGHT * float(share) / self._top

  def _scaled(self, points):
    return [(x * _SCALE, y * _SCALE) for x, y in points]

  def _line(self, points, colour, width) -> None:
    self._draw.line(self._scaled(points), fill=colour, width=width * _SCALE, joint="curve")

  def _rectangle(self, box, fill, outline=None, width=1) -> None:
    scaled = [v * _SCALE for v in box]
    self._draw.rectangle(scaled, fill=fill, outline=outline, width=width * _SCALE)

  def _text(self, at, text, size, colour, anchor="la") -> None:
    font = ImageFont.load_default(size * _SCALE)
    self._draw.text((at[0] * _SCALE, at[1] * _SCALE), text, fill=colour, font=font, anchor=anchor)


def _wrap(text: str, size: int, width: float) -> list[str]:
  """Lines that fit into the width; at most six, so that no question fills the picture."""
  font = ImageFont.load_default(size)
  lines: list[str] = []
  for paragraph in text.splitlines():
    line = ""
    for word in paragraph.split():
      longer = f"{line} {word}".strip()
      if line and font.getlength(longer) > width:
        lines.append(line)
        line = word
      else:
        line = longer
    lines.append(line)
  return lines if len(lines) <= 6 else [*lines[:5], lines[5] + " ..."]


def _ticks(end: float) -> list[float]:
  """Round moments, about ten of them."""
  steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)
  step = next((s for s in steps if end / s <= 12), 3600 * np.ceil(end / 3600 / 12))
  return [i * step for i in range(int(end / step) + 1)]


def _clock(seconds: float, exact: bool = False) -> str:
  whole_minutes, rest = divmod(round(seconds, 1), 60)
  hours, minutes = divmod(int(whole_minutes), 60)
  whole = f"{int(rest):02d}" if not exact and rest == int(rest) else f"{rest:04.1f}"
  return f"{hours}:{minutes:02d}:{whole}" if hours else f"{minutes}:{whole}"
