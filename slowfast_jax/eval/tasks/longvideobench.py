# SPDX-License-Identifier: Apache-2.0
"""LongVideoBench: 1,337 questions of its validation split, on videos without their subtitles."""

from collections.abc import Sequence

from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice, lettered
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.task import Doc, Prediction

_OPTIONS = tuple(f"option{i}" for i in range(5))


class LongVideoBench(MultipleChoice):
  """LongVideoBench."""

  name = "longvideobench"
  subset = "lvb_val"
  split = "validation"
  fields = (
    *("video_id", "video_path", "question", "correct_choice"),
    *("duration_group", "question_category", "option0", "option1"),
  )
  id_fields = ("video_id",)
  metric = "lvb_acc"
  scale = 1
  groups = ("duration_group", "question_category")
  guesses = True

  def video(self, doc: Doc) -> str:
    return f"videos/{doc['video_path']}"

  def prompt(self, doc: Doc) -> str:
    head = "" if self.upstream else f"{HEAD}\n"
    return f"{head}{doc['question']}\n{lettered(self.options(doc))}\n{TAIL}\n"

  def options(self, doc: Doc) -> list[str]:
    """Those that are not "N/A"."""
    return [doc[name] for name in _OPTIONS if doc.get(name) not in (None, "N/A")]

  def read(self, doc: Doc, reply: str) -> str:
    if self.upstream:
      return extract.mended_capital(reply)
    return extract.latest_choice(reply, self.options(doc))

  def gold(self, doc: Doc) -> str:
    return LETTERS[int(doc["correct_choice"])]

  def score(self, predictions: Sequence[Prediction]) -> float:
    return round(super().score(predictions), 5)
