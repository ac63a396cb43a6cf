# SPDX-License-Identifier: Apache-2.0
"""TempCompass: five aspects of time, asked in four ways.

Rules read most replies; the tool has the rest judged, and here those are wrong until they are.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, grouped
from slowfast_jax.eval.tasks.choices import parse_choice, strict_choice, unlettered
from slowfast_jax.eval.tasks.judged import Judged, Verdict, judge_question
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.task import Doc, Prediction


class _TempCompass(Judged):
  """What the four parts share.

  Attributes:
    tail: what stands behind the question.
  """

  fields: ClassVar[tuple[str, ...]] = ("video_id", "question", "answer", "dim")
  id_fields = ("video_id", "dim")
  metric = "avg_accuracy"
  groups = ("dim",)
  tail: ClassVar[str]

  def video(self, doc: Doc) -> str:
    return f"videos/{doc['video_id']}.mp4"

  def prompt(self, doc: Doc) -> str:
    return f"{doc['question']}\n{self.tail}"

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    parts = {"avg": predictions, **grouped(predictions, "dim")}
    scores = {f"{name}_accuracy": self.score(part) for name, part in parts.items()}
    return {**scores, "strict": self.strict(predictions)}

  def judge_prompt(self, doc: Doc, reply: str) -> str | None:
    if self.parse(doc, reply):
      return None
    return judge_question(
      "Is the given answer to a question about a video right?",
      {
        "Question": doc["question"],
        "Right answer": doc["answer"],
        "Given answer": reply.strip(),
      },
      'Reply with one word: "Correct" or "Incorrect".',
    )

  def verdict(self, doc: Doc, text: str) -> Verdict | None:
    said = set(re.findall(r"\b(in)?correct\b", text.lower()))
    return Verdict(said == {""}) if len(said) == 1 else None


class MultiChoice(_TempCompass):
  """One of up to four lettered options."""

  name = "tempcompass_multi_choice"
  subset = "multi-choice"

  def prompt(self, doc: Doc) -> str:
    if self.upstream:
      return f"{doc['question']}\nPlease directly give the best option:"
    return f"{HEAD}\n{doc['question']}\n{TAIL}"

  def read(self, doc: Doc, reply: str) -> str:
    lettered = re.match(r"[A-D](?:\Z|[.)])", reply)
    return reply[0] if lettered or reply == doc["answer"] else ""

  def parse_strict(self, doc: Doc, reply: str) -> str:
    return strict_choice(reply, _options(doc["question"]))

  def gold(self, doc: Doc) -> str:
    return doc["answer"][0]


class YesNo(_TempCompass):
  """Yes or no."""

  name = "tempcompass_yes_no"
  subset = "yes_no"
  tail = "Please answer yes or no:"

  def read(self, doc: Doc, reply: str) -> str:
    """What it starts with: "nothing" is a no."""
    return next((word for word in ("yes", "no") if reply.lower().startswith(word)), "")

  def parse_strict(self, doc: Doc, reply: str) -> str:
    found = re.match(r"\W*(yes|no)\b", reply.lower())
    return found[1] if found else ""

  def gold(self, doc: Doc) -> str:
    return doc["answer"]


class CaptionMatching(_TempCompass):
  """One of several captions, each a line "Caption A: text"; answers are the A."""

  name = "tempcompass_caption_matching"
  subset = "caption_matching"
  tail = "Please directly give the best option:"

  def read(self, doc: Doc, reply: str) -> str:
    """The option whose line, text, label or index the whole reply is."""
    behind = reply.split(") ")[1] if ") " in reply else None
    bare = reply.replace(".", "")
    found = ""
    for label, text in _captions(doc):
      index = label.split()[-1]
      words = text in (reply, behind) or reply == f"{label}: {text}"
      if words or {reply, bare} & {label, index}:
        found = index
    return found

  def parse_strict(self, doc: Doc, reply: str) -> str:
    """Also a reply that begins with a label, or names one text only."""
    captions = _captions(doc)
    begun = [label for label, _ in captions if re.match(rf"\W*{re.escape(label)}\b", reply)]
    letter = strict_choice(reply, [text for _, text in captions])
    if not begun and letter:
      begun = [captions[LETTERS.index(letter)][0]]
    return self.parse(doc, reply) or (begun[0].split()[-1] if begun else "")

  def gold(self, doc: Doc) -> str:
    return doc["answer"].split(": ")[0].split()[-1]


class Captioning(_TempCompass):
  """A description, from which the judge is to answer a question."""

  name = "tempcompass_captioning"
  subset = "captioning"
  fields = ("video_id", "question", "mc_question", "mc_answer", "dim")
  metric = "named_option_proxy"

  def prompt(self, doc: Doc) -> str:
    return doc["question"]

  def read(self, doc: Doc, reply: str) -> str:
    """Without a judge: the one option that the description names."""
    return parse_choice(reply, _options(doc["mc_question"]))

  def parse_strict(self, doc: Doc, reply: str) -> str:
    return self.parse(doc, reply)

  def gold(self, doc: Doc) -> str:
    return doc["mc_answer"][0]

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What can be said without a judge, under a name of its own."""
    parts = {self.metric: self.score(predictions)}
    return {**parts, "by_dim": self._by("dim", predictions)}

  def judge_prompt(self, doc: Doc, reply: str) -> str:
    return judge_question(
      "Answer a question about a video from nothing but its description.",
      {"Description": reply.strip(), "Question": doc["mc_question"]},
      'Reply with the letter of the option, or with "None" if the description fits none of them.',
    )

  def verdict(self, doc: Doc, text: str) -> Verdict | None:
    if not text.strip():
      return None
    return Verdict(strict_choice(text, _options(doc["mc_question"])) == self.gold(doc))


def _options(question: str) -> list[str]:
  """The texts of the lines "A. text" of a question."""
  return [unlettered(line) for line in question.split("\n")[1:] if re.match(r"\W?[A-Z][.)]", line)]


def _captions(doc: Doc) -> list[tuple[str, str]]:
  """(label, text) of the question's options."""
  lines = (line.partition(": ") for line in doc["question"].split("\n")[1:])
  return [(label, text) for label, colon, text in lines if colon]
