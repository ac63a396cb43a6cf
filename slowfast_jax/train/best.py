# SPDX-License-Identifier: Apache-2.0
"""The scores of a run's checkpoints, in WORKDIR/best.json: by which the best one is kept."""

import json
from collections.abc import Iterable, Mapping

import jax
from etils import epath

from slowfast_jax.checkpoints.store import best_of
from slowfast_jax.files import replace_json

LOSS = "loss"


class Scores(dict[int, float]):
  """Scores by step, higher is better. Those by another metric than `by` are forgotten.

  Args:
    file: best.json.
    by: "loss", or a metric of the evaluation.
  """

  def __init__(self, file: epath.Path, by: str):
    super().__init__()
    self._file, self._by = file, by
    if by and file.exists():
      stored = json.loads(file.read_text())
      if stored["by"] == by:
        self.update({int(step): score for step, score in stored["scores"].items()})

  def rate(self, step: int, metrics: Mapping[str, float], steps: Iterable[int]) -> None:
    """Notes the score of a checkpoint, if these metrics have it.

    Args:
      step: of the checkpoint.
      metrics: of the step or of an evaluation.
      steps: of which there are checkpoints.
    """
    if not self._by or metrics.get(self._by) is None:
      return
    self[step] = -metrics[LOSS] if self._by == LOSS else metrics[self._by]
    if jax.process_index() == 0:
      best = best_of(self, [*steps, step])
      kept = {str(one): self[one] for one in sorted({*steps, step}) if one in self}
      replace_json(self._file, {"by": self._by, "best": best, "scores": kept})
