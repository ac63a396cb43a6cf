# SPDX-License-Identifier: Apache-2.0
"""The question set: true answers, no answer in the words, nothing for the fast tokens."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from slowfast_jax.data.annotations import read_annotations
from slowfast_jax.demo.questions import (
  KINDS,
  VALUES,
  WORDINGS,
  Dialogues,
  balanced_questions,
  make_question_set,
  scene_seeds,
  training_annotations,
)
from slowfast_jax.demo.scenes import (
  COLOURS,
  SHAPES,
  Geometry,
  event_frames,
  is_written,
  make_scene,
  sample_times,
)

GEOMETRY = Geometry()


def scenes_of(split, count, seed=0):
  return {
    f"{split}-{i:05d}.mp4": make_scene(s, GEOMETRY)
    for i, s in enumerate(scene_seeds(seed, split, count))
  }


TEST = scenes_of("test", 84)
QUESTIONS = balanced_questions(TEST, seed=0)
TRAIN = scenes_of("train", 300)
ENTRIES = training_annotations(TRAIN, Dialogues(), seed=0)


def parse_turn(human):
  """The question's kind, its text and its options (None: open), from nothing but its words."""
  text, *rest = human.removeprefix("<video>\n").split("\n")
  kinds = [
    kind
    for kind, wordings in WORDINGS.items()
    for wording in wordings
    if re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(wording)), text)
  ]
  assert len(kinds) == 1, text
  if not rest:
    return kinds[0], text, None
  assert rest.pop() == "Answer with the letter."
  assert [line[:3] for line in rest] == [f"{letter}. " for letter in "ABCD"[: len(rest)]]
  return kinds[0], text, [line[3:] for line in rest]


def true_answer(scene, kind, text):
  """Answers a question as a person who saw the clip would."""
  words = re.findall(r"\w+", text.lower())
  named = [w for w in words if w in SHAPES + COLOURS]
  asked = [next(e for e in scene.events if w in (e.shape, e.colour)) for w in named]
  if kind != "first":
    (event,) = asked
    return getattr(event, kind)
  a, b = asked
  assert abs(a.start - b.start) > 2.95
  word = named[0] if a.start < b.start else named[1]
  return f"the {word}" if word in SHAPES else f"the {word} shape"


def test_answers_are_true_and_options_complete():
  for question in QUESTIONS:
    kind, text, _ = parse_turn(question.question)
    assert kind == question.kind
    answer = question.options["ABCD".index(question.answer)]
    assert answer == true_answer(TEST[question.video], kind, text)
    assert len(set(question.options)) == len(question.options)
    if kind == "first":
      assert all(option in text for option in question.options)
    else:
      assert sorted(question.options) == sorted(VALUES[kind])


def test_windows_are_the_asked_flashes():
  for question in QUESTIONS:
    events = [TEST[question.video].events[i] for i in question.events]
    assert len(events) == (2 if question.kind == "first" else 1)
    np.testing.assert_allclose(question.windows, [(e.start, e.end) for e in events], atol=1e-3)


@pytest.mark.parametrize(("videos", "seed"), [(80, 0), (84, 1), (101, 2)])
def test_kinds_letters_and_answers_are_balanced(videos, seed):
  questions = balanced_questions(scenes_of("test", videos, seed), seed)
  assert len(questions) == len({question.id for question in questions}) == 3 * videos
  assert is_even(Counter(q.kind for q in questions), 4)
  per_video = defaultdict(set)
  for question in questions:
    per_video[question.video].add(question.kind)
  assert all(len(kinds) == 3 for kinds in per_video.values())
  for kind in KINDS:
    mine = [q for q in questions if q.kind == kind]
    answers = [q.options["ABCD".index(q.answer)] for q in mine]
    assert is_even(Counter(q.answer for q in mine), 2 if kind == "first" else 4)
    assert is_even(Counter(answers), 8 if kind == "first" else 4)
    if kind != "first":
      cues = [re.search("|".join(SHAPES + COLOURS), q.question.lower())[0] for q in mine]
      assert is_even(Counter(zip(cues, answers, strict=True)), 32 if kind == "place" else 16)


def is_even(counts, cells):
  most = max(counts.values())
  return most - min([*counts.values(), *[0] * (cells - len(counts))]) <= 1


def test_fewer_videos_than_answers_still_make_a_test():
  for videos in range(1, 9):
    questions = balanced_questions(scenes_of("test", videos), 0)
    assert len(questions) == 3 * videos
    assert is_even(Counter(q.kind for q in questions), 4)


def readings(kind, text, options):
  """What somebody who does not see the video could go by."""
  names = tuple(re.findall("|".join(SHAPES + COLOURS), text.lower()))
  wording = re.sub("|".join(SHAPES + COLOURS), "_", text.lower())
  return {
    "kind": kind,
    "wording": wording,
    "names": (kind, names),
    "order of the options": (kind, tuple(options)),
    "names and first option": (kind, names, options[0]),
  }


def test_the_words_alone_do_not_help():
  """Majorities learned from the training conversations, by whatever the text offers."""
  letters, values = defaultdict(Counter), defaultdict(Counter)
  for entry in ENTRIES:
    turns = entry["conversations"]
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
      kind, text, options = parse_turn(human["value"])
      if options:
        value = options["ABCD".index(gpt["value"])]
        for reading in readings(kind, text, options).items():
          letters[reading][gpt["value"]] += 1
          values[reading][value] += 1
  chance = np.mean([1 / len(q.options) for q in QUESTIONS])
  deviation = np.sqrt(chance * (1 - chance) / len(QUESTIONS))
  for name in readings("colour", "", [""]):
    by_letter, by_value = [], []
    for q in QUESTIONS:
      reading = (name, readings(q.kind, q.question, q.options)[name])
      by_letter.append(max("ABCD", key=lambda x, r=reading: letters[r][x]) == q.answer)
      guess = max(q.options, key=lambda x, r=reading: values[r][x])
      by_value.append(guess == q.options["ABCD".index(q.answer)])
    assert np.mean(by_letter) < chance + 2.5 * deviation, name
    assert np.mean(by_value) < chance + 2.5 * deviation, name


