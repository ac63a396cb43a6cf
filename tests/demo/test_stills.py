# SPDX-License-Identifier: Apache-2.0
"""Stills: pictures that show what their annotations say, and nothing of any video."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.annotations import read_annotations
from slowfast_jax.demo import scenes
from slowfast_jax.demo.questions import CAPTION_REQUESTS, Dialogues, facts, scene_seeds
from slowfast_jax.demo.scenes import COLOURS, PLACES, SHAPES, Geometry, make_scene
from slowfast_jax.demo.stills import KINDS, make_still, regions, write_stills

STILLS = [make_still(seed) for seed in range(150)]


def quadrants(picture):
  half = len(picture) // 2
  return [picture[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]


def colour_of(quadrant):
  """The dominant saturated colour, or None where all is nearly grey."""
  pixels = quadrant.reshape(-1, 3).astype(int)
  saturated = pixels[np.ptp(pixels, axis=1) > 90]
  if len(saturated) < 0.05 * len(pixels):
    return None
  palette = np.array([scenes._RGB[colour] for colour in COLOURS])
  nearest = np.abs(saturated[:, None] - palette).sum(axis=2).argmin(axis=1)
  return COLOURS[np.bincount(nearest).argmax()]


def test_a_still_is_a_function_of_its_seed():
  scene, picture = make_still(7)
  assert scene == STILLS[7][0]
  np.testing.assert_array_equal(picture, STILLS[7][1])
  assert len({picture.tobytes() for _, picture in STILLS}) == len(STILLS)


def test_shapes_colours_and_places_are_there_once():
  counts = Counter()
  for scene, picture in STILLS:
    assert picture.shape == (96, 96, 3)
    for field in ("shape", "colour", "place"):
      values = [getattr(event, field) for event in scene.events]
      assert len(set(values)) == len(values)
    counts[len(scene.events)] += 1
  assert set(counts) == {1, 2, 3, 4}
  assert min(counts.values()) > 20, "37 expected"


def test_regions_are_what_the_picture_shows():
  for scene, picture in STILLS:
    described = regions(scene)
    assert len(described) == 4
    for words, quadrant in zip(described, quadrants(picture), strict=True):
      named = [word for word in words if word in COLOURS]
      assert [colour_of(quadrant)] == (named or [None])
      assert len([word for word in words if word in SHAPES]) == len(named)
      assert len(words) == len(set(words))


def test_regions_and_places_are_in_the_same_order():
  for scene, picture in STILLS[:50]:
    shown = [colour_of(quadrant) for quadrant in quadrants(picture)]
    for event in scene.events:
      assert shown[PLACES.index(event.place)] == event.colour
      x, y = event.centre_xy
      assert PLACES.index(event.place) == (x > 48) + 2 * (y > 48)


def test_shapes_in_pictures_are_those_of_the_words():
  """The area a shape covers, against its mask; the four differ."""
  right = total = 0
  for scene, picture in STILLS[:60]:
    for event in scene.events:
      quadrant = quadrants(picture)[PLACES.index(event.place)].astype(int)
      covered = (np.ptp(quadrant, axis=2) > 90).sum()
      areas = {shape: scenes._mask(shape, event.radius).sum() for shape in SHAPES}
      right += min(areas, key=lambda shape, n=covered: abs(areas[shape] - n)) == event.shape
      total += 1
  assert right / total > 0.9


def test_no_still_is_a_moment_of_a_video():
  """Scene seeds of stills start where those of five hundred question sets have ended."""
  scene_seed = STILLS[0][0].seed
  assert scene_seed == 1_000_000_000
  assert [scene.seed for scene, _ in STILLS] == list(range(scene_seed, scene_seed + len(STILLS)))
  for seed in (0, 1, 499):
    for split in ("train", "test"):
      assert scene_seeds(seed, split, 1_000_000).stop <= scene_seed
  backgrounds = {scene.background for scene, _ in STILLS}
  assert backgrounds.isdisjoint(make_scene(seed, Geometry()).background for seed in range(150))


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_what_can_be_asked_has_one_answer(kind):
  for scene, _ in STILLS:
    known = facts(scene, kind)
    assert known, "every still has something to ask"
    for fact in known:
      (event,) = (e for e in scene.events if fact.cue in (e.shape, e.colour))
      assert getattr(event, kind) == fact.answer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stills")
  return write_stills(folder, 30, 3, Dialogues(conversations=2, turns=1))


def test_annotations_are_true(written):
  entries = json.loads(written.read_text())
  assert len(entries) == len({entry["id"] for entry in entries}) == 60
  captions = 0
  for i, entry in enumerate(entries):
    scene, picture = make_still(3 * 30 + i // 2)
    stored = np.asarray(Image.open(written.parent / "pictures" / entry["image"]))
    np.testing.assert_array_equal(stored, picture)
    assert entry["regions"] == regions(scene)
    human, gpt = (turn["value"] for turn in entry["conversations"])
    assert human.startswith("<video>\n")
    *_, question = human.split("\n")
    if question in CAPTION_REQUESTS.values():
      captions += 1
      assert gpt.count("nothing") == 4 - len(scene.events)
      assert all(f" {event.place}" in gpt for event in scene.events)
      continue
    (cue,) = re.findall("|".join(SHAPES + COLOURS), question)
    (event,) = (e for e in scene.events if cue in (e.shape, e.colour))
    assert gpt in (event.shape, event.colour, event.place)
    assert gpt != cue
  assert 15 < captions < 45, "half of them by default"


def test_stills_can_be_prepared_as_images(written):
  annotations = read_annotations(written)
  assert len(annotations) == 60
  assert {a.kind for a in annotations} == {"image"}
  for annotation in annotations:
    assert Path(written.parent / "pictures" / annotation.media).is_file()


def test_writing_again_changes_nothing_and_another_seed_everything(written, tmp_path):
  dialogues = Dialogues(conversations=2, turns=1)
  again = write_stills(tmp_path, 30, 3, dialogues)
  assert again.read_bytes() == written.read_bytes()
  name = "pictures/still-00007.png"
  assert (tmp_path / name).read_bytes() == (written.parent / name).read_bytes()
  write_stills(tmp_path, 30, 4, dialogues)
  before, after = (
    {p.read_bytes() for p in f.glob("pictures/*")} for f in (written.parent, tmp_path)
  )
  assert len(before) == 30
  assert before.isdisjoint(after)
