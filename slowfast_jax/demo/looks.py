# SPDX-License-Identifier: Apache-2.0
"""When the trained model looked: attention over time of every test answer, against the event."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from slowfast_jax.eval.results import PREDICTIONS
from slowfast_jax.eval.tasks import Doc, Task
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.video import ModelFrames, read_video


@dataclasses.dataclass(frozen=True)
class Look:
  """One test question, the model's answer, and where in the video its question looked.

  Attributes:
    doc: the question.
    reply, right: the answer of the slow-fast model.
    frames: what it saw.
    profile: what the answer owes to each frame, see `SlowAttention.profile`.
  """

  doc: Doc
  reply: str
  right: bool
  frames: ModelFrames
  profile: Float[np.ndarray, " F"]

  @property
  def hit(self) -> bool:
    """Whether the most attended frame shows what is asked about, or is the one beside it."""
    peak = int(np.argmax(self.profile))
    return any(abs(peak - frame) <= 1 for frame in self.event_frames)

  @property
  def event_frames(self) -> list[int]:
    """Frames that show one of the events that the question asks about."""
    return [
      i
      for i, time in enumerate(self.frames.timestamps)
      if any(start <= time < end for start, end in self.doc["windows"])
    ]


def read_predictions(folder: Path) -> dict[str, Mapping[str, Any]]:
  """The lines of an evaluation's predictions.jsonl by question."""
  lines = map(json.loads, (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines())
  return {line["id"]: line for line in lines if "id" in line}


def look_again(
  engine: Engine,
  task: Task,
  docs: Sequence[Doc],
  predictions: Mapping[str, Mapping[str, Any]],
  videos: Path,
  progress: Callable[[int, int], Any],
) -> Iterator[Look]:
  """Asks every question again and watches what its answer owes to each frame."""
  for done, doc in enumerate(docs, 1):
    line = predictions[task.doc_id(doc)]
    frames = read_video(videos / task.video(doc), engine.export)
    session = engine.encode(frames.images)
    ids = engine.prompt_ids(task.prompt(doc), session)
    profile = engine.slow_attention(ids, session).profile()
    yield Look(doc, line["reply"], line["answer"] == line["gold"], frames, profile)
    progress(done, len(docs))


def hit_rate(looks: Sequence[Look]) -> float:
  """Share of the right answers that came from the event; 0 where none is right."""
  right = [look for look in looks if look.right]
  return sum(look.hit for look in right) / len(right) if right else 0.0
