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
    max_skipped: so many steps in a row may have a loss or gradient that is not finite.
  """

  steps: int
  log_every: int
  checkpoint_every: int
  keep: int
  max_skipped: int = 10

  def __post_init__(self):
    least = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1, "max_skipped": 0}
    for name, bound in least.items():
      if getattr(self, name) < bound:
        raise UserError(f"train.{name} must be at least {bound}, got {getattr(self, name)}.")


def options_of(config: ml_collections.ConfigDict) -> LoopOptions:
  """
  Raises:
    UserError: names the field with a value that makes no sense.
  """
  names = [field.name for field in dataclasses.fields(LoopOptions)]
  return LoopOptions(**{name: config.train[name] for name in names if name in config.train})
