# SPDX-License-Identifier: Apache-2.0
"""The charts of the demo's report, as inline SVG without scripts.

Nothing is scaled as a whole, so text keeps its size on a phone: heights are pixels, horizontal
positions are per cent of the width, and only curves stretch, inside a nested SVG whose strokes do
not. `Markup.format` escapes every argument.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import Float, UInt8
from markupsafe import Markup
from PIL import Image

_Z = 1.959964  # Normal quantile of a two-sided 95% interval.
_BAR = 20  # Pixels.
_LOSS_HEIGHT = 220
_ATTENTION_HEIGHT = 104
_STRETCH = 1000  # Units of a curve's width, before it is stretched to the page.
_MAX_POINTS = 500
_IMAGE_SIDE = 160  # Pixels of the longer side at most: the page stays under a megabyte or two.


@dataclass(frozen=True)
class Curve:
  """A line of a chart; `role` is its CSS class: slow or fast."""

  label: str
  role: str
  points: Sequence[tuple[float, float]]


def wilson_interval(share: float, count: int) -> tuple[float, float]:
  """95% interval of a share of right answers; unlike the normal one it never leaves [0, 1]."""
  if count < 1:
    return 0.0, 1.0
  spread = _Z**2 / count
  centre = (share + spread / 2) / (1 + spread)
  half = _Z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
  return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def accuracy_bar(share: float, count: int, chance: float, role: str, label: str) -> Markup:
  """A horizontal bar with its interval as a whisker and chance as a dashed line."""
  low, high = wilson_interval(share, count)
  middle = _BAR / 2
  whisker = Markup(
    '<line class="whisker" x1="{a}%" x2="{b}%" y1="{m}" y2="{m}"/>'
    '<line class="whisker" x1="{a}%" x2="{a}%" y1="{top}" y2="{end}"/>'
    '<line class="whisker" x1="{b}%" x2="{b}%" y1="{top}" y2="{end}"/>'
  ).format(a=_at(low), b=_at(high), m=middle, top=middle - 4, end=middle + 4)
  return Markup(
    '<svg class="bar" height="{h}" role="img" aria-label="{label}: {share}, 95% interval {low} to '
    '{high}, guessing {chance}"><rect class="track" width="100%" height="{h}" rx="3"/>'
    '<rect class="{role}" width="{w}%" height="{h}" rx="3"/>{whisker}'
    '<line class="chance" x1="{c}%" x2="{c}%" y1="-3" y2="{below}"/></svg>'
  ).format(
    h=_BAR,
    label=label,
    share=percent(share),
    low=percent(low),
    high=percent(high),
    chance=percent(chance),
    role=role,
    w=_at(share),
    whisker=whisker,
    c=_at(chance),
    below=_BAR + 3,
  )


def accuracy_axis() -> Markup:
  """Ticks from 0 to 100%, to stand below accuracy bars."""
  ticks = [_tick(value / 100, f"{value}%", 0, 5, 18) for value in (0, 25, 50, 75, 100)]
  return Markup('<svg class="axis" height="20" aria-hidden="true">{}</svg>').format(_join(ticks))


def chance_label(chance: float) -> Markup:
  """Names the dashed line of the bars below it."""
  late = chance > 0.6
  return Markup(
    '<svg class="axis" height="18" aria-hidden="true"><text class="label" x="{x}%" dx="{dx}" '
    'y="12" text-anchor="{anchor}">guessing {chance}</text>'
    '<line class="chance" x1="{x}%" x2="{x}%" y1="3" y2="22"/></svg>'
  ).format(
    x=_at(chance), dx=-6 if late else 6, anchor="end" if late else "start", chance=percent(chance)
  )


def share_bar(share: float) -> Markup:
  """A bar without whiskers: a stage's part of the time."""
  return Markup(
    '<svg class="bar" height="12" aria-hidden="true"><rect class="track" width="100%" height="12" '
    'rx="3"/><rect class="both" width="{}%" height="12" rx="3"/></svg>'
  ).format(_at(share))


