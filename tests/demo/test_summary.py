# SPDX-License-Identifier: Apache-2.0
"""The numbers and clips of the report, from outcomes by hand."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from slowfast_jax.demo.looks import Look
from slowfast_jax.demo.report import ChatExample, ModelResult
from slowfast_jax.demo.summary import (
  clip_results,
  fast_tokens,
  loss_curve,
  model_result,
  report_data,
)
from slowfast_jax.generate.video import ModelFrames
from tests.generate.tiny import make_export

# Every second of 8 frames is kept; a frame has 4 x 4 tokens, of which videos keep 2 x 2.
EXPORT = make_export(num_frames=8)


def look(name, kind, right):
  doc = {
    "id": name,
    "video": f"{name}.mp4",
    "kind": kind,
    "question": f"What of {name}?",
    "options": ["red", "green"],
    "answer": "B",
    "windows": [[1, 2.5]],
  }
  times = np.arange(8, dtype=np.float32)
  frames = ModelFrames(np.full((8, 4, 4, 3), len(name), np.uint8), times, 8.0, 0)
  return Look(doc, "green" if right else "red", right, frames, times + 1)


def other(*names, right=()):
  return {
    name: {"reply": f"fast {name}", "answer": "B" if name in right else "", "gold": "B"}
    for name in names
  }


def test_a_right_answer_of_each_kind_then_what_went_wrong():
  looks = [
    look("a", "colour", False),
    look("b", "colour", True),
    look("c", "place", True),
    look("d", "colour", True),
    look("e", "shape", False),
    look("f", "first", True),
    *[look(f"z{i}", "place", False) for i in range(9)],
  ]
  clips = clip_results(looks, other(*[one.doc["id"] for one in looks]), EXPORT)
  assert [clip.video for clip in clips] == [
    f"{name}.mp4" for name in ("b", "c", "f", "a", "e", "z0")
  ]
  assert [clip.slow_fast_correct for clip in clips] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("right", "count"), [(True, 1), (False, 6)])
def test_all_right_or_all_wrong(right, count):
  looks = [look(f"q{i}", "colour", right) for i in range(9)]
  clips = clip_results(looks, other(*[one.doc["id"] for one in looks]), EXPORT)
  assert [clip.video for clip in clips] == [f"q{i}.mp4" for i in range(count)]


def test_a_clip_tells_both_answers_and_what_was_seen():
  (clip,) = clip_results([look("a", "colour", True)], other("a", right="a"), EXPORT)
  assert (clip.question, clip.options, clip.answer) == ("What of a?", ["red", "green"], "B")
  assert (clip.slow_fast_reply, clip.slow_fast_correct) == ("green", True)
  assert (clip.fast_only_reply, clip.fast_only_correct) == ("fast a", True)
  assert clip.windows == [(1.0, 2.5)]
  assert clip.kept == [0, 2, 4, 6]
  assert clip.frames.shape == (8, 4, 4, 3)
  np.testing.assert_array_equal(clip.profile, np.arange(8) + 1)
  (clip,) = clip_results([look("a", "colour", False)], other("a"), EXPORT)
  assert (clip.slow_fast_reply, clip.slow_fast_correct) == ("red", False)
  assert not clip.fast_only_correct


def test_fast_tokens_are_those_in_the_sequence():
  assert fast_tokens(EXPORT) == 4 * 2 * 2
  assert fast_tokens(make_export(num_frames=32)) == 16 * 2 * 2


def write_metrics(folder, *losses):
  folder.mkdir()
  lines = [{"step": 10 * (i + 1), "loss": loss, "grad_norm": 1} for i, loss in enumerate(losses)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def test_model_results(tmp_path):
  folder, stills = write_metrics(tmp_path / "m", 2, 1.5), write_metrics(tmp_path / "p", 3)
  assert loss_curve(folder) == [(10, 2.0), (20, 1.5)]
  results = {"accuracy": 0.75, "accuracy_by_kind": {"colour": 0.5, "place": 1.0}, "chance": 0.25}
  kinds = Counter(["colour", "place", "place"])
  with_slow = model_result("slow-fast", folder, stills, EXPORT, results, kinds)
  assert with_slow.stills_curve == [(10, 3.0)]
  assert (with_slow.accuracy, with_slow.llm_tokens) == (0.75, 16)
  assert with_slow.counts_by_kind == {"colour": 1, "place": 2}
  without = model_result("fast-only", folder, stills, make_export(hybrid=False), results, kinds)
  # Keys, values and gates of two hybrid layers at least.
  assert with_slow.num_params - without.num_params > 2 * 2 * 32 * 16
  assert without.llm_tokens == with_slow.llm_tokens


def test_the_report_holds_what_it_is_given():
  model = ModelResult("slow-fast", 0.9, {"colour": 0.9}, {"colour": 4}, [], [], 10, 16)
  other_model = dataclasses.replace(model, name="fast-only", accuracy=0.3)
  looks = [look("a", "colour", True), look("b", "colour", False)]
  data = report_data(
    {"fast_only": other_model, "slow_fast": model},
    zeroed=0.2,
    chance=0.25,
    looks=looks,
    clips=[],
    chat=ChatExample("a.mp4", "?", "green", looks[0].frames.images, "slowfast chat"),
    seconds={"train": 2.0},
    num_train=5,
    commands=[],
  )
  assert (data.slow_fast.accuracy, data.fast_only.accuracy) == (0.9, 0.3)
  assert (data.zeroed_slow_accuracy, data.chance, data.num_questions) == (0.2, 0.25, 2)
  # The only right answer looked at frame 7; the event is in frames 1 and 2.
  assert data.attention_hits == 0.0
  assert "JAX" in data.machine
