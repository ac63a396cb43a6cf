# SPDX-License-Identifier: Apache-2.0
"""NextQA, multiple choice: 8,564 questions of its test split on causes and order of actions."""

from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice, lettered
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.task import Doc

_OPTIONS = tuple(f"a{i}" for i in range(5))


class NextQA(MultipleChoice):
  """NextQA with five options."""

  name = "nextqa_mc"
  subset = "MC"
  fields = ("video", "question", *_OPTIONS, "answer")
  id_fields = ("video",)
  metric = "exact_match"
  scale = 1
  guesses = True

  def video(self, doc: Doc) -> str:
    return f"NExTVideo/{doc['video']}.mp4"

  def prompt(self, doc: Doc) -> str:
    question, options = doc["question"].strip(), lettered(self.options(doc))
    if self.upstream:  # Neither head nor tail.
      return f"{question}\n{options}"
    # "Why?" becomes "Why??": only a full stop is looked for.
    question = question if question.endswith(".") else f"{question}?"
    return f"{HEAD}\n{question}\n{options}\n{TAIL}"

  def options(self, doc: Doc) -> list[str]:
    return [doc[name].strip() for name in _OPTIONS]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.latest_choice(reply, self.options(doc))

  def gold(self, doc: Doc) -> str:
    return LETTERS[int(doc["answer"])]
