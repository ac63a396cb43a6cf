# SPDX-License-Identifier: Apache-2.0
"""What the public benchmarks have in common: a release to read, options, and two scores.

The prompt set "paper" is the released evaluation of slow-fast models, whose scores the paper
prints; "upstream" is lmms-eval 0.7.3. Both are followed to the byte, in prompts and in scores.
"""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks.choices import strict_choice
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.release import read_release, unique_ids
from slowfast_jax.eval.tasks.task import Doc, Prediction

PROMPT_SETS = ("paper", "upstream")
HEAD = "Select the best answer to the following multiple-choice question based on the video."
TAIL = "Answer with the option's letter from the given choices directly."


class Benchmark:
  """A public benchmark.

  Attributes:
    name: of the task.
    subset, split: which part of the release.
    fields: what a row of the release must have.
    id_fields: fields that name a question.
    metric: how the tool names the score.
    scale: 100 where that is a percentage, 1 where it is a fraction.
    groups: fields that the score is also given by.
  """

  name: str
  subset: ClassVar[str]
  split: ClassVar[str] = "test"
  fields: ClassVar[tuple[str, ...]]
  id_fields: ClassVar[tuple[str, ...]]
  metric: str
  scale: ClassVar[int] = 100
  groups: tuple[str, ...] = ()

  def __init__(self, prompt_set: str = "paper"):
    if prompt_set not in PROMPT_SETS:
      raise UserError(f"Task {self.name} has the prompt sets {PROMPT_SETS}, got {prompt_set!r}.")
    self.prompt_set = prompt_set

  @property
  def upstream(self) -> bool:
    return self.prompt_set == "upstream"

  def docs(self, questions: str, videos: str = "") -> list[Doc]:
    """Reads the release.

    Raises:
      UserError: it is not there, or not as it was published.
    """
    rows = read_release(questions, self.subset, self.split, self.fields)
    ids = unique_ids(rows, self.id_fields)
    return [{**row, "doc_id": doc_id} for row, doc_id in zip(rows, ids)]

  def doc_id(self, doc: Doc) -> str:
    """Of a question that `docs` did not read, the one it would have without its neighbours."""
    return doc.get("doc_id") or unique_ids([doc], self.id_fields)[0]

  def video(self, doc: Doc) -> str:
    raise NotImplementedError

  def prompt(self, doc: Doc) -> str:
    raise NotImplementedError

  def read(self, doc: Doc, reply: str) -> str:
    """What the tool reads from a reply without space around it."""
    raise NotImplementedError

  def parse(self, doc: Doc, reply: str) -> str:
    """What the tool reads from a reply; "" where it reads nothing, or guesses."""
    # Today's tool stops generating at an empty line.
    reply = reply.strip().split("\n\n")[0] if self.upstream else reply
    return self.read(doc, reply.strip())

  def parse_strict(self, doc: Doc, reply: str) -> str:
    raise NotImplementedError

  def is_parsed(self, doc: Doc, answer: str) -> bool:
    return bool(answer)

  def gold(self, doc: Doc) -> str:
    raise NotImplementedError

  def is_right(self, doc: Doc, answer: str) -> bool:
    return answer == self.gold(doc)

  def submission(self, predictions: Sequence[Prediction]) -> Any | None:
    """None: scores are computed here."""
    return None

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The score as the tool computes it, that by group, and the strict one beside them."""
    return {
      self.metric: self.score(predictions),
      **{f"by_{group}": self._by(group, predictions) for group in self.groups},
      "strict": self.strict(predictions),
    }

  def score(self, predictions: Sequence[Prediction]) -> float:
    """The score as the tool computes it."""
    right = [not p.error and self.is_right(p.doc, p.answer) for p in predictions]
    return self.scale * sum(right) / len(right)

  def strict(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The score in the same unit, of all questions and from what replies clearly say."""
    answers = [self.parse_strict(p.doc, p.reply) for p in predictions]
    right = [bool(a) and self.is_right(p.doc, a) for a, p in zip(answers, predictions)]
    unparsed = sum(not answer and not p.error for answer, p in zip(answers, predictions))
    return {self.metric: self.scale * sum(right) / len(right), "unparsed": unparsed}

  def _by(self, group: str, predictions: Sequence[Prediction]) -> dict[str, float]:
    return {k: self.score(part) for k, part in grouped(predictions, group).items()}


class MultipleChoice(Benchmark):
  """Questions with lettered options.

  Attributes:
    guesses: where the tool reads nothing, it takes a letter at random. Here the question chooses
      the letter, so that the same replies have the same score.
  """

  guesses: ClassVar[bool] = False

  def options(self, doc: Doc) -> list[str]:
    """The options' texts, without letters."""
    raise NotImplementedError

  def parse_strict(self, doc: Doc, reply: str) -> str:
    return strict_choice(reply, self.options(doc))

  def is_parsed(self, doc: Doc, answer: str) -> bool:
    return answer != "" and answer in LETTERS[: len(self.options(doc))]

  def is_right(self, doc: Doc, answer: str) -> bool:
    return (answer or self.guess(doc)) == self.gold(doc)

  def guess(self, doc: Doc) -> str:
    """What the tool takes where it reads nothing."""
    if not self.guesses:
      return ""
    return random.Random(self.doc_id(doc)).choice(LETTERS[: len(self.options(doc))])


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
  """Options line by line, "A. text"."""
  return "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options))


def grouped(predictions: Sequence[Prediction], field: str) -> dict[str, list[Prediction]]:
  """Predictions by a field of their questions, in the order in which its values come."""
  groups: dict[str, list[Prediction]] = {}
  for prediction in predictions:
    groups.setdefault(str(prediction.doc[field]), []).append(prediction)
  return groups
