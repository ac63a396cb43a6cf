# SPDX-License-Identifier: Apache-2.0
"""What a visitor sees after the demo: `report.html`, one file without scripts or requests.

`report.json` holds the same numbers for programs. The page is `report.html.j2` with `report.css`
inlined; the charts are drawn by `report_figures.py`. All text is escaped.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from jaxtyping import Float, UInt8

from slowfast_jax.demo import report_figures as figures
from slowfast_jax.demo.questions import num_options
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.files import replace_text

_KIND_TITLES = {
  "colour": "What colour was it?",
  "shape": "What shape was it?",
  "place": "Where was it?",
  "first": "Which came first?",
}
_STRIP = 16  # Pictures of a clip; more would be too small to see a flash in.
_CHAT_FRAMES = 32


@dataclass(frozen=True)
class ModelResult:
  """One of the two models. Accuracies are shares of right answers, 0 to 1."""

  name: str
  accuracy: float
  accuracy_by_kind: dict[str, float]
  counts_by_kind: dict[str, int]  # Questions, not right answers.
  loss_curve: Sequence[tuple[int, float]]  # Step, loss.
  stills_curve: Sequence[tuple[int, float]]  # On still pictures, before any video.
  num_params: int
  llm_tokens: int  # Visual tokens in the decoder's sequence, a video.


@dataclass(frozen=True)
class ClipResult:
  """A question about one clip, what both models answered, and where the slow-fast one looked."""

  video: str
  question: str
  options: Sequence[str]
  answer: str  # The letter.
  slow_fast_reply: str
  fast_only_reply: str
  slow_fast_correct: bool
  fast_only_correct: bool
  frames: UInt8[np.ndarray, "F h w 3"]
  timestamps: Float[np.ndarray, " F"]  # Seconds.
  profile: Float[np.ndarray, " F"]  # What came from each frame; need not sum to 1.
  windows: Sequence[tuple[float, float]]  # Seconds between which the events are to be seen.
  kept: Sequence[int]  # Frames that the fast tokens keep.

  def __post_init__(self):
    lengths = [len(self.frames), len(self.timestamps), len(self.profile)]
    if len(set(lengths)) > 1 or not lengths[0]:
      raise ValueError(
        f"{self.video}: frames, timestamps and profile need one entry a frame, got {lengths}."
      )
    if not np.isfinite(self.profile).all() or self.profile.min() < 0 or not self.profile.any():
      raise ValueError(f"{self.video}: profile must be finite, not negative and not all zero.")
    if self.answer not in tuple(LETTERS[: len(self.options)]):
      raise ValueError(
        f"{self.video}: answer must be the letter of one of {len(self.options)} options, "
        f"got {self.answer!r}."
      )
    if not all(0 <= frame < lengths[0] for frame in self.kept):
      raise ValueError(f"{self.video}: kept must be frames below {lengths[0]}, got {self.kept}.")


@dataclass(frozen=True)
class ChatExample:
  """A free question to the slow-fast model, and the command that asks it again."""

  video: str
  question: str
  answer: str
  frames: UInt8[np.ndarray, "F h w 3"]
  command: str


@dataclass(frozen=True)
class ReportData:
  """Everything the report tells."""

  title: str
  slow_fast: ModelResult
  fast_only: ModelResult
  zeroed_slow_accuracy: float  # The slow-fast model, its slow tokens set to zero.
  chance: float
  attention_hits: float  # Share of the right answers that came from what is asked about.
  clips: Sequence[ClipResult]
  chat: ChatExample
  seconds: dict[str, float]  # By stage, in order.
  llm_tokens: int
  num_train_videos: int
  num_questions: int
  commands: Sequence[tuple[str, str]]  # Caption, command.
  machine: str

  def __post_init__(self):
    tokens = (self.llm_tokens, self.slow_fast.llm_tokens, self.fast_only.llm_tokens)
    if len(set(tokens)) > 1:
      raise ValueError(
        "Both models must have the same llm_tokens, or the comparison is not fair: got "
        f"{tokens[0]} in the report, {tokens[1]} slow-fast, {tokens[2]} fast-only."
      )
    for field, share in self._shares():
      if not 0 <= share <= 1:  # Also catches NaN.
        raise ValueError(f"{field} must be a share between 0 and 1, got {share}.")
    for stage, seconds in self.seconds.items():
      if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds[{stage!r}] must be finite and not negative, got {seconds}.")
    if self.num_questions < 1:
      raise ValueError(f"num_questions must be at least 1, got {self.num_questions}.")
    kinds = list(self.slow_fast.counts_by_kind)
    for model in (self.slow_fast, self.fast_only):
      if sorted(model.accuracy_by_kind) != sorted(kinds) or sorted(model.counts_by_kind) != sorted(
        kinds
      ):
        raise ValueError(f"{model.name}: accuracies and counts need the kinds {kinds}.")

  def _shares(self) -> list[tuple[str, float]]:
    shares = [(name, getattr(self, name)) for name in ("chance", "zeroed_slow_accuracy")]
    shares.append(("attention_hits", self.attention_hits))
    for model in (self.slow_fast, self.fast_only):
      shares.append((f"{model.name}: accuracy", model.accuracy))
      shares += [(f"{model.name}: {k}", share) for k, share in model.accuracy_by_kind.items()]
    return shares


def write_report(data: ReportData, folder: str | os.PathLike) -> None:
  """Writes report.html and report.json; each appears only when it is whole."""
  root = Path(folder)
  root.mkdir(parents=True, exist_ok=True)
  numbers = json.dumps(report_numbers(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
  replace_text(root / "report.html", render_page(data, numbers))
  replace_text(root / "report.json", numbers)


def report_numbers(data: ReportData) -> dict:
  """What report.json holds."""
  slow, fast = data.slow_fast, data.fast_only
  return {
    "slow_fast_accuracy": slow.accuracy,
    "fast_only_accuracy": fast.accuracy,
    "chance": data.chance,
    "seconds": round(sum(data.seconds.values()), 1),
    "llm_tokens": data.llm_tokens,
    "slow_fast_llm_tokens": slow.llm_tokens,
    "fast_only_llm_tokens": fast.llm_tokens,
    "slow_fast_interval": _interval(slow.accuracy, data.num_questions),
    "fast_only_interval": _interval(fast.accuracy, data.num_questions),
    "zeroed_slow_accuracy": data.zeroed_slow_accuracy,
    "attention_hits": data.attention_hits,
    "num_questions": data.num_questions,
    "num_train_videos": data.num_train_videos,
    "questions_by_kind": slow.counts_by_kind,
    "slow_fast_accuracy_by_kind": slow.accuracy_by_kind,
    "fast_only_accuracy_by_kind": fast.accuracy_by_kind,
    "slow_fast_params": slow.num_params,
    "fast_only_params": fast.num_params,
    "seconds_by_stage": {stage: round(value, 1) for stage, value in data.seconds.items()},
    "machine": data.machine,
  }


def render_page(data: ReportData, numbers: str) -> str:
  """The HTML page; `numbers` is the text of report.json."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["percent"] = figures.percent
  environment.filters["duration"] = duration
  return environment.get_template("report.html.j2").render(
    data=data,
    numbers=numbers,
    total=sum(data.seconds.values()),
    intervals_overlap=_overlap(data),
    headline=_headline_rows(data),
    axis=figures.accuracy_axis(),
    chance_label=figures.chance_label(data.chance),
    kinds=_kinds(data),
    losses=_losses(data),
    clips=[_clip(clip) for clip in data.clips],
    shown_share=_shown_share(data.clips),
    stages=_stages(data),
    chat_frames=[figures.image_uri(data.chat.frames[i]) for i in _spread(len(data.chat.frames))],
  )


