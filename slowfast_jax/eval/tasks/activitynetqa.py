# SPDX-License-Identifier: Apache-2.0
"""ActivityNetQA: 8,000 questions that are answered in a word or a phrase, and judged."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slowfast_jax.eval.tasks.judged import Judged, Verdict, judge_question
from slowfast_jax.eval.tasks.task import Doc, Prediction

_ARTICLES = ("a", "an", "the")


class ActivityNetQA(Judged):
  """ActivityNetQA. Without a judge, replies are compared with the answer word by word."""

  name = "activitynetqa"
  subset = "activitynetqa"
  fields = ("video_name", "question", "question_id", "answer", "type")
  id_fields = ("question_id",)
  metric = "exact_match_proxy"
  groups = ("type",)

  def video(self, doc: Doc) -> str:
    return f"all_test/v_{doc['video_name']}.mp4"

  def prompt(self, doc: Doc) -> str:
    # Also lower-cases all but the first letter, names included.
    question = doc["question"].capitalize()
    return f"{question}? Answer the question using a single word or phrase."

  def read(self, doc: Doc, reply: str) -> str:
    return reply

  def parse_strict(self, doc: Doc, reply: str) -> str:
    return reply.strip()

  def gold(self, doc: Doc) -> str:
    return doc["answer"]

  def is_right(self, doc: Doc, answer: str) -> bool:
    return _words(answer) == _words(doc["answer"])

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What can be said without a judge, under names of its own."""
    contained = [f" {_words(p.doc['answer'])} " in f" {_words(p.answer)} " for p in predictions]
    proxies = super().aggregate(predictions)
    del proxies["strict"]  # There is only one way to read these replies.
    return {**proxies, "contains_proxy": 100 * sum(contained) / len(contained)}

  def judge_prompt(self, doc: Doc, reply: str) -> str:
    return judge_question(
      "Does the given answer to a question about a video mean the same as the right answer? Other "
      "words for the same thing count as the same.",
      {"Question": doc["question"], "Right answer": doc["answer"], "Given answer": reply.strip()},
      'Reply with nothing but JSON: {"same": "yes" or "no", "score": 0 (far off) to 5 (the same)}',
    )

  def verdict(self, doc: Doc, text: str) -> Verdict | None:
    found = re.search(r"\{.*?\}", text, re.DOTALL)
    try:
      said = json.loads(found[0]) if found else {}
      return Verdict(str(said["same"]).lower() == "yes", int(said["score"]))
    except (ValueError, KeyError, TypeError):
      return None

  def judged_metrics(
    self, predictions: Sequence[Prediction], verdicts: Mapping[str, Verdict]
  ) -> dict[str, Any]:
    """The share of right answers in percent, and the mean score, 0 to 5."""
    found = [verdicts.get(self.doc_id(p.doc)) for p in predictions]
    scores = [verdict.score or 0 for verdict in found if verdict]
    right = sum(verdict.right for verdict in found if verdict)
    return {"accuracy": 100 * right / len(found), "score": sum(scores) / len(found)}


def _words(text: str) -> str:
  return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES)
