# SPDX-License-Identifier: Apache-2.0
"""The question set: true answers, no answer in the words, nothing for the fast tokens."""

import dataclasses
import functools
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from slowfast_jax.data.annotations import read_annotations
from slowfast_jax.demo.questions import (
  CAPTION_REQUESTS,
  KINDS,
  VALUES,
  WORDINGS,
  Dialogues,
  Fact,
  balanced_questions,
  caption,
  choices,
  facts,
  make_question_set,
  scene_seeds,
  training_annotations,
  word,
)
from slowfast_jax.demo.scenes import (
  COLOURS,
  PLACES,
  SHAPES,
  TIMES,
  Geometry,
  event_frames,
  is_written,
  make_scene,
  sample_times,
)

GEOMETRY = Geometry()
NAME = "|".join(SHAPES + COLOURS)


def scenes_of(split, count, seed=0):
  return {
    f"{split}-{i:05d}.mp4": make_scene(s, GEOMETRY)
    for i, s in enumerate(scene_seeds(seed, split, count))
  }


# Computed when first asked for: every worker imports this module, and one needs them.
@functools.cache
def clips(split):
  return scenes_of(split, {"test": 84, "train": 300}[split])


@functools.cache
def questions():
  return balanced_questions(clips("test"), seed=0)


@functools.cache
def entries():
  return training_annotations(clips("train"), Dialogues(), seed=0)


def parse_turn(human):
  """The question's kind, its text and its options (None: open), from nothing but its words."""
  *above, text = human.removeprefix("<video>\n").split("\n")
  options = None
  if above:
    (line,) = above
    options = re.fullmatch(r"Choose from: (.+)\.", line)[1].split(", ")
  return kind_of(text), text, options


def kind_of(text):
  kinds = [
    kind.split()[0]
    for kind, wordings in WORDINGS.items()
    for wording in wordings
    if re.fullmatch(re.sub(r"\\{\w+\\}", rf"(?:{NAME})", re.escape(wording)), text)
  ]
  assert len(kinds) == 1, text
  return kinds[0]


def names_in(text):
  return re.findall(rf"\b({NAME})\b", text)


def true_answer(scene, kind, text):
  """Answers a question as a person who saw the clip would."""
  asked = []
  for name in names_in(text):
    (event,) = (e for e in scene.events if name in (e.shape, e.colour))
    asked.append((event, name))
  if kind != "first":
    ((event, _),) = asked
    return getattr(event, kind)
  (a, name_a), (b, name_b) = asked
  assert abs(a.start - b.start) > 2.95
  return name_a if a.start < b.start else name_b


def test_answers_are_true_and_options_complete():
  for question in questions():
    kind, text = kind_of(question.question), question.question
    assert kind == question.kind
    answer = question.options["ABCD".index(question.answer)]
    assert answer == true_answer(clips("test")[question.video], kind, text)
    expected = names_in(text) if kind == "first" else VALUES[kind]
    assert sorted(question.options) == sorted(expected)
    assert len(set(question.options)) == len(question.options)


def test_every_wording_asks_its_question_and_ends_with_the_cue():
  """The little models learn sooner what stands right before the answer."""
  rng = np.random.default_rng(0)
  for kind, wordings in WORDINGS.items():
    first = kind == "first"
    for cue in COLOURS if kind in ("shape", "place of colour") else SHAPES:
      fact = Fact(kind.split()[0], (0, 1) if first else (0,), cue, "red" if first else "?")
      texts = {word(rng, fact) for _ in range(60)}
      assert all(kind_of(text) == fact.kind for text in texts)
      # Two orders of the names.
      assert len(texts) == len(wordings) * (2 if first else 1)
      assert all(text[:-1].endswith((cue, "red") if first else cue) for text in texts)
      assert all(sorted(names_in(text)) == sorted([cue, "red"][: 1 + first]) for text in texts)


def test_a_flash_named_by_colour_may_have_come_before_one_named_by_shape():
  """Were both always named alike, half of the words could not be an answer to the other half."""
  pairs = Counter(
    tuple(name in SHAPES for name in (fact.cue, fact.answer))
    for scene in clips("test").values()
    for fact in facts(scene, "first")
  )
  assert len(pairs) == 4
  assert len(set(pairs.values())) == 1


def test_every_scene_has_something_to_ask_of_every_kind():
  # Flashes of scene 38705 are three seconds apart at most, less the rounding of their difference.
  for scene in [*clips("train").values(), make_scene(38705, GEOMETRY)]:
    assert all(facts(scene, kind) for kind in KINDS), scene.seed


