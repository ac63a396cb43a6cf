# SPDX-License-Identifier: Apache-2.0
"""Where a run begins: at a fresh state, or at the newest checkpoint if that is of the same run."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax

from slowfast_jax.checkpoints.store import Checkpoints
from slowfast_jax.errors import UserError
from slowfast_jax.train.setup import Setup, initial_state, num_params
from slowfast_jax.train.step import TrainState

# Fields that a resumed run may change. Of the data, what they are counts, not where they lie.
MAY_CHANGE = (
  "train.steps", "train.log_every", "train.checkpoint_every", "train.keep", "train.remat",
  "train.frame_chunk", "train.compiler_options", "train.max_skipped", "train.keep_best",
  "train.trackers", "train.profile", "train.hang_seconds", "eval.", "mesh.",
  "data.records", "data.mixture", "data.tokenizer", "data.read_threads", "data.workers",
  "data.max_failure_rate",
)  # fmt: skip

Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a run counts from its first step on, whatever interrupts it.

  Attributes:
    failed_samples: could not be used, of all processes.
    skipped_steps: left the parameters alone, for their loss or gradient was not finite.
    skipped_in_a_row: of these, how many the newest steps are.
  """

  failed_samples: int = 0
  skipped_steps: int = 0
  skipped_in_a_row: int = 0


@dataclasses.dataclass(frozen=True)
class Begin:
  """Where a process begins: steps that are done, the state after them, and what was counted."""

  step: int
  state: TrainState
  counts: Counts


def restore_or_init(
  setup: Setup, checkpoints: Checkpoints, say: Say, only: int | None = None
) -> Begin:
  """The newest state of the workdir, or that of step 0; or the state of the step `only`.

  Raises:
    UserError: the workdir has the checkpoints of another run, or none of them can be read.
  """
  abstract = setup.abstract_state()
  axes = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
  say(
    f"{num_params(abstract.params):,} parameters; {setup.pipeline.num_samples:,} samples an "
    f"epoch; {setup.mesh.size} {jax.devices()[0].device_kind}{axes and f' ({axes})'}"
  )
  now = run_facts(setup, Counts())
  restored = checkpoints.restore(abstract, lambda run: check_unchanged(run, now), only)
  if restored is None:
    return Begin(0, initial_state(setup), Counts())
  say(f"resumed after step {restored.step}")
  known = {field.name for field in dataclasses.fields(Counts)}
  counts = Counts(**{name: value for name, value in restored.run.items() if name in known})
  return Begin(restored.step, restored.state, counts)


def run_facts(setup: Setup, counts: Counts) -> dict[str, Any]:
  """What a checkpoint says about its run."""
  return {
    "config": json.loads(json.dumps(setup.config.to_dict())),
    "data": setup.fingerprint,
    **dataclasses.asdict(counts),
  }


def check_unchanged(saved: dict[str, Any], now: dict[str, Any]) -> None:
  """A resumed run must be the run that was interrupted.

  Raises:
    UserError: names every field that is another one now.
  """
  fields = {"config": "", "data": "the data's "}
  changes = []
  for part, prefix in fields.items():
    before, after = _leaves(saved.get(part, {})), _leaves(now[part])
    for name in sorted(before | after):
      if part == "config" and name.startswith(MAY_CHANGE):
        continue
      if before.get(name) != after.get(name):
        changes.append(f"{prefix}{name}: {before.get(name)!r} -> {after.get(name)!r}")
  if changes:
    raise UserError(
      f"The checkpoint in this workdir belongs to another run ({'; '.join(changes)}). "
      "Take these fields back, or give another --workdir."
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    nested = isinstance(value, dict)
    leaves |= _leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
  return leaves
