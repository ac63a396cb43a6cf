# SPDX-License-Identifier: Apache-2.0
"""The fields of a config's `train` section that the loop itself reads."""

import dataclasses

import ml_collections

from slowfast_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """What the loop does besides the steps.

  Attributes:
    steps: of the whole run.
    log_every: a line of metrics.jsonl and of telemetry.jsonl for every so many steps.
    checkpoint_every: a checkpoint after every so many steps.
    keep: so many of the newest checkpoints stay.
    keep_best: the best one stays too, by "loss" or by a metric of the evaluation; empty: none does.
    max_skipped: so many steps in a row may have a loss or gradient that is not finite.
    profile: the first step that is profiled, and how many are.
    hang_seconds: a step that takes longer writes its stacks down; 0: none does.
    trackers: programs that the numbers go to, with commas between.
    eval_every: an evaluation after every so many steps; 0: none. It is eval.every in a config.
  """

  steps: int
  log_every: int
  checkpoint_every: int
  keep: int
  keep_best: str
  max_skipped: int
  profile: tuple[int, int]
  hang_seconds: float
  trackers: str
  eval_every: int

  def __post_init__(self):
    least = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1}
    for name, bound in (least | dict.fromkeys(("max_skipped", "hang_seconds"), 0)).items():
      if getattr(self, name) < bound:
        raise UserError(f"train.{name} must be at least {bound}, got {getattr(self, name)}.")
    if self.eval_every < 0:
      raise UserError(f"eval.every must not be negative, got {self.eval_every}.")
    if len(self.profile) != 2 or min(self.profile) < 0:
      raise UserError(f"train.profile must be (first step, how many), got {self.profile}.")
    if self.keep_best not in ("", "loss") and not self.eval_every:
      raise UserError(
        f"train.keep_best={self.keep_best!r} is a metric of an evaluation, and eval.every is 0; "
        'set eval.every, or keep the best by "loss".'
      )


def options_of(config: ml_collections.ConfigDict) -> LoopOptions:
  """
  Raises:
    UserError: names the field with a value that makes no sense.
  """
  names = {field.name for field in dataclasses.fields(LoopOptions)} - {"profile", "eval_every"}
  return LoopOptions(
    **{name: config.train[name] for name in names},
    profile=tuple(config.train.profile),
    eval_every=config.eval.every,
  )