def loss_chart(curves: Sequence[Curve], title: str) -> Markup:
  """Loss over steps: the raw values faint, their running mean on top."""
  curves = [Curve(c.label, c.role, _finite(c.points)) for c in curves]
  curves = [c for c in curves if c.points]
  if not curves:
    return Markup("")
  smooth = [Curve(c.label, c.role, smoothed(c.points)) for c in curves]
  steps = [step for c in curves for step, _ in c.points]
  first, last = min(steps), max(max(steps), min(steps) + 1)
  # One wild step must not press the rest of the curve to the ground: raw values may be cut off.
  top = max(max(v for c in smooth for _, v in c.points), _upper(curves)) * 1.05 or 1.0
  height = _LOSS_HEIGHT
  y_ticks = [
    Markup(
      '<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
      '<text class="label" x="0" dx="-8" y="{y}" dy="4" text-anchor="end">{v}</text>'
    ).format(y=_round(height * (1 - value / top)), v=f"{value:g}")
    for value in ticks(0, top)
  ]
  x_ticks = [
    _tick((v - first) / (last - first), f"{v:,g}", height, height + 5, height + 19)
    for v in ticks(first, last)
  ]
  lines = [
    _polyline(
      [((s - first) / (last - first), height * (1 - v / top)) for s, v in _thin(c.points)],
      f"{kind} {c.role}",
    )
    for kind, group in (("raw", curves), ("line", smooth))
    for c in group
  ]
  return Markup(
    '<svg class="plot loss" height="{h}" role="img" aria-label="{title}">{y}{x}'
    '<text class="label" x="50%" y="{below}" text-anchor="middle">step</text>'
    '<text class="label" x="0" y="-8" dx="-8" text-anchor="start">loss</text>{lines}</svg>'
  ).format(
    h=height,
    title=title,
    y=_join(y_ticks),
    x=_join(x_ticks),
    below=height + 36,
    lines=_stretched(lines, height),
  )


def attention_chart(
  profile: Float[np.ndarray, " F"],
  timestamps: Float[np.ndarray, " F"],
  windows: Sequence[tuple[float, float]],
  kept: Sequence[int],
) -> Markup:
  """Share of attention over time; a frame's column is as wide as its picture in the strip above."""
  height = _ATTENTION_HEIGHT
  left, right = time_span(timestamps)
  even, peak = 1 / len(profile), int(np.argmax(profile))
  top = max(float(profile.max()), 2 * even) * 1.25
  x = [(float(t) - left) / (right - left) for t in timestamps]
  y = [height * (1 - float(value) / top) for value in profile]
  bands = [
    Markup('<rect class="window" x="{}%" width="{}%" y="0" height="{}"/>').format(
      _at(max(start - left, 0) / (right - left)),
      _at(max(min(end, right) - max(start, left), 0) / (right - left)),
      height,
    )
    for start, end in windows
  ]
  level = _round(height * (1 - even / top))
  area = [(x[0], height), *zip(x, y), (x[-1], height)]
  curve = [_polyline(area, "area"), _polyline(list(zip(x, y)), "line slow")]
  marks = [
    Markup('<svg x="{}%" y="{}" overflow="visible"><path class="kept" d="{}"/></svg>').format(
      _at(x[frame]), height, "M0 -1l5 9h-10z"
    )
    for frame in kept
  ]
  seconds = [
    _tick((value - left) / (right - left), f"{value:g} s", height, height + 5, height + 22)
    for value in ticks(0, float(timestamps[-1]), 8)
  ]
  late = x[peak] > 0.6  # A phone has no room for the label right of a late peak.
  return Markup(
    '<svg class="plot attention" height="{h}" role="img" aria-label="Attention over time: highest '
    'at {when}">{bands}<line class="grid" x1="0" x2="100%" y1="{h}" y2="{h}"/>'
    '<line class="even" x1="0" x2="100%" y1="{level}" y2="{level}"/>'
    "{curve}{seconds}{marks}"
    '<circle class="peak" cx="{px}%" cy="{py}" r="4"/>'
    '<text class="label strong" x="{px}%" y="{py}" dx="{dx}" dy="-2" text-anchor="{anchor}">'
    "{share} at {when}</text></svg>"
  ).format(
    h=height,
    when=f"{float(timestamps[peak]):.1f} s",
    bands=_join(bands),
    level=level,
    curve=_stretched(curve, height),
    seconds=_join(seconds),
    marks=_join(marks),
    px=_at(x[peak]),
    py=_round(y[peak]),
    dx=-9 if late else 9,
    anchor="end" if late else "start",
    share=percent(float(profile[peak])),
  )