def test_options_stand_in_every_order_around_the_answer():
  rng = np.random.default_rng(0)
  fact = Fact("shape", (0,), "red", "cross")
  seen = {choices(rng, fact, letter) for letter in range(4) for _ in range(100)}
  assert len(seen) == 24
  assert all(choices(rng, fact, letter)[letter] == "cross" for letter in range(4))


def test_windows_are_the_asked_flashes():
  for question in questions():
    events = [clips("test")[question.video].events[i] for i in question.events]
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
      cues = [names_in(q.question)[0] for q in mine]
      assert is_even(Counter(zip(cues, answers, strict=True)), 32 if kind == "place" else 16)


def is_even(counts, cells):
  most = max(counts.values())
  return most - min([*counts.values(), *[0] * (cells - len(counts))]) <= 1


def test_fewer_videos_than_answers_still_make_a_test():
  for videos in range(1, 9):
    questions = balanced_questions(scenes_of("test", videos), 0)
    assert len(questions) == 3 * videos
    assert is_even(Counter(q.kind for q in questions), 4)


def questions_of(entry):
  """(what the human says, what the model should) of the turns that are no captions."""
  turns = [turn["value"] for turn in entry["conversations"]]
  pairs = list(zip(turns[::2], turns[1::2], strict=True))
  return [pair for pair in pairs if not is_caption(pair[0])]


def is_caption(human):
  return human.removeprefix("<video>\n") in CAPTION_REQUESTS.values()


def readings(kind, text, options):
  """What somebody who does not see the video could go by."""
  names = tuple(names_in(text))
  wording = re.sub(rf"\b({NAME})\b", "_", text)
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
  for entry in entries():
    for human, reply in questions_of(entry):
      kind, text, options = parse_turn(human)
      if options:
        for reading in readings(kind, text, options).items():
          letters[reading]["ABCD"[options.index(reply)]] += 1
          values[reading][reply] += 1
  chance = np.mean([1 / len(q.options) for q in questions()])
  deviation = np.sqrt(chance * (1 - chance) / len(questions()))
  for name in readings("colour", "", [""]):
    by_letter, by_value = [], []
    for q in questions():
      reading = (name, readings(q.kind, q.question, q.options)[name])
      by_letter.append(max("ABCD", key=lambda x, r=reading: letters[r][x]) == q.answer)
      guess = max(q.options, key=lambda x, r=reading: values[r][x])
      by_value.append(guess == q.options["ABCD".index(q.answer)])
    assert np.mean(by_letter) < chance + 3 * deviation, name
    assert np.mean(by_value) < chance + 3 * deviation, name


def test_fast_frames_hardly_ever_show_what_is_asked():
  shown = []
  for question in questions():
    scene = clips("test")[question.video]
    times = sample_times(scene, GEOMETRY)
    for i in question.events:
      frames = event_frames(scene.events[i], times)
      assert frames, "the slow frames show every flash"
      shown.append(any(frame in GEOMETRY.fast_frames for frame in frames))
  assert np.mean(shown) < 0.08


def test_train_and_test_never_share_a_scene():
  assert set(scene_seeds(3, "train", 1_000_000)).isdisjoint(scene_seeds(3, "test", 1_000_000))
  assert set(scene_seeds(3, "test", 1_000_000)).isdisjoint(scene_seeds(4, "train", 1_000_000))
  trained, asked = ({s.fingerprint for s in clips(x).values()} for x in ("train", "test"))
  assert trained.isdisjoint(asked)
  with pytest.raises(ValueError, match="at most 1000000 videos, got 0 and 1000001"):
    scene_seeds(0, "train", 1_000_001)
  with pytest.raises(ValueError, match="a seed from 0 to 499"):  # Stills have the seeds behind.
    scene_seeds(500, "train", 1)
  with pytest.raises(ValueError, match="train or test, got 'valid'"):
    scene_seeds(0, "valid", 1)


