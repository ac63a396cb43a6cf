# SPDX-License-Identifier: Apache-2.0
"""Still pictures of the demo's little world, for the stages before there is any video.

A still shows one to four of the shapes at once, under any light. From stills the vision encoder
learns words for what it sees, and the language model learns to find what it is asked about; both
would come with pretrained weights in a real run.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from slowfast_jax.demo.questions import Dialogues, conversation
from slowfast_jax.demo.scenes import (
  COLOURS,
  PLACES,
  SHAPES,
  Geometry,
  Scene,
  make_scene,
  place_event,
  render_moment,
)

# Places twice: where a thing is takes longer to learn than what it is.
KINDS = ("colour", "shape", "place", "place")
# Seeds far from those of every video split.
_FIRST_SEED = 10**9


def make_still(seed: int, size: int = 96) -> tuple[Scene, UInt8[np.ndarray, "h w 3"]]:
  """A scene whose shapes all stand there at once, and its picture at some moment of its day."""
  rng = np.random.default_rng(_FIRST_SEED + seed)
  scene = make_scene(_FIRST_SEED + seed, Geometry(), size)
  count = int(rng.integers(1, len(SHAPES) + 1))
  looks = zip(rng.permutation(SHAPES), rng.permutation(COLOURS), rng.permutation(len(PLACES)))
  frame = int(rng.integers(scene.total_frames))
  moment = ((frame - 0.5) / scene.fps, (frame + 0.5) / scene.fps)
  events = tuple(
    place_event(rng, str(shape), str(colour), int(place), moment, size)
    for shape, colour, place in list(looks)[:count]
  )
  scene = dataclasses.replace(scene, events=events)
  return scene, render_moment(scene, frame)


def regions(scene: Scene) -> list[list[str]]:
  """The words that describe each quadrant of a still, row by row."""
  words: list[list[str]] = [[] for _ in PLACES]
  for event in scene.events:
    words[PLACES.index(event.place)] = [event.colour, event.shape, event.place]
  return words


def write_stills(folder: str | os.PathLike, count: int, seed: int, dialogues: Dialogues) -> Path:
  """Writes pictures/ and stills.json, LLaVA-style annotations with a `regions` field each.

  Returns:
    The annotations.
  """
  root = Path(folder)
  (root / "pictures").mkdir(parents=True, exist_ok=True)
  entries = []
  for i in range(count):
    name = f"still-{i:05d}.png"
    scene, picture = make_still(seed * count + i)
    # Fast to write and exact: the JPEG comes when the records are made.
    Image.fromarray(picture).save(root / "pictures" / name, compress_level=1)
    rng = np.random.default_rng((seed, i))
    entries += [
      {
        "id": f"still-{i:05d}-{j}",
        "image": name,
        "conversations": conversation(rng, scene, dialogues, KINDS),
        "regions": regions(scene),
      }
      for j in range(dialogues.conversations)
    ]
  path = root / "stills.json"
  path.write_text(json.dumps(entries), encoding="utf-8")
  return path
