# SPDX-License-Identifier: Apache-2.0
"""A training run from its first step, or from where it stopped, to its export.

All effects are here: devices, files, signals. What a run computes depends on its config alone, so
one that was killed and started again ends with the same parameters, bit for bit, as an unbroken
one.
"""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from slowfast_jax.checkpoints.store import Checkpoints, save_export
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch
from slowfast_jax.train.host import keep_freed_memory
from slowfast_jax.train.metrics import Recorder, Step, instrument
from slowfast_jax.train.optimizer import schedule
from slowfast_jax.train.setup import (
  Setup,
  check_batch,
  initial_state,
  num_params,
  open_setup,
  place_batch,
)
from slowfast_jax.train.step import TrainState, make_train_step

DONE, PREEMPTED = 0, 42

# Fields that a resumed run may change. Of the data, what they are counts, not where they lie.
MAY_CHANGE = (
  "train.steps", "train.log_every", "train.checkpoint_every", "train.keep", "train.remat",
  "mesh.", "data.records", "data.mixture", "data.tokenizer", "data.read_threads",
  "data.workers", "data.max_failure_rate",
)  # fmt: skip

# progress(done, total, text); say(line).
Progress = Callable[[int, int, str], Any]
Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class _Begin:
  """Where this process begins: steps that are done, the state, and the samples that failed."""

  step: int
  state: TrainState
  num_failures: int


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  progress: Progress | None = None,
  say: Say | None = None,
) -> int:
  """Trains, or goes on where the same command stopped.

  Args:
    config: see configs/demo.py.
    workdir: gets checkpoints/, metrics.jsonl and, at the end, export/.
    progress: is told of every step.
    say: is told what happens around the steps, a line each.

  Returns:
    0 when it is done, 42 when it was asked to stop (SIGTERM) and has saved.

  Raises:
    UserError: something that the user can mend, from a wrong field to a loss that is not finite.
  """
  keep_freed_memory()
  progress, say = progress or (lambda *_: None), say or (lambda _: None)
  folder = epath.Path(workdir).absolute()
  setup = open_setup(config)
  steps = config.train.steps
  folder.mkdir(parents=True, exist_ok=True)
  checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
  with contextlib.closing(checkpoints), Preemption() as preempted:
    begin = _restore_or_init(setup, checkpoints, say)
    state, code = begin.state, DONE
    if begin.step >= steps:
      progress(begin.step, steps, "")
    else:
      recorder = Recorder(
        folder / "metrics.jsonl",
        begin.step,
        config.train.log_every,
        config.data.batch_size,
        lambda step, text: progress(step, steps, text),
      )
      with contextlib.closing(recorder):
        state, code = _run_steps(setup, begin, checkpoints, recorder, preempted, say)
    if code == PREEMPTED:
      return code
    save_export(folder / "export", setup.export(state.params))
  say(f"exported to {folder / 'export'}")
  return DONE


def _run_steps(
  setup: Setup,
  begin: _Begin,
  checkpoints: Checkpoints,
  recorder: Recorder,
  preempted: "Preemption",
  say: Say,
) -> tuple[TrainState, int]:
  """Runs all steps that are left. Returns the state after them, and DONE or PREEMPTED."""
  state, steps, every = begin.state, setup.config.train.steps, setup.config.train.checkpoint_every
  batches = _batches(setup, begin.step, say)
  batch = next(batches)
  programs: dict[Any, Step] = {}  # One for each shape that steps have.
  programs[_shapes(batch)] = compile_step(setup, state, batch, say)
  recorder.start()
  for step in range(begin.step + 1, steps + 1):
    num_failures = begin.num_failures + setup.pipeline.num_failures
    if _shapes(batch) not in programs:
      programs[_shapes(batch)] = compile_step(setup, state, batch, say)
    state, metrics = programs[_shapes(batch)](state, batch)
    recorder.add(step, metrics, num_failures)  # Waits for the step before, not for this one.
    stop = preempted(step)
    if stop or step % every == 0 or step == steps:
      recorder.flush()  # A state whose loss is not finite must not be saved.
      checkpoints.save(step, state, run_facts(setup, num_failures))
    if stop:
      return state, PREEMPTED
    if step < steps:
      with recorder.waiting_for_data():
        batch = next(batches)
  return state, DONE


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def compile_step(setup: Setup, state: TrainState, batch: Batch, say: Say) -> Step:
  """The step as a program. Ahead of time, so that the first step takes as long as any other."""
  train = setup.config.train
  step = make_train_step(
    setup.model, setup.optimizer, dtype=jnp.dtype(train.dtype), remat=train.remat
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    instrument(step, schedule(setup.optimizer)),
    out_shardings=(shardings, NamedSharding(setup.mesh, PartitionSpec())),
    donate_argnums=0,
  )
  say("compiling")
  began = time.monotonic()
  with jax.set_mesh(setup.mesh):
    compiled = jitted.lower(state, batch).compile()
  say(f"compiled in {time.monotonic() - began:.1f} s")
  return compiled


def run_facts(setup: Setup, failed_samples: int) -> dict[str, Any]:
  """What a checkpoint says about its run."""
  return {
    "config": json.loads(json.dumps(setup.config.to_dict())),
    "data": setup.fingerprint,
    "failed_samples": failed_samples,
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


def _restore_or_init(setup: Setup, checkpoints: Checkpoints, say: Say) -> _Begin:
  abstract = setup.abstract_state()
  axes = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
  say(
    f"{num_params(abstract.params):,} parameters; {setup.pipeline.num_samples:,} samples an "
    f"epoch; {setup.mesh.size} {jax.devices()[0].device_kind}{axes and f' ({axes})'}"
  )
  now = run_facts(setup, 0)
  restored = checkpoints.restore(abstract, lambda run: check_unchanged(run, now))
  if restored is None:
    return _Begin(0, initial_state(setup), 0)
  say(f"resumed after step {restored.step}")
  return _Begin(restored.step, restored.state, restored.run["failed_samples"])


def _batches(setup: Setup, start: int, say: Say) -> Iterator[Batch]:
  """Batches on the devices. The first is checked, for it is there before anything is compiled."""
  for i, batch in enumerate(setup.pipeline.iterate(start)):
    if i == 0 and (problem := check_batch(batch, setup.pipeline)):
      say(problem)
    yield place_batch(batch, setup.mesh)


class Preemption:
  """Whether the machine is about to be taken away: after SIGTERM, on all processes alike."""

  def __init__(self):
    self._asked = False
    self._before: Any = None

  def __enter__(self) -> "Preemption":
    # With several processes JAX's own service hears the signal and makes all of them agree.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def __call__(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _ask(self, signum: int, frame: object) -> None:
    del signum, frame
    self._asked = True