def duration(seconds: float) -> str:
  """Seconds in words, as exact as a reader cares for."""
  if seconds < 59.95:  # What does not round up to 60.0.
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def strip_frames(clip: ClipResult) -> list[tuple[int, int]]:
  """Pictures of the strip: which frame, and how many it stands for.

  Neighbours share a picture; the one that shows an event is chosen before one that the fast tokens
  keep, and that before any other: a short flash must not fall between two pictures.
  """
  groups = np.array_split(np.arange(len(clip.frames)), min(_STRIP, len(clip.frames)))
  return [
    (
      max(group.tolist(), key=lambda i: (_in_windows(clip, i), i in clip.kept, -i)),
      len(group),
    )
    for group in groups
  ]


def _headline_rows(data: ReportData) -> list[dict]:
  rows = (
    (data.slow_fast.name, "the text reads every slow token", data.slow_fast.accuracy, "slow"),
    (data.fast_only.name, "fast tokens are all there is", data.fast_only.accuracy, "fast"),
    (
      f"{data.slow_fast.name}, blindfolded",
      "control: the same model, its slow tokens set to zero",
      data.zeroed_slow_accuracy,
      "control",
    ),
  )
  count = data.num_questions
  return [
    {
      "name": name,
      "about": about,
      "accuracy": share,
      "role": role,
      "interval": figures.wilson_interval(share, count),
      "bar": figures.accuracy_bar(share, count, data.chance, role, name),
    }
    for name, about, share, role in rows
  ]


