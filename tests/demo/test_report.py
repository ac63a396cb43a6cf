# SPDX-License-Identifier: Apache-2.0
"""The report: whole in one file, true to its numbers, and safe whatever the models answer."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import jaxtyping
import numpy as np
import pytest

from slowfast_jax.demo import report_figures as figures
from slowfast_jax.demo.report import (
  ChatExample,
  ClipResult,
  ModelResult,
  ReportData,
  duration,
  report_numbers,
  strip_frames,
  write_report,
)

VOID = {"meta", "link", "img", "br"}
KINDS = ("colour", "shape", "place", "first")
HOSTILE = (
  "</title></pre><script>alert(1)</script>\"'><img src=https://evil.example/x onerror=a>{{ 7*7 }}"
)


def curve(start, end, steps=60):
  return [(10 * i, end + (start - end) * math.exp(-i / 10)) for i in range(steps)]


def model(name, accuracy, **changes):
  fields = {
    "name": name,
    "accuracy": accuracy,
    "accuracy_by_kind": {kind: accuracy + 0.01 * i for i, kind in enumerate(KINDS)},
    "counts_by_kind": dict.fromkeys(KINDS, 75),
    "loss_curve": curve(1.4, 1 - accuracy),
    "stills_curve": curve(6.0, 1.4),
    "num_params": 1_264_390,
    "llm_tokens": 36,
  }
  return ModelResult(**{**fields, **changes})


def clip(num_frames=32, **changes):
  rng = np.random.default_rng(num_frames)
  timestamps = np.arange(num_frames, dtype=np.float32) * 0.4
  fields = {
    "video": "test-00000.mp4",
    "question": "What colour was the circle that flashed?",
    "options": ("red", "green", "blue", "yellow"),
    "answer": "C",
    "slow_fast_reply": "C",
    "fast_only_reply": "A",
    "slow_fast_correct": True,
    "fast_only_correct": False,
    "frames": rng.integers(0, 255, (num_frames, 8, 8, 3), dtype=np.uint8),
    "timestamps": timestamps,
    "profile": np.exp(-((timestamps - 4.4) ** 2) / 0.2) + 0.01,
    "windows": [(4.2, 4.7)],
    "kept": list(range(0, num_frames, 8)),
  }
  return ClipResult(**{**fields, **changes})


def report(**changes):
  command = 'slowfast chat a.mp4 "Which?" --checkpoint=runs/demo'
  fields = {
    "title": "Few tokens, every frame",
    "slow_fast": model("Slow-fast", 0.9133),
    "fast_only": model("Fast-only", 0.3467, num_params=1_198_338),
    "zeroed_slow_accuracy": 0.3367,
    "chance": 0.3125,
    "attention_hits": 0.871,
    "clips": [clip()],
    "chat": ChatExample("a.mp4", "Which?", "a square", clip(20).frames, command),
    "seconds": {"videos": 62.34, "train slow-fast": 262.9, "evaluate": 8.0},
    "llm_tokens": 36,
    "num_train_videos": 1200,
    "num_questions": 300,
    "commands": [("About your own file:", "slowfast chat holiday.mp4 --checkpoint=runs/demo")],
    "machine": "2 CPU cores",
  }
  return ReportData(**{**fields, **changes})


class Page(HTMLParser):
  """Elements with their attributes, the text, and whether every tag is closed in order."""

  def __init__(self, html):
    super().__init__()
    self.elements, self.text, self.visible, self._open = [], "", "", []
    self.feed(html)
    self.close()
    assert not self._open, f"never closed: {self._open}"

  def handle_starttag(self, tag, attrs):
    assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {tag} {attrs}"
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open, f"closed but never opened: {tag}"
    assert self._open.pop() == tag, f"{tag} closed out of order, line {self.getpos()[0]}"

  def handle_data(self, data):
    self.text += data
    if not {"style", "title", "details"} & set(self._open):
      self.visible += data

  def all(self, tag, role=None):
    return [
      attrs
      for name, attrs in self.elements
      if name == tag and (role is None or role in (attrs.get("class") or "").split())
    ]


def written(tmp_path, data):
  write_report(data, tmp_path / "new" / "folder")
  html = (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8")
  numbers = (tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8")
  assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
    "report.html",
    "report.json",
  ]
  return html, Page(html), json.loads(numbers, parse_constant=pytest.fail)


def leaves(value):
  if isinstance(value, dict | list):
    return [
      leaf for v in (value.values() if isinstance(value, dict) else value) for leaf in leaves(v)
    ]
  return [value]


def test_numbers_for_programs(tmp_path):
  _, _, numbers = written(tmp_path, report())
  assert numbers["slow_fast_accuracy"] == 0.9133
  assert numbers["fast_only_accuracy"] == 0.3467
  assert numbers["chance"] == 0.3125
  assert numbers["seconds"] == pytest.approx(333.2)
  assert numbers["seconds_by_stage"] == {"videos": 62.3, "train slow-fast": 262.9, "evaluate": 8.0}
  assert numbers["llm_tokens"] == 36
  assert numbers["slow_fast_llm_tokens"] == numbers["fast_only_llm_tokens"] == 36
  assert numbers["attention_hits"] == 0.871
  assert numbers["zeroed_slow_accuracy"] == 0.3367
  assert numbers["num_questions"] == 300
  assert numbers["fast_only_accuracy_by_kind"]["first"] == pytest.approx(0.3767)


def test_page_needs_nothing_from_outside(tmp_path):
  html, page, _ = written(tmp_path, report())
  assert "http:" not in html
  assert "https:" not in html
  assert "@import" not in html
  assert "url(" not in html
  for tag, attrs in page.elements:
    assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
    for name, value in attrs.items():
      assert not name.startswith("on"), f"{tag} {name}"
      if name in {"src", "href", "srcset", "poster", "action", "data"}:
        assert value.startswith(("data:", "#"))
  policies = [a["content"] for a in page.all("meta") if "http-equiv" in a]
  assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_number_is_on_the_page(tmp_path):
  data = report()
  _, page, numbers = written(tmp_path, data)
  for value in leaves(numbers):
    assert json.dumps(value) in page.text
  for share in (
    *(data.slow_fast.accuracy, data.fast_only.accuracy, data.zeroed_slow_accuracy, data.chance),
    *(data.attention_hits, *numbers["slow_fast_interval"], *numbers["fast_only_interval"]),
    *data.slow_fast.accuracy_by_kind.values(),
    *data.fast_only.accuracy_by_kind.values(),
  ):
    assert figures.percent(share) in page.visible
  for text in (
    "1,264,390",
    "1,198,338",
    "66,052",
    "1,200",
    "5 min 33 s",
    "1 min 2 s",
    "2 CPU cores",
  ):
    assert text in page.visible


def test_commands_stand_whole_on_the_page(tmp_path):
  data = report()
  _, page, _ = written(tmp_path, data)
  for command in (data.chat.command, data.commands[0][1]):
    assert command in page.visible


def test_hostile_text_stays_text(tmp_path):
  seconds = {HOSTILE: 1.0, "other": 2.0}
  models = [
    model(
      HOSTILE,
      accuracy,
      accuracy_by_kind={HOSTILE: accuracy},
      counts_by_kind={HOSTILE: 300},
    )
    for accuracy in (0.9, 0.3)
  ]
  words = dict.fromkeys(
    ("video", "question", "slow_fast_reply", "fast_only_reply"),
    HOSTILE,
  )
  data = report(
    title=HOSTILE,
    slow_fast=models[0],
    fast_only=models[1],
    clips=[clip(options=(HOSTILE, HOSTILE), answer="A", **words)],
    chat=ChatExample(HOSTILE, HOSTILE, HOSTILE, clip(3).frames, HOSTILE),
    seconds=seconds,
    commands=[(HOSTILE, HOSTILE)],
    machine=HOSTILE,
  )
  html, page, _ = written(tmp_path, data)
  assert not page.all("script")
  assert len(page.all("title")) == 1
  assert all(image["src"].startswith("data:") for image in page.all("img"))
  assert "<script" not in html
  assert page.text.count(HOSTILE) >= 15  # Whole: neither cut at a tag nor evaluated.


def test_no_value_on_the_page_is_not_a_number(tmp_path):
  broken = [(0, 3.0), (10, math.nan), (20, math.inf), (30, 2.0)]
  html, page, _ = written(tmp_path, report(slow_fast=model("Slow-fast", 0.9, loss_curve=broken)))
  drawn = re.sub(r"data:image/jpeg;base64,[^\"]*", "", html)
  assert not re.search(r"\b(nan|inf|infinity|undefined)\b", drawn, re.IGNORECASE)
  assert "2 values were not finite and are left out." in page.visible


@pytest.mark.parametrize("losses", [[], [(0, 1.0)], [(5, 0.0), (6, 0.0)], [(0, math.nan)]])
def test_short_curves(tmp_path, losses):
  models = [
    model(name, 0.5, loss_curve=losses, stills_curve=[]) for name in ("Slow-fast", "Fast-only")
  ]
  _, page, _ = written(tmp_path, report(slow_fast=models[0], fast_only=models[1]))
  drawn = any(math.isfinite(loss) for _, loss in losses)
  assert len(page.all("svg", "loss")) == drawn


def test_stills_and_videos_have_a_chart_each(tmp_path):
  _, page, _ = written(tmp_path, report())
  assert "First, still pictures" in page.visible
  assert "Then, videos" in page.visible
  assert len(page.all("svg", "loss")) == 2
  assert [len(page.all("polyline", role)) for role in ("slow", "fast")] == [5, 4]


@pytest.mark.parametrize(("accuracy", "told_apart"), [(0.36, False), (0.9, True)])
def test_the_page_says_when_a_run_settles_nothing(tmp_path, accuracy, told_apart):
  _, page, _ = written(tmp_path, report(slow_fast=model("Slow-fast", accuracy)))
  assert ("this run does not tell them apart" not in page.visible) == told_apart


def test_right_and_wrong_are_said_in_words(tmp_path):
  _, page, _ = written(tmp_path, report())
  assert page.visible.count("✓ right") == page.visible.count("✗ wrong") == 1
  assert "C. blue (the truth)" in page.visible
  assert page.visible.index("(blue)") < page.visible.index("✓ right")


def test_a_report_without_clips(tmp_path):
  _, page, _ = written(tmp_path, report(clips=[]))
  assert not page.all("svg", "attention")
  assert "Where the answer was read" not in page.visible


@pytest.mark.parametrize("num_frames", [1, 2, 15, 16, 31, 32, 64])
def test_the_strip_covers_the_clip_and_shows_the_event(num_frames):
  for event in range(num_frames):
    start = 0.4 * event - 0.1
    one = clip(num_frames, windows=[(start, start + 0.2)])
    strip = strip_frames(one)
    assert len(strip) == min(16, num_frames)
    assert sum(weight for _, weight in strip) == num_frames
    shown = [frame for frame, _ in strip]
    assert shown == sorted(set(shown))
    assert event in shown


@pytest.mark.parametrize("num_frames", [1, 15, 31, 32, 64])
def test_the_strip_shows_what_the_fast_tokens_keep(num_frames):
  one = clip(num_frames, windows=[])
  assert set(one.kept) <= {frame for frame, _ in strip_frames(one)}


@pytest.mark.parametrize("frame", [0, 5, 17, 31])
def test_picture_peak_and_window_stand_above_each_other(frame):
  """The strip's cells are as wide as the frames that they stand for."""
  profile = np.full(32, 0.01)
  profile[frame] = 1
  times = np.arange(32, dtype=np.float32) * 0.5 + 0.1
  window = (float(times[frame]) - 0.1, float(times[frame]) + 0.1)
  chart = Page(str(figures.attention_chart(profile / profile.sum(), times, [window], [frame])))
  (peak,), (band,) = chart.all("circle", "peak"), chart.all("rect", "window")
  left, width = (float(band[name].rstrip("%")) for name in ("x", "width"))
  centre = float(peak["cx"].rstrip("%"))
  assert left < centre < left + width
  assert centre == pytest.approx(100 * (frame + 0.5) / 32, abs=0.01)


