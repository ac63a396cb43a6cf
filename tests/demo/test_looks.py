# SPDX-License-Identifier: Apache-2.0
"""Whether an answer came from the moment that it is about, on frames and windows by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from slowfast_jax.demo import looks
from slowfast_jax.demo.looks import Look, hit_rate, look_again, read_predictions
from slowfast_jax.demo.questions import balanced_questions
from slowfast_jax.demo.scenes import Geometry, event_frames, make_scene, sample_times
from slowfast_jax.eval.results import PREDICTIONS
from slowfast_jax.eval.tasks import get_task
from slowfast_jax.generate.video import ModelFrames


def look(peak, windows, right=True, num_frames=10, **doc):
  """A frame every half second; all attention but a little on one of them."""
  frames = ModelFrames(
    np.zeros((num_frames, 2, 2, 3), np.uint8),
    np.arange(num_frames, dtype=np.float32) / 2,
    num_frames / 2,
    0,
  )
  profile = np.full(num_frames, 0.01, np.float32)
  profile[peak] = 0.5
  return Look({"windows": windows, **doc}, "red", right, frames, profile)


@pytest.mark.parametrize(
  ("windows", "frames"),
  [
    ([[1.9, 2.6]], [4, 5]),
    ([[2.0, 2.5]], [4]),  # It is on at its start and off at its end.
    ([[2.1, 2.4]], []),
    ([[0.0, 0.1], [4.4, 9.0]], [0, 9]),
    ([[1.9, 2.1], [1.4, 2.1]], [3, 4]),
  ],
)
def test_event_frames_are_those_in_a_window(windows, frames):
  assert look(0, windows).event_frames == frames


@pytest.mark.parametrize(
  ("peak", "hit"), [(2, False), (3, True), (4, True), (5, True), (6, True), (7, False)]
)
def test_a_hit_is_a_frame_of_the_event_or_beside_it(peak, hit):
  assert look(peak, [[1.9, 2.6]]).hit == hit


def test_of_two_events_either_is_a_hit():
  windows = [[0.9, 1.1], [3.9, 4.1]]
  assert [i for i in range(10) if look(i, windows).hit] == [1, 2, 3, 7, 8, 9]


def test_the_first_and_the_last_frame_are_no_neighbours():
  assert not look(9, [[0, 0.1]]).hit
  assert not look(0, [[4.4, 4.6]]).hit


def test_what_no_frame_shows_cannot_be_hit():
  assert not any(look(i, [[2.1, 2.4]]).hit for i in range(10))


def test_the_rate_counts_right_answers_only():
  here, away = [[1.9, 2.1]], [[4.4, 4.6]]
  some = [look(4, here), look(4, away), look(4, away, right=False), look(4, here, right=False)]
  assert hit_rate(some) == 0.5
  assert hit_rate([*some, look(4, here)]) == pytest.approx(2 / 3)
  assert hit_rate(some[2:]) == 0.0
  assert hit_rate([]) == 0.0


def test_the_frames_of_a_question_are_those_of_its_scene():
  geometry = Geometry()
  scenes = {f"{seed}.mp4": make_scene(seed, geometry) for seed in range(20)}
  for question in balanced_questions(scenes, 0):
    scene = scenes[question.video]
    times = sample_times(scene, geometry).astype(np.float32)
    frames = ModelFrames(np.zeros((32, 2, 2, 3), np.uint8), times, scene.duration, 0)
    expected = {i for e in question.events for i in event_frames(scene.events[e], times)}
    one = Look(question.to_json(), "", True, frames, np.ones(32, np.float32))
    assert one.event_frames == sorted(expected)


def test_the_last_line_of_a_question_counts(tmp_path):
  lines = [{"fingerprint": "x"}, {"id": "a", "reply": "1"}, {"id": "b"}, {"id": "a", "reply": "2"}]
  (tmp_path / PREDICTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert read_predictions(tmp_path) == {"a": lines[3], "b": lines[2]}


class FakeEngine:
  """Its export, sessions and attention are named after the video and the prompt."""

  export = "export"

  def encode(self, images):
    return f"session of {images}"

  def prompt_ids(self, prompt, session):
    return f"{prompt} in {session}"

  def slow_attention(self, ids, session):
    assert ids.endswith(session)
    profile = np.eye(4, dtype=np.float32)[int("second" in ids)]
    return SimpleNamespace(profile=lambda: profile)


def test_every_question_is_asked_of_its_own_video(monkeypatch):
  def read_video(path, export):
    assert export == "export"
    return SimpleNamespace(images=str(path))

  monkeypatch.setattr(looks, "read_video", read_video)
  base = {"question": "What?", "options": ["x", "y"], "answer": "A", "windows": []}
  docs = [{**base, "id": "1", "video": "first.mp4"}, {**base, "id": "2", "video": "second.mp4"}]
  predictions = {
    "2": {"reply": "y", "answer": "B", "gold": "A"},
    "1": {"reply": "x", "answer": "A", "gold": "A"},
  }
  steps = []
  seen = list(
    look_again(
      FakeEngine(),
      get_task("jsonl", "text"),
      docs,
      predictions,
      Path("videos"),
      lambda *step: steps.append(step),
    )
  )
  assert [one.doc for one in seen] == docs
  assert [one.frames.images for one in seen] == ["videos/first.mp4", "videos/second.mp4"]
  assert [(one.reply, one.right) for one in seen] == [("x", True), ("y", False)]
  assert [int(one.profile.argmax()) for one in seen] == [0, 1]
  assert steps == [(1, 2), (2, 2)]
