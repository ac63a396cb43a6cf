# SPDX-License-Identifier: Apache-2.0
"""EgoSchema: 5,031 questions whose answers only a server knows, and a subset of 500 with them."""

from collections.abc import Sequence
from typing import Any, ClassVar

from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice
from slowfast_jax.eval.tasks.choices import unlettered
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.task import Doc, Prediction


class EgoSchemaSubset(MultipleChoice):
  """The 500 questions whose answers are public."""

  name = "egoschema_subset"
  subset = "Subset"
  fields: ClassVar[tuple[str, ...]] = ("video_idx", "question", "option", "answer")
  id_fields = ("video_idx",)
  metric = "score"
  scale = 1
  guesses = True

  def video(self, doc: Doc) -> str:
    return f"videos/{doc['video_idx']}.mp4"

  def prompt(self, doc: Doc) -> str:
    options = "\n".join(doc["option"])
    if self.upstream:
      return f"{doc['question']}\n{options}\n{TAIL}"
    return f"{HEAD}\n{doc['question']}\nOptions:\n{options}\n{TAIL}"

  def options(self, doc: Doc) -> list[str]:
    return [unlettered(option) for option in doc["option"]]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.earliest_choice(reply, [option.strip() for option in doc["option"]])

  def gold(self, doc: Doc) -> str:
    return "" if doc["answer"] is None else LETTERS[int(doc["answer"])]

  def submission(self, predictions: Sequence[Prediction]) -> dict[str, int]:
    """The index of every video's answer, guesses included: the server wants them all."""
    return {p.doc["video_idx"]: LETTERS.index(p.answer or self.guess(p.doc)) for p in predictions}


class EgoSchema(EgoSchemaSubset):
  """All questions; the scores come from the benchmark's server, for submission.json."""

  name = "egoschema"
  subset = "GENERATION"
  fields = ("video_idx", "question", "option")

  def gold(self, doc: Doc) -> str:
    return ""

  def is_right(self, doc: Doc, answer: str) -> bool:
    return False

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """No score: see submission.json."""
    return {}