def test_bars_are_as_long_as_their_numbers(tmp_path):
  _, page, _ = written(tmp_path, report())
  drawn = [
    float(rect["width"].rstrip("%")) for role in ("slow", "fast") for rect in page.all("rect", role)
  ]
  data = report()
  told = [
    100 * share
    for m in (data.slow_fast, data.fast_only)
    for share in (m.accuracy, *m.accuracy_by_kind.values())
  ]
  assert drawn == pytest.approx(told, abs=0.01)


@pytest.mark.parametrize(
  ("share", "count", "low", "high"),
  # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
  [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)],
)
def test_wilson_interval(share, count, low, high):
  assert figures.wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)
  mirrored = figures.wilson_interval(1 - share, count)
  assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_wilson_interval_without_questions():
  assert figures.wilson_interval(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.013), (0, 15.9), (10, 12_340), (0, 3e6)])
@pytest.mark.parametrize("most", [5, 8])
def test_ticks_are_round_few_and_inside(low, high, most):
  ticks = figures.ticks(low, high, most)
  assert 2 <= len(ticks) <= most + 1
  assert low <= ticks[0]
  assert ticks[-1] <= high * (1 + 1e-9)
  steps = np.diff(ticks)
  np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
  assert f"{steps[0]:.0e}"[0] in "125"


