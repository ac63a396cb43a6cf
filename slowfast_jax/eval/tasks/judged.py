# SPDX-License-Identifier: Apache-2.0
"""Benchmarks whose scores need a language model as a judge, for all replies or for some.

Judging is a pass of its own over finished predictions, see `eval.judge`. The judge is asked in our
own words, and its scores have their own place in the results.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from slowfast_jax.eval.tasks.benchmark import Benchmark, grouped
from slowfast_jax.eval.tasks.task import Doc, Prediction


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a judge said of a reply.

  Attributes:
    right: whether the reply is right.
    score: how well it fits, 0 to 5; None where the benchmark does not ask.
  """

  right: bool
  score: int | None = None


class Judged(Benchmark):
  """A benchmark with a judge; without one, its rules alone decide."""

  def judge_prompt(self, doc: Doc, reply: str) -> str | None:
    """The question to the judge, or None where the benchmark's rules decide."""
    raise NotImplementedError

  def verdict(self, doc: Doc, text: str) -> Verdict | None:
    """What the judge said, or None where that cannot be read."""
    raise NotImplementedError

  def judged_metrics(
    self, predictions: Sequence[Prediction], verdicts: Mapping[str, Verdict]
  ) -> dict[str, Any]:
    """The benchmark's metrics, in percent.

    Args:
      predictions: of all questions.
      verdicts: by the question's id. What a judge was to decide and did not is wrong.
    """
    right = {self.doc_id(p.doc): self._judged_right(p, verdicts) for p in predictions}
    parts = {"avg": predictions, **grouped(predictions, self.groups[0])}
    return {
      f"{name}_accuracy": 100 * sum(right[self.doc_id(p.doc)] for p in part) / len(part)
      for name, part in parts.items()
    }

  def _judged_right(self, prediction: Prediction, verdicts: Mapping[str, Verdict]) -> bool:
    if prediction.error:
      return False
    if self.judge_prompt(prediction.doc, prediction.reply) is None:
      return self.is_right(prediction.doc, prediction.answer)
    verdict = verdicts.get(self.doc_id(prediction.doc))
    return verdict is not None and verdict.right


def judge_question(task: str, material: Mapping[str, str], form: str) -> str:
  """A question to a judge: what to do, what to look at, how to answer."""
  parts = (f"{name}: {text}" for name, text in material.items())
  return "\n".join([task, "", *parts, "", form])