def test_fast_frames_hardly_ever_show_what_is_asked():
  shown = []
  for question in QUESTIONS:
    scene = TEST[question.video]
    times = sample_times(scene, GEOMETRY)
    for i in question.events:
      frames = event_frames(scene.events[i], times)
      assert frames, "the slow frames show every flash"
      shown.append(any(frame in GEOMETRY.fast_frames for frame in frames))
  assert np.mean(shown) < 0.08


def test_train_and_test_never_share_a_scene():
  assert set(scene_seeds(3, "train", 1_000_000)).isdisjoint(scene_seeds(3, "test", 1_000_000))
  assert set(scene_seeds(3, "test", 1_000_000)).isdisjoint(scene_seeds(4, "train", 1_000_000))
  assert {s.fingerprint for s in TRAIN.values()}.isdisjoint(s.fingerprint for s in TEST.values())
  with pytest.raises(ValueError, match="at most 1000000 videos, got 0 and 1000001"):
    scene_seeds(0, "train", 1_000_001)
  with pytest.raises(ValueError, match="train or test, got 'valid'"):
    scene_seeds(0, "valid", 1)


def test_conversations_are_true_and_say_little_about_later_turns():
  open_turns = total = 0
  for entry in ENTRIES:
    turns = entry["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4
    assert [turn["value"].count("<video>") for turn in turns] == [1] + [0] * 7
    assert turns[0]["value"].startswith("<video>\n")
    scene, kinds, flashes = TRAIN[entry["video"]], [], []
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
      kind, text, options = parse_turn(human["value"])
      answer = options["ABCD".index(gpt["value"])] if options else gpt["value"]
      assert answer == true_answer(scene, kind, text)
      kinds.append(kind)
      if kind != "first":
        flashes.append(next(e for e in scene.events if text_names(text, e)))
      open_turns, total = open_turns + (options is None), total + 1
    assert sorted(kinds) == sorted(KINDS)
    assert len(set(flashes)) == 3, "a flash is asked about once"
  assert 0.46 < open_turns / total < 0.54


def text_names(text, event):
  return event.shape in text.lower() or event.colour in text.lower()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dialogues_set_length_number_and_form(share):
  entries = training_annotations(dict(list(TRAIN.items())[:5]), Dialogues(2, 3, share), seed=0)
  assert len(entries) == len({entry["id"] for entry in entries}) == 10
  for entry in entries:
    humans = entry["conversations"][::2]
    assert len(humans) == 3
    assert all((parse_turn(human["value"])[2] is None) == bool(share) for human in humans)


@pytest.mark.parametrize("bad", [(0, 4, 0.5), (1, 5, 0.5), (1, 0, 0.5), (1, 4, 1.5)])
def test_impossible_dialogues_are_named(bad):
  with pytest.raises(ValueError, match=r"1 to 4 turns .* got Dialogues\("):
    Dialogues(*bad)


def test_the_files_are_whole_and_a_second_run_keeps_them(tmp_path):
  steps = []
  made = make_question_set(
    tmp_path, 3, 2, seed=5, workers=1, progress=lambda *step: steps.append(step), size=64
  )
  assert steps == [(i, 5) for i in range(1, 6)]
  videos = sorted(path.name for path in made.videos.iterdir())
  assert videos == [f"test-0000{i}.mp4" for i in range(2)] + [
    f"train-0000{i}.mp4" for i in range(3)
  ]
  annotations = read_annotations(made.train)
  assert len(annotations) == 12
  assert {(a.kind, a.media in videos) for a in annotations} == {("video", True)}
  lines = [json.loads(line) for line in made.test.read_text().splitlines()]
  assert len(lines) == 6
  assert set(lines[0]) == {"id", "video", "kind", "question", "options", "answer", "windows"}
  assert {line["video"] for line in lines} == {"test-00000.mp4", "test-00001.mp4"}

  def state():
    return {path.name: path.stat().st_mtime_ns for path in made.videos.iterdir()}

  before, contents = state(), [made.train.read_bytes(), made.test.read_bytes()]
  (made.videos / "test-00001.mp4").write_bytes(b"torn")
  make_question_set(tmp_path, 3, 2, seed=5, workers=1, size=64)
  assert [made.train.read_bytes(), made.test.read_bytes()] == contents
  assert {name for name, time in state().items() if time != before[name]} == {"test-00001.mp4"}
  make_question_set(tmp_path, 3, 2, seed=6, workers=1, size=64)
  scene = make_scene(scene_seeds(6, "train", 1)[0], GEOMETRY, 64)
  assert is_written(scene, made.videos / "train-00000.mp4"), "another seed, another video"


def test_two_processes_write_what_one_does(tmp_path):
  one, two = (
    make_question_set(tmp_path / str(workers), 2, 1, workers=workers, size=64) for workers in (1, 2)
  )
  for path in sorted(one.videos.iterdir()):
    assert path.read_bytes() == (two.videos / path.name).read_bytes()
  assert len(list(two.videos.iterdir())) == 3
