# SPDX-License-Identifier: Apache-2.0
"""WORKDIR/report.html: the curves of a run, one file without scripts or requests.

Drawn from metrics.jsonl and telemetry.jsonl by report.html.j2; all text is escaped.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from slowfast_jax.train.lines import EVALUATED, read_lines

REPORT = "report.html"
Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 1000, 220  # Units of a curve's box: it is stretched to the page's width.
_MAX_POINTS = 500  # Of a curve, so that a long run does not make a large page.
_COLOURS = 6  # Classes c0 to c5 of the style sheet.


@dataclasses.dataclass(frozen=True)
class Chart:
  """A picture with one curve for each name.

  Attributes:
    title: above it.
    unit: of the values.
    curves: (step, value) by name.
    smooth: raw values faint, their running mean on top.
  """

  title: str
  unit: str
  curves: Mapping[str, Points]
  smooth: bool = False


def write_report(folder: epath.Path, steps: int) -> None:
  """Writes the page of a run.

  Args:
    folder: of the run.
    steps: that the run is meant to have.
  """
  lines = read_lines(folder / "metrics.jsonl")
  clock = [x for x in read_lines(folder / "telemetry.jsonl") if "step_seconds" in x]
  charts = charts_of(lines, clock)
  template = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
  ).get_template("report.html.j2")
  page = template.render(
    name=folder.name,
    facts=_facts(lines, clock, steps),
    charts=[(chart, draw(chart), _legend(chart)) for chart in charts],
  )
  new = folder / (REPORT + ".new")
  new.write_text(page)
  new.replace(folder / REPORT)


def charts_of(
  lines: Sequence[Mapping[str, Any]], clock: Sequence[Mapping[str, Any]]
) -> list[Chart]:
  """All charts that there are numbers for."""
  steps = [line for line in lines if EVALUATED not in line]
  done = [line for line in lines if EVALUATED in line]
  parts = sorted({name for line in steps for name in line if name.startswith("grad_norm/")})
  norms = {"all": _curve(steps, "grad_norm")}
  norms |= {name.removeprefix("grad_norm/"): _curve(steps, name) for name in parts}
  gates = {
    f"hybrid layer {i}": [(line["step"], line["gates"][i]) for line in steps if "gates" in line]
    for i in range(max((len(line.get("gates", ())) for line in steps), default=0))
  }
  metrics = {name for line in done for name in line} - {"step", EVALUATED}
  memory = {"host": "host_gib", "fullest device": "device_gib", "its peak": "device_peak_gib"}
  times = {"step": "step_seconds", "waiting for data": "data_stall_seconds"}
  shares = {"goodput": "goodput", "MFU": "mfu"}
  found = [
    Chart("Loss", "", {"loss": _curve(steps, "loss")}, smooth=True),
    Chart("Tokens predicted right", "share", {"": _curve(steps, "token_accuracy")}, smooth=True),
    Chart("Evaluation", "", {name: _curve(done, name) for name in sorted(metrics)}),
    Chart("Learning rate", "", {"": _curve(steps, "learning_rate")}),
    Chart("Gradient norm", "before clipping", norms),
    Chart("Gates of the slow path", "factor of the warm-up scalar", gates),
    Chart("Steps skipped", "so far", {"": _curve(steps, "skipped_steps")}),
    Chart("Tokens", "a second and chip", {"": _curve(clock, "tokens_per_second_per_chip")}),
    Chart("Frames", "a second and chip", {"": _curve(clock, "frames_per_second_per_chip")}),
    Chart("Time of a step", "seconds", {name: _curve(clock, times[name]) for name in times}),
    Chart("Use of the machine", "share", {name: _curve(clock, shares[name]) for name in shares}),
    Chart("Memory", "GiB", {name: _curve(clock, memory[name]) for name in memory}),
  ]
  kept = []
  for chart in found:
    curves = {name: points for name, points in chart.curves.items() if points}
    if chart.title == "Steps skipped" and not any(value for _, value in curves.get("", ())):
      continue
    if curves:
      kept.append(dataclasses.replace(chart, curves=curves))
  return kept


def draw(chart: Chart) -> Markup:
  """Inline SVG: text keeps its size on a phone, only the curves stretch."""
  values = [value for points in chart.curves.values() for _, value in points]
  steps = [step for points in chart.curves.values() for step, _ in points]
  first, last = min(steps), max(max(steps), min(steps) + 1)
  low, high = min(0.0, *values), max(0.0, *values)
  high = high if high > low else low + 1.0
  marks = []
  for value in ticks(low, high):
    y = f"{_HEIGHT * (high - value) / (high - low):.1f}"
    marks.append(
      Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(y)
      + Markup('<text x="0" dx="-8" y="{}" dy="4" text-anchor="end">{:g}</text>').format(y, value)
    )
  for step in ticks(first, last):
    share = (step - first) / (last - first)
    anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
    marks.append(
      Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{:,g}</text>').format(
        100 * share, _HEIGHT + 19, anchor, step
      )
    )
  lines = []
  for i, points in enumerate(chart.curves.values()):
    kinds = [("raw", points), ("line", smoothed(points))] if chart.smooth else [("line", points)]
    for kind, curve in kinds:
      path = " ".join(
        f"{_WIDTH * (step - first) / (last - first):.1f},"
        f"{_HEIGHT * (high - value) / (high - low):.1f}"
        for step, value in thinned(curve)
      )
      style = f"{kind} c{i % _COLOURS}" + (" dashed" if i >= _COLOURS else "")
      lines.append(Markup('<polyline class="{}" points="{}"/>').format(style, path))
  return Markup(
    '<svg class="plot" height="{h}" role="img" aria-label="{title}">{marks}'
    '<svg width="100%" height="{h}" viewBox="0 0 {w} {h}" preserveAspectRatio="none">{lines}</svg>'
    "</svg>"
  ).format(
    h=_HEIGHT,
    w=_WIDTH,
    title=chart.title,
    marks=Markup("").join(marks),
    lines=Markup("").join(lines),
  )


def smoothed(points: Points) -> Points:
  """A mean over about a twentieth of the curve, centred so that it does not lag behind."""
  half = len(points) // 40
  means = []
  for i, (step, _) in enumerate(points):
    window = [value for _, value in points[max(0, i - half) : i + half + 1]]
    means.append((step, sum(window) / len(window)))
  return means


def thinned(points: Points) -> Points:
  """Every n-th point, and the last."""
  stride = math.ceil(len(points) / _MAX_POINTS)
  return [*points[:-1:stride], points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
  unit = 10.0 ** math.floor(math.log10((high - low) / most))
  step = next(unit * m for m in (1, 2, 5, 10, 20) if (high - low) / (unit * m) <= most)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
  found = [(line["step"], line.get(name)) for line in lines]
  return [(step, value) for step, value in found if isinstance(value, int | float)]


def _legend(chart: Chart) -> list[tuple[str, str]]:
  if len(chart.curves) == 1:
    return []
  return [(f"c{i % _COLOURS}", name) for i, name in enumerate(chart.curves)]


def _facts(
  lines: Sequence[Mapping[str, Any]], clock: Sequence[Mapping[str, Any]], steps: int
) -> list[tuple[str, str]]:
  """What stands in large print: (value, what it is)."""
  trained = [line for line in lines if EVALUATED not in line]
  if not trained:
    return []
  last, losses = trained[-1], _curve(trained, "loss")
  facts = [(f"{last['step']:,} of {steps:,}", "steps")]
  if losses:
    facts.append((f"{smoothed(losses)[-1][1]:.4g}", "loss at the end, a running mean"))
  facts.append((f"{last['skipped_steps']:,}", "steps skipped"))
  facts.append((f"{last['failed_samples']:,}", "samples that could not be used"))
  if clock:
    facts.append((f"{clock[-1]['tokens_per_second_per_chip']:,.0f}", "tokens a second and chip"))
    facts.append((f"{100 * clock[-1]['goodput']:.1f}%", "goodput: time in steps that count"))
  return facts
