# SPDX-License-Identifier: Apache-2.0
"""The demo's question set: videos, training conversations and a balanced multiple choice test.

Four kinds of question, about one flash or two: its colour (asked by shape), its shape (asked by
colour), its place, and which of two came first. Every question is answered by frames that the fast
tokens almost never keep, and by nothing in its own words: the test is balanced by construction.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slowfast_jax.demo.scenes import (
  COLOURS,
  PLACES,
  SHAPES,
  Event,
  Geometry,
  Scene,
  is_written,
  make_scene,
  time_of_day,
  write_video,
)
from slowfast_jax.eval.tasks.prompts import LETTERS, choose_from_prompt
from slowfast_jax.files import replace_text

KINDS = ("colour", "shape", "place", "first")
VALUES = {"colour": COLOURS, "shape": SHAPES, "place": PLACES}
# What is asked about stands last, right before the answer: the little models learn it sooner.
WORDINGS = {
  "colour": ("What colour was the {cue}?", "What was the colour of the {cue}?"),
  "shape": ("Which shape was {cue}?", "What was the shape in {cue}?"),
  "place of shape": ("Where was the {cue}?", "In which part of the picture was the {cue}?"),
  "place of colour": (
    "Where did something flash in {cue}?",
    "Which part of the picture was {cue}?",
  ),
  "first": ("Which came first: {one} or {other}?", "Which flashed first: {one} or {other}?"),
}
CAPTION_REQUESTS = {
  "colour": "What was there in each colour?",
  "shape": "What did each shape look like?",
}
QUESTIONS_PER_TEST_VIDEO = 3
_GEOMETRY = Geometry()
# Seconds between the starts of two flashes whose order is asked. Every scene has two that are 3 s
# apart, but for the rounding of their difference.
_APART = 2.99
_SPLIT_SEEDS = 1_000_000  # Scene seeds that belong to one split of one question set.
NUM_SEEDS = 500  # Question sets; behind their scene seeds come those of the stills.


@dataclass(frozen=True)
class Question:
  """A multiple choice question about one video."""

  id: str
  video: str
  kind: str
  question: str
  options: tuple[str, ...]
  answer: str  # The letter.
  events: tuple[int, ...]  # Indices of the scene's events that it asks about.
  windows: tuple[tuple[float, float], ...]  # Their seconds.

  def to_json(self) -> dict:
    fields = ("id", "video", "kind", "question", "options", "answer", "windows")
    return {name: getattr(self, name) for name in fields}


@dataclass(frozen=True)
class Dialogues:
  """How many training conversations a clip gets, and of what sort.

  Attributes:
    conversations: of each clip.
    turns: of a conversation; questions, each about another flash as long as there are any.
    open_share: questions without options.
    caption_share: conversations whose last turn is a caption of all flashes instead.
  """

  conversations: int = 4
  turns: int = 3
  open_share: float = 0.3
  caption_share: float = 0.5

  def __post_init__(self):
    shares = (self.open_share, self.caption_share)
    if self.conversations < 1 or self.turns < 1 or not all(0 <= share <= 1 for share in shares):
      raise ValueError(
        f"Dialogues need at least 1 conversation, 1 turn and shares between 0 and 1, got {self}."
      )


@dataclass(frozen=True)
class QuestionSet:
  """Where a finished question set lies; the annotations name videos relative to `videos`."""

  videos: Path
  train: Path
  test: Path


@dataclass(frozen=True)
class Fact:
  """Something that can be asked about a scene, before it is put into words."""

  kind: str
  events: tuple[int, ...]
  cue: str  # How the question names the flash; for `first`: the flash that came later.
  answer: str


def facts(scene: Scene, kind: str) -> list[Fact]:
  """All that a question of this kind can ask about the scene."""
  events = list(enumerate(scene.events))
  if kind == "colour":
    return [Fact(kind, (i,), e.shape, e.colour) for i, e in events]
  if kind == "shape":
    return [Fact(kind, (i,), e.colour, e.shape) for i, e in events]
  if kind == "place":
    return [Fact(kind, (i,), name, e.place) for i, e in events for name in _names(e)]
  return [
    Fact(kind, (i, j), later, earlier)
    for i, a in events
    for j, b in events
    if b.start - a.start >= _APART
    for earlier in _names(a)
    for later in _names(b)
  ]


def _names(event: Event) -> tuple[str, str]:
  return event.shape, event.colour


def word(rng: np.random.Generator, fact: Fact) -> str:
  """The fact as a question, in one of several wordings."""
  kind = fact.kind
  if kind == "place":
    kind = "place of shape" if fact.cue in SHAPES else "place of colour"
  wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
  if kind == "first":
    one, other = rng.permutation([fact.cue, fact.answer])
    return wording.format(one=one, other=other)
  return wording.format(cue=fact.cue)


def choices(rng: np.random.Generator, fact: Fact, letter: int) -> tuple[str, ...]:
  """The options in random order, with the answer at the given letter."""
  values = (fact.cue, fact.answer) if fact.kind == "first" else VALUES[fact.kind]
  wrong = [str(value) for value in rng.permutation([v for v in values if v != fact.answer])]
  return (*wrong[:letter], fact.answer, *wrong[letter:])


def num_options(kind: str) -> int:
  return len(VALUES.get(kind, "AB"))


# Training: conversations.


def conversation(
  rng: np.random.Generator, scene: Scene, dialogues: Dialogues, kinds: Sequence[str] = KINDS
) -> list[dict]:
  """One LLaVA conversation: questions about several flashes, perhaps a caption at the end."""
  events = rng.permutation(len(scene.events))
  with_caption = rng.random() < dialogues.caption_share
  turns: list[dict] = []
  for i in range(dialogues.turns - with_caption):
    candidates = facts(scene, kinds[int(rng.integers(len(kinds)))])
    about = [fact for fact in candidates if events[i % len(events)] in fact.events] or candidates
    fact = about[rng.integers(len(about))]
    question = word(rng, fact)
    if rng.random() >= dialogues.open_share:
      letter = int(rng.integers(num_options(fact.kind)))
      question = choose_from_prompt(question, choices(rng, fact, letter))
    turns += _turn(question, fact.answer)
  if with_caption:
    by = tuple(CAPTION_REQUESTS)[int(rng.integers(len(CAPTION_REQUESTS)))]
    turns += _turn(CAPTION_REQUESTS[by], caption(scene, by))
  turns[0]["value"] = "<video>\n" + turns[0]["value"]
  return turns


def _turn(question: str, answer: str) -> list[dict]:
  return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def caption(scene: Scene, by: str) -> str:
  """Every flash in a fixed order of its colour or its shape: `red cross dawn northwest, ...`."""
  known = {getattr(event, by): event for event in scene.events}
  other = "shape" if by == "colour" else "colour"

  def describe(value: str) -> str:
    if value not in known:
      return f"{value} nothing"
    event = known[value]
    return f"{value} {getattr(event, other)} {time_of_day(scene, event)} {event.place}"

  return ", ".join(describe(value) for value in VALUES[by])


def training_annotations(
  scenes: Mapping[str, Scene], dialogues: Dialogues, seed: int
) -> list[dict]:
  """LLaVA-style annotations, several conversations a video."""
  entries = []
  for name, scene in scenes.items():
    rng = np.random.default_rng((seed, scene.seed))
    for i in range(dialogues.conversations):
      turns = conversation(rng, scene, dialogues)
      entries.append({"id": f"{Path(name).stem}-{i}", "video": name, "conversations": turns})
  return entries


# Test: balanced questions.


@dataclass(frozen=True)
class _Slot:
  """What a test question has to look like for the test to be balanced."""

  answer: str
  cue: str | None  # None: any.
  letter: int


def balanced_questions(scenes: Mapping[str, Scene], seed: int) -> list[Question]:
  """Three questions of different kinds a video.

  Kinds, and within a kind the letters and the answers, are as even as whole numbers allow. So are
  the pairs of cue and answer (as far as the scenes at hand have them), so the words of a question
  say nothing about its answer.
  """
  rng, names = np.random.default_rng((seed, 1)), list(scenes)
  kinds = [
    (name, KINDS[(i * QUESTIONS_PER_TEST_VIDEO + j) % len(KINDS)])
    for i, name in enumerate(names)
    for j in range(QUESTIONS_PER_TEST_VIDEO)
  ]
  questions = {}
  for kind in KINDS:
    asked = [name for name, k in kinds if k == kind]
    for name, (fact, letter) in zip(
      asked, _balanced(rng, kind, [scenes[name] for name in asked]), strict=True
    ):
      windows = tuple(
        (round(scenes[name].events[i].start, 3), round(scenes[name].events[i].end, 3))
        for i in fact.events
      )
      questions[name, kind] = Question(
        id=f"{Path(name).stem}-{kind}",
        video=name,
        kind=kind,
        question=word(rng, fact),
        options=choices(rng, fact, letter),
        answer=LETTERS[letter],
        events=fact.events,
        windows=windows,
      )
  return [questions[key] for key in kinds]


def _balanced(
  rng: np.random.Generator, kind: str, scenes: Sequence[Scene]
) -> Iterator[tuple[Fact, int]]:
  """A fact and a letter for every scene, such that together they are balanced."""
  slots = _slots(rng, kind, len(scenes))
  known = [facts(scene, kind) for scene in scenes]
  fits = [
    [
      s
      for s in rng.permutation(len(slots)).tolist()
      if any(_fits(fact, slots[s]) for fact in scene_facts)
    ]
    for scene_facts in known
  ]
  for scene_facts, slot in zip(known, _match(fits, len(slots)), strict=True):
    # Only a handful of scenes can leave a slot that none of them fits: then any fact will do.
    about = [fact for fact in scene_facts if _fits(fact, slots[slot])] or scene_facts
    yield about[rng.integers(len(about))], slots[slot].letter


def _fits(fact: Fact, slot: _Slot) -> bool:
  return fact.answer == slot.answer and slot.cue in (None, fact.cue)


def _slots(rng: np.random.Generator, kind: str, count: int) -> list[_Slot]:
  answers, cues = {
    "colour": (COLOURS, SHAPES),
    "shape": (SHAPES, COLOURS),
    "place": (PLACES, SHAPES + COLOURS),
    "first": (SHAPES + COLOURS, [None]),
  }[kind]
  slots = []
  for a, answer in enumerate(rng.permutation(answers)):
    share = len(range(a, count, len(answers)))
    letters = rng.permutation((np.arange(share) + a) % num_options(kind))
    named = np.resize(rng.permutation(np.array(cues, object)), share)
    slots += [_Slot(str(answer), c, int(n)) for c, n in zip(named, letters, strict=True)]
  return slots


def _match(fits: Sequence[Sequence[int]], count: int) -> list[int]:
  """Gives every row a slot of its own, one that fits it wherever that is possible (Kuhn)."""
  owner: dict[int, int] = {}

  def place(row: int, tried: set[int]) -> bool:
    for slot in sorted(fits[row], key=owner.__contains__):  # Free slots first: short chains.
      if slot not in tried:
        tried.add(slot)
        if slot not in owner or place(owner[slot], tried):
          owner[slot] = row
          return True
    return False

  left_over = [row for row in range(len(fits)) if not place(row, set())]
  free = [slot for slot in range(count) if slot not in owner]
  owner.update(zip(free, left_over, strict=True))
  return [slot for slot, _ in sorted(owner.items(), key=lambda item: item[1])]


# The files.


def scene_seeds(seed: int, split: str, count: int) -> range:
  """Seeds of a split's scenes; no two splits, and no two question sets, share one.

  Raises:
    ValueError: the split is unknown or too large.
  """
  if split not in ("train", "test"):
    raise ValueError(f"split must be train or test, got {split!r}.")
  if not 0 <= seed < NUM_SEEDS or not 0 <= count <= _SPLIT_SEEDS:
    raise ValueError(
      f"Need a seed from 0 to {NUM_SEEDS - 1} and at most {_SPLIT_SEEDS} videos, "
      f"got {seed} and {count}."
    )
  first = (2 * seed + (split == "test")) * _SPLIT_SEEDS
  return range(first, first + count)


def make_question_set(
  workdir: str | os.PathLike,
  num_train: int,
  num_test: int,
  seed: int = 0,
  workers: int = 2,
  progress: Callable[[int, int], None] | None = None,
  *,
  geometry: Geometry = _GEOMETRY,
  size: int = 96,
  dialogues: Dialogues = Dialogues(),
) -> QuestionSet:
  """Writes videos/, train.json and test.jsonl; finished videos of the same scenes are kept."""
  root = Path(workdir)
  paths = QuestionSet(root / "videos", root / "train.json", root / "test.jsonl")
  paths.videos.mkdir(parents=True, exist_ok=True)
  splits = {
    split: {
      f"{split}-{i:05d}.mp4": make_scene(scene_seed, geometry, size)
      for i, scene_seed in enumerate(scene_seeds(seed, split, count))
    }
    for split, count in (("train", num_train), ("test", num_test))
  }
  jobs = [(s, paths.videos / name) for scenes in splits.values() for name, s in scenes.items()]
  _write_all(jobs, workers, progress or (lambda done, total: None))
  entries = training_annotations(splits["train"], dialogues, seed)
  replace_text(paths.train, json.dumps(entries, indent=1))
  lines = [json.dumps(question.to_json()) for question in balanced_questions(splits["test"], seed)]
  replace_text(paths.test, "".join(line + "\n" for line in lines))
  return paths


def _write_all(
  jobs: Sequence[tuple[Scene, Path]], workers: int, progress: Callable[[int, int], None]
) -> None:
  if workers <= 1:
    for done, job in enumerate(jobs, 1):
      _write_one(job)
      progress(done, len(jobs))
    return
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(workers, mp_context=context) as pool:
    for done, _ in enumerate(pool.map(_write_one, jobs, chunksize=8), 1):
      progress(done, len(jobs))


def _write_one(job: tuple[Scene, Path]) -> None:
  scene, path = job
  if not is_written(scene, path):
    write_video(scene, path)
