# SPDX-License-Identifier: Apache-2.0
"""What a run learns of its steps: metrics that the device computes, and metrics.jsonl.

Every line belongs to one step and has that step's own values, not means of several, and nothing of
the clock: after a crash a resumed run writes exactly the lines that an unbroken one would have
written. What the clock says is in telemetry.jsonl.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slowfast_jax.checkpoints.store import flatten
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import SlowFastConfig
from slowfast_jax.shapes import Batch
from slowfast_jax.train.lines import LineFile
from slowfast_jax.train.optimizer import OptimizerConfig, learning_rate
from slowfast_jax.train.resume import Counts
from slowfast_jax.train.step import TrainState
from slowfast_jax.train.telemetry import Telemetry

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def instrument(step: Step, model: SlowFastConfig, optimizer: OptimizerConfig) -> Step:
  """The step with its learning rate, gates of its hybrid layers and size among the metrics."""

  def instrumented(state: TrainState, batch: Batch):
    metrics = {"learning_rate": learning_rate(optimizer, state.opt_state)} | _size(batch)
    warm_up = flatten(state.params).get("adapters.warm_up")
    if warm_up is not None and model.hybrid is not None:
      metrics["gates"] = model.hybrid.warm_up_factor(warm_up)[:, 0]
    state, more = step(state, batch)
    return state, more | metrics

  return instrumented


def _size(batch: Batch) -> dict[str, jax.Array]:
  """What a batch holds; padding does not count."""
  return {
    "samples": jnp.sum(jnp.max(batch.segments, axis=1)),
    "tokens": jnp.sum(batch.segments > 0),
    "frames": jnp.sum(batch.frame_segments > 0),
  }


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A step that was dispatched and whose metrics are still being computed."""

  step: int
  metrics: dict[str, jax.Array]
  failed_samples: int
  flops: float


class Recorder:
  """Reads the metrics of each step one step late, so that the device never waits for the host.

  Args:
    file: metrics.jsonl.
    counts: of the steps that were done before.
    log_every: a line for every so many steps.
    max_skipped: so many steps in a row may be skipped.
    telemetry: is told of every step.
    show: is called after every step as show(step, text).
    blame: is given the step that ends the run, and returns words about its records.
  """

  def __init__(
    self,
    file: LineFile,
    counts: Counts,
    log_every: int,
    max_skipped: int,
    telemetry: Telemetry,
    show: Callable[[int, str], Any],
    blame: Callable[[int], str],
  ):
    self._file, self._log_every, self._max_skipped = file, log_every, max_skipped
    self._telemetry, self._show, self._blame = telemetry, show, blame
    self._pending: _Pending | None = None
    self.counts = counts
    self.latest: dict[str, Any] = {}  # Metrics of the newest step that was read.

  def add(
    self, step: int, metrics: dict[str, jax.Array], failed_samples: int, flops: float
  ) -> None:
    """Tells of a step that was dispatched, and reads the one before it.

    Args:
      step: its number, from 1.
      metrics: still being computed.
      failed_samples: so far.
      flops: of the step.
    """
    self.flush()
    self._pending = _Pending(step, metrics, failed_samples, flops)

  def flush(self) -> None:
    """Waits for the last step that was added.

    Raises:
      UserError: too many steps in a row were skipped.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    read = jax.device_get(pending.metrics)
    values = {name: read[name].tolist() for name in ("loss", "token_accuracy", *read)}
    self._count(pending, values)
    self.latest = values
    self._telemetry.count(values, pending.flops)
    if pending.step % self._log_every == 0:
      counts = {name: n for name, n in dataclasses.asdict(self.counts).items() if "row" not in name}
      line = {"step": pending.step} | values | counts
      self._file.write(line)
      self._telemetry.write(pending.step, line)
    self._show(pending.step, self._text(values))

  def _count(self, pending: _Pending, values: dict[str, Any]) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    before = self.counts
    self.counts = Counts(
      pending.failed_samples,
      before.skipped_steps + bool(bad),
      before.skipped_in_a_row + 1 if bad else 0,
    )
    if self.counts.skipped_in_a_row > self._max_skipped:
      raise UserError(
        f"step {pending.step}: {bad[0]} is {values[bad[0]]}, "
        f"{self.counts.skipped_in_a_row} steps in a row by now (train.max_skipped is "
        f"{self._max_skipped}), so the run has diverged; lower optimizer.learning_rate or "
        "optimizer.max_grad_norm, or raise optimizer.warmup_steps, and begin in another --workdir. "
        f"{self._blame(pending.step)}"
      )

  def _text(self, values: dict[str, Any]) -> str:
    words = [f"loss {values['loss']:.4f}", f"accuracy {values['token_accuracy']:.3f}"]
    if self.counts.failed_samples:
      words.append(f"{self.counts.failed_samples} samples failed")
    if self.counts.skipped_steps:
      words.append(f"{self.counts.skipped_steps} steps skipped")
    return ", ".join(words)