def test_conversations_are_well_formed():
  for entry in entries():
    turns = entry["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 3
    assert [turn["value"].count("<video>") for turn in turns] == [1] + [0] * 5
    assert turns[0]["value"].startswith("<video>\n")
    captions = [is_caption(turn["value"]) for turn in turns[::2]]
    assert not any(captions[:-1]), "a caption tells everything: it comes last"
  per_video = Counter(entry["video"] for entry in entries())
  assert set(per_video) == set(clips("train"))
  assert set(per_video.values()) == {4}


def test_training_answers_are_true():
  positions, kinds, opened = Counter(), Counter(), []
  for entry in entries():
    for human, reply in questions_of(entry):
      kind, text, options = parse_turn(human)
      assert reply == true_answer(clips("train")[entry["video"]], kind, text)
      kinds[kind] += 1
      opened.append(options is None)
      if options:
        assert sorted(options) == sorted(names_in(text) if kind == "first" else VALUES[kind])
        positions[len(options), options.index(reply)] += 1
  assert 0.26 < np.mean(opened) < 0.34, "0.3 by default"
  assert min(kinds.values()) > 0.9 * max(kinds.values())
  for count in (2, 4):
    at = [positions[count, i] for i in range(count)]
    assert min(at) > 0.8 * max(at), "the answer stands anywhere among the options"


def test_turns_of_a_conversation_are_about_different_flashes():
  repeated = 0
  for entry in entries():
    scene, flashes, questions = clips("train")[entry["video"]], [], []
    for human, _ in questions_of(entry):
      kind, text, _ = parse_turn(human)
      questions.append((kind, frozenset(names_in(text))))
      if kind != "first":
        (name,) = names_in(text)
        flashes += [e for e in scene.events if name in (e.shape, e.colour)]
    assert len(set(flashes)) == len(flashes)
    repeated += len(questions) - len(set(questions))
  # The same two flashes by the same two names, with either of them in turn.
  assert repeated < 0.01 * len(entries())


def test_captions_are_true():
  found = Counter()
  for entry in entries():
    human, reply = (turn["value"] for turn in entry["conversations"][-2:])
    if not is_caption(human):
      found["none"] += 1
      continue
    by = next(key for key, request in CAPTION_REQUESTS.items() if request == human)
    found[by] += 1
    scene = clips("train")[entry["video"]]
    assert_caption_is_true(reply, scene, by)
  assert 0.44 < found["none"] / len(entries()) < 0.56, "half of them by default"
  assert abs(found["colour"] - found["shape"]) < 0.15 * len(entries())


def assert_caption_is_true(text, scene, by):
  parts = [part.split(" ", 3) for part in text.split(", ")]
  assert [part[0] for part in parts] == list(VALUES[by])
  for value, *rest in parts:
    event = next((e for e in scene.events if getattr(e, by) == value), None)
    if event is None:
      assert rest == ["nothing"]
      continue
    other, time, place = rest
    assert other == (event.shape if by == "colour" else event.colour)
    assert place == event.place
    quarter = TIMES.index(time)
    # A still's only moment is half a frame long, and may begin before the day does.
    start = max(event.start, 0)
    assert quarter * scene.duration / 4 <= start + 1e-6
    assert start <= (quarter + 1) * scene.duration / 4


def test_a_caption_names_what_is_not_there():
  scene = clips("test")["test-00000.mp4"]
  alone = dataclasses.replace(scene, events=scene.events[2:3])
  for by in CAPTION_REQUESTS:
    text = caption(alone, by)
    assert_caption_is_true(text, alone, by)
    assert text.count("nothing") == 3


def test_values_are_words_that_do_not_contain_each_other():
  """A reply that names one of them names just one."""
  for values in (SHAPES, COLOURS, TIMES, PLACES):
    assert len(values) == 4
    assert not any(a != b and a in b for a in values for b in values)
  assert len({*SHAPES, *COLOURS, *TIMES, *PLACES, "nothing"}) == 17


@pytest.mark.parametrize(("open_share", "caption_share"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("turns", [1, 2, 6])
def test_dialogues_set_length_number_and_form(turns, open_share, caption_share):
  dialogues = Dialogues(2, turns, open_share, caption_share)
  entries = training_annotations(dict(list(clips("train").items())[:5]), dialogues, seed=0)
  assert len(entries) == len({entry["id"] for entry in entries}) == 10
  for entry in entries:
    assert len(entry["conversations"]) == 2 * turns
    asked = questions_of(entry)
    assert len(asked) == turns - caption_share
    assert all((parse_turn(human)[2] is None) == bool(open_share) for human, _ in asked)


def test_annotations_are_a_function_of_scenes_and_seed():
  few = dict(list(clips("train").items())[:5])
  assert training_annotations(few, Dialogues(), 0) == entries()[:20]
  assert training_annotations(few, Dialogues(), 1) != entries()[:20]


@pytest.mark.parametrize("bad", [(0, 3, 0.5, 0.5), (1, 0, 0.5, 0.5), (1, 3, 1.5, 0), (1, 3, 0, -1)])
def test_impossible_dialogues_are_named(bad):
  with pytest.raises(ValueError, match=r"at least 1 conversation, 1 turn .* got Dialogues\("):
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