def time_span(timestamps: Float[np.ndarray, " F"]) -> tuple[float, float]:
  """Left and right end of the time axis: half a frame beyond the first and the last."""
  half = float(timestamps[-1] - timestamps[0]) / max(len(timestamps) - 1, 1) / 2 or 0.5
  return float(timestamps[0]) - half, float(timestamps[-1]) + half


def image_uri(image: UInt8[np.ndarray, "h w 3"]) -> str:
  """The picture as a data address; full colour resolution, or small shapes lose their colour."""
  picture = Image.fromarray(image)
  picture.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
  pixels = np.ascontiguousarray(np.asarray(picture))
  data = simplejpeg.encode_jpeg(pixels, quality=88, colorspace="RGB", colorsubsampling="444")
  return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"


def percent(share: float) -> str:
  return f"{100 * share:.1f}%"


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """A mean over about a twentieth of the curve, centred so that it does not lag behind."""
  half, count = len(points) // 40, len(points)
  total = np.cumsum([0.0, *(value for _, value in points)])
  result = []
  for i, (step, _) in enumerate(points):
    start, stop = max(0, i - half), min(count, i + half + 1)
    result.append((step, float(total[stop] - total[start]) / (stop - start)))
  return result


def ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
  if high <= low:
    return [low]
  unit = 10.0 ** math.floor(math.log10((high - low) / most))
  step = next(unit * m for m in (1, 2, 5, 10, 20) if (high - low) / (unit * m) <= most)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _tick(share: float, text: str, top: float, bottom: float, baseline: float) -> Markup:
  anchor = "start" if share <= 0 else "end" if share >= 1 else "middle"
  return Markup(
    '<line class="tick" x1="{x}%" x2="{x}%" y1="{top}" y2="{bottom}"/>'
    '<text class="label" x="{x}%" y="{y}" text-anchor="{anchor}">{text}</text>'
  ).format(x=_at(share), top=top, bottom=bottom, y=baseline, anchor=anchor, text=text)


def _polyline(points: Sequence[tuple[float, float]], role: str) -> Markup:
  path = " ".join(f"{x * _STRETCH:.1f},{y:.1f}" for x, y in points)
  return Markup('<polyline class="{}" points="{}"/>').format(role, path)


def _stretched(lines: Sequence[Markup], height: int) -> Markup:
  return Markup(
    '<svg x="0" y="0" width="100%" height="{h}" viewBox="0 0 {w} {h}" preserveAspectRatio="none">'
    "{lines}</svg>"
  ).format(h=height, w=_STRETCH, lines=_join(lines))


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
  """Every n-th point and the last one, so that a long run does not make a large page."""
  stride = math.ceil(len(points) / _MAX_POINTS)
  return [*points[:-1:stride], points[-1]]


def _upper(curves: Sequence[Curve]) -> float:
  return float(np.quantile([v for c in curves for _, v in c.points], 0.98))


def _join(parts: Sequence[Markup]) -> Markup:
  return Markup("").join(parts)


def _at(share: float) -> str:
  return f"{100 * share:.2f}"


def _round(value: float) -> str:
  return f"{value:.1f}"
