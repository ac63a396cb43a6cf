# SPDX-License-Identifier: Apache-2.0
"""MLVU: 2,174 multiple choice questions of seven kinds on videos of minutes to hours."""

from collections.abc import Sequence
from typing import Any

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice, grouped
from slowfast_jax.eval.tasks.choices import unlettered
from slowfast_jax.eval.tasks.task import Doc, Prediction

_MARKERS = {f"({letter})": f"{letter}." for letter in "ABCD"}


class MLVU(MultipleChoice):
  """MLVU. The released tool averages over questions, the benchmark itself over kinds."""

  name = "mlvu"
  subset = "mlvu"
  fields = ("video_name", "question", "answer", "task_type")
  id_fields = ("video_name", "task_type")
  metric = "mlvu_percetion_score"
  groups = ("task_type",)

  def video(self, doc: Doc) -> str:
    return doc["video_name"]

  def prompt(self, doc: Doc) -> str:
    if self.upstream:
      return f"{doc['question']}\nOnly give the best option.\nBest option: ("
    stem, *options = _lines(doc)
    stem = stem if stem.endswith((".", "?")) else f"{stem}?"
    return "\n".join([HEAD, stem, *options, TAIL])

  def options(self, doc: Doc) -> list[str]:
    return [unlettered(option) for option in _lines(doc)[1:]]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.ranked_letter(reply, "ABCD") if self.upstream else extract.before_bracket(reply)

  def gold(self, doc: Doc) -> str:
    return doc["answer"]

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Adds the average that the tool does not take for its score."""
    other = "micro_average" if self.upstream else "macro_average"
    average = super().score if self.upstream else self._macro
    return {**super().aggregate(predictions), other: average(predictions)}

  def score(self, predictions: Sequence[Prediction]) -> float:
    return self._macro(predictions) if self.upstream else super().score(predictions)

  def strict(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The mean over kinds, as the benchmark defines its score."""
    parts = [
      super(MLVU, self).strict(part)[self.metric]
      for part in grouped(predictions, "task_type").values()
    ]
    micro = super().strict(predictions)
    return {
      self.metric: sum(parts) / len(parts),
      "micro_average": micro[self.metric],
      "unparsed": micro["unparsed"],
    }

  def _macro(self, predictions: Sequence[Prediction]) -> float:
    parts = [super(MLVU, self).score(p) for p in grouped(predictions, "task_type").values()]
    return sum(parts) / len(parts)


def _lines(doc: Doc) -> list[str]:
  """The stem, and up to four options as "A. text"."""
  stem, *options = [line for line in doc["question"].split("\n") if line][:5]
  lettered = []
  for option in options:
    marker = next((marker for marker in _MARKERS if marker in option), None)
    if marker is None:
      raise UserError(f"{doc['video_name']}: expected an option like (A) ..., got {option!r}.")
    lettered.append(option.replace(marker, _MARKERS[marker]))
  return [stem, *lettered]
