# SPDX-License-Identifier: Apache-2.0
"""PerceptionTest: about 19,100 questions of its validation split, with three options each."""

from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice, lettered
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.task import Doc


class PerceptionTest(MultipleChoice):
  """PerceptionTest."""

  name = "perceptiontest"
  subset = "mc_question_val"
  split = "validation"
  fields = ("video_name", "question", "question_id", "options", "answer_id", "area", "reasoning")
  id_fields = ("video_name", "question_id")
  metric = "accuracy"
  scale = 1
  groups = ("area", "reasoning")

  def video(self, doc: Doc) -> str:
    return f"videos/{doc['video_name']}.mp4"

  def prompt(self, doc: Doc) -> str:
    head = "" if self.upstream else f"{HEAD}\n"
    return f"{head}{doc['question']}\n{lettered(doc['options'])}\n{TAIL}"

  def options(self, doc: Doc) -> list[str]:
    return doc["options"]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.word_letter(reply)

  def gold(self, doc: Doc) -> str:
    return LETTERS[int(doc["answer_id"])]