def _kinds(data: ReportData) -> list[dict]:
  result = []
  for kind, count in data.slow_fast.counts_by_kind.items():
    chance = 1 / num_options(kind)
    models = []
    for model, role in ((data.slow_fast, "slow"), (data.fast_only, "fast")):
      share = model.accuracy_by_kind[kind]
      bar = figures.accuracy_bar(share, count, chance, role, f"{model.name}, {kind}")
      models.append({"name": model.name, "accuracy": share, "bar": bar})
    title = _KIND_TITLES.get(kind, kind)
    result.append({"title": title, "count": count, "chance": chance, "models": models})
  return result


def _losses(data: ReportData) -> list[dict]:
  charts = (
    ("First, still pictures", _pair(data, "stills_curve")),
    ("Then, videos", _pair(data, "loss_curve")),
  )
  return [
    {"title": title, "curves": curves, "chart": chart, "lost": _num_lost(curves)}
    for title, curves in charts
    if (chart := figures.loss_chart(curves, f"Training loss. {title}."))
  ]


def _pair(data: ReportData, field: str) -> list[figures.Curve]:
  models = ((data.slow_fast, "slow"), (data.fast_only, "fast"))
  return [figures.Curve(model.name, role, getattr(model, field)) for model, role in models]


def _num_lost(curves: Sequence[figures.Curve]) -> int:
  return sum(not math.isfinite(loss) for curve in curves for _, loss in curve.points)


def _clip(clip: ClipResult) -> dict:
  profile = clip.profile / clip.profile.sum()
  peak = int(np.argmax(profile))
  options = list(zip(LETTERS, clip.options, strict=False))
  return {
    "data": clip,
    "options": options,
    "replies": [
      _reply(clip.slow_fast_reply, clip.slow_fast_correct, options, "slow"),
      _reply(clip.fast_only_reply, clip.fast_only_correct, options, "fast"),
    ],
    "strip": [
      {
        "uri": figures.image_uri(clip.frames[i]),
        "weight": weight,
        "time": float(clip.timestamps[i]),
        "kept": i in clip.kept,
        "event": _in_windows(clip, i),
      }
      for i, weight in strip_frames(clip)
    ],
    "chart": figures.attention_chart(profile, clip.timestamps, clip.windows, clip.kept),
    "peak_uri": figures.image_uri(clip.frames[peak]),
    "peak_time": float(clip.timestamps[peak]),
    "peak_hit": _in_windows(clip, peak),
  }


def _reply(text: str, correct: bool, options: list[tuple[str, str]], role: str) -> dict:
  words = dict(options).get(text.strip().rstrip("."), "")
  return {"text": text, "words": words, "correct": correct, "role": role}


def _stages(data: ReportData) -> list[dict]:
  longest = max(data.seconds.values(), default=0) or 1
  return [
    {"name": stage, "seconds": seconds, "bar": figures.share_bar(seconds / longest)}
    for stage, seconds in data.seconds.items()
  ]


def _in_windows(clip: ClipResult, frame: int) -> bool:
  return any(start <= clip.timestamps[frame] < end for start, end in clip.windows)


def _shown_share(clips: Sequence[ClipResult]) -> float:
  """Share of the shown clips' frames in which an event is to be seen."""
  flags = [_in_windows(clip, i) for clip in clips for i in range(len(clip.frames))]
  return sum(flags) / max(len(flags), 1)


def _overlap(data: ReportData) -> bool:
  low, high = sorted((data.slow_fast.accuracy, data.fast_only.accuracy))
  below = figures.wilson_interval(low, data.num_questions)[1]
  return below >= figures.wilson_interval(high, data.num_questions)[0]


def _interval(share: float, count: int) -> list[float]:
  return [round(bound, 4) for bound in figures.wilson_interval(share, count)]


def _spread(count: int) -> list[int]:
  shown = min(count, _CHAT_FRAMES)
  return [i * count // shown for i in range(shown)]