def test_smoothing_keeps_lines_and_removes_noise():
  line = [(i, 3 - 0.01 * i) for i in range(200)]
  inner = slice(5, -5)  # At the ends the mean has one side only.
  np.testing.assert_allclose(figures.smoothed(line)[inner], line[inner], rtol=1e-6)
  noise = np.random.default_rng(0).normal(size=200)
  values = [value for _, value in figures.smoothed(list(enumerate(noise)))]
  assert np.std(values) < 0.5 * np.std(noise)


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0.0 s"), (8.04, "8.0 s"), (59.99, "1 min 0 s"), (61, "1 min 1 s"), (3720, "1 h 2 min")],
)
def test_durations(seconds, text):
  assert duration(seconds) == text


def test_unequal_token_counts_are_refused():
  with pytest.raises(ValueError, match=r"same llm_tokens.*36 in the report, 36 slow-fast, 72 fast"):
    report(fast_only=model("Fast-only", 0.3, llm_tokens=72))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"chance": math.nan}, "chance must be a share between 0 and 1, got nan"),
    ({"attention_hits": 87.0}, "attention_hits must be a share"),
    ({"slow_fast": model("Slow-fast", 1.5)}, "Slow-fast: accuracy must be a share"),
    ({"seconds": {"train": math.inf}}, "seconds['train'] must be finite"),
    ({"num_questions": 0}, "num_questions must be at least 1"),
    ({"fast_only": model("Fast-only", 0.3, accuracy_by_kind={})}, "Fast-only: accuracies"),
  ],
)
def test_impossible_numbers_are_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    report(**changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"answer": "E"}, "answer must be the letter of one of 4 options, got 'E'"),
    ({"answer": ""}, "answer must be the letter"),
    ({"kept": [0, 32]}, "kept must be frames below 32"),
    ({"profile": np.zeros(32)}, "not all zero"),
    ({"profile": np.full(32, np.nan)}, "profile must be finite"),
  ],
)
def test_impossible_clips_are_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    clip(**changes)


def test_clips_of_uneven_lengths_are_refused():
  one = clip()
  # Annotations are checked while tests run, so theirs is the error that comes first here.
  with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="profile"):
    dataclasses.replace(one, profile=one.profile[:31])


def test_report_numbers_do_not_depend_on_the_clips():
  assert report_numbers(report()) == report_numbers(report(clips=[]))
