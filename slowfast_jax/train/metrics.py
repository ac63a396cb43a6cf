# SPDX-License-Identifier: Apache-2.0
"""What a run tells about itself: metrics of the step, and metrics.jsonl.

Every line belongs to one step and has that step's own values, not means of several: after a crash
a resumed run writes exactly the lines that an unbroken one would have written.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from slowfast_jax.checkpoints.store import flatten
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch
from slowfast_jax.train.step import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def instrument(step: Step, schedule: optax.Schedule) -> Step:
  """The step with its learning rate and the gates of its hybrid layers among the metrics."""

  def instrumented(state: TrainState, batch: Batch):
    metrics = {"learning_rate": jnp.asarray(schedule(state.step), jnp.float32)}
    warm_up = flatten(state.params).get("adapters.warm_up")
    if warm_up is not None:
      metrics["gates"] = jnp.tanh(warm_up)[:, 0]
    state, more = step(state, batch)
    return state, more | metrics

  return instrumented


class Recorder:
  """Reads the metrics of each step one step late, so that the device never waits for the host.

  Args:
    file: metrics.jsonl.
    step: steps that were done before; later lines of the file are dropped.
    log_every: a line for every so many steps.
    batch_size: samples of a step.
    show: is called after every step as show(step, text).
  """

  def __init__(
    self,
    file: epath.Path,
    step: int,
    log_every: int,
    batch_size: int,
    show: Callable[[int, str], None],
  ):
    self._step, self._log_every, self._batch_size, self._show = step, log_every, batch_size, show
    self._pending: tuple[int, dict[str, jax.Array], int] | None = None
    self._file = _open_after(file, step) if jax.process_index() == 0 else None

  def start(self) -> None:
    """Starts the clock: what came before, compiling above all, belongs to no step."""
    self._since, self._stalled = time.monotonic(), 0.0
    self._show(self._step, "")

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts the seconds inside as a stall of the data."""
    began = time.monotonic()
    yield
    self._stalled += time.monotonic() - began

  def add(self, step: int, metrics: dict[str, jax.Array], num_failures: int) -> None:
    """Tells of a step that was dispatched, and reads the one before it.

    Args:
      step: its number, from 1.
      metrics: still being computed.
      num_failures: samples so far that could not be used.
    """
    self.flush()
    self._pending = (step, metrics, num_failures)

  def flush(self) -> None:
    """Waits for the last step that was added.

    Raises:
      UserError: its loss or gradient is not finite.
    """
    if self._pending is None:
      return
    step, metrics, num_failures = self._pending
    self._pending = None
    read = jax.device_get(metrics)
    values = {name: read[name].tolist() for name in ("loss", "token_accuracy", *read)}
    _check_finite(step, values)
    if step % self._log_every == 0:
      self._write({"step": step} | values | self._timing(step) | {"failed_samples": num_failures})
    text = f"loss {values['loss']:.4f}, accuracy {values['token_accuracy']:.3f}"
    self._show(step, text + (f", {num_failures} samples failed" if num_failures else ""))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()

  def _timing(self, step: int) -> dict[str, float]:
    """Means over the steps since the last line."""
    now, count = time.monotonic(), step - self._step
    seconds, stalled = (now - self._since) / count, self._stalled / count
    self._step, self._since, self._stalled = step, now, 0.0
    return {
      "step_seconds": round(seconds, 6),
      "samples_per_second": round(self._batch_size / seconds, 3),
      "data_stall_seconds": round(stalled, 6),
    }

  def _write(self, line: dict[str, Any]) -> None:
    if self._file is not None:
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()


def read_metrics(file: epath.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last one that a killed run left half written is left out."""
  if not file.exists():
    return []
  lines = []
  for line in file.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except ValueError:
      break
  return lines


def _open_after(file: epath.Path, step: int):
  """Opens the file for appending, without the lines of later steps."""
  kept = [line for line in read_metrics(file) if line["step"] <= step]
  new = file.with_name(file.name + ".new")
  new.write_text("".join(json.dumps(line) + "\n" for line in kept))
  new.replace(file)
  return file.open("a")


def _check_finite(step: int, values: dict[str, Any]) -> None:
  bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
  if bad:
    raise UserError(
      f"step {step}: {bad[0]} is {values[bad[0]]}, so the run has diverged; lower "
      "optimizer.learning_rate or optimizer.max_grad_norm, or raise optimizer.warmup_steps, and "
      "begin in another --workdir."
    )
