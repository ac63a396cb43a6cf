# SPDX-License-Identifier: Apache-2.0
"""A training run from its first step, or from where it stopped, to its export.

All effects are here: devices, files, signals. What a run computes depends on its config alone, so
one that was killed and started again ends with the same parameters, bit for bit, as an unbroken
one.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
from etils import epath

from slowfast_jax.checkpoints.store import Checkpoints, save_export
from slowfast_jax.distributed import sum_over_processes
from slowfast_jax.shapes import Batch
from slowfast_jax.train.host import keep_freed_memory
from slowfast_jax.train.lines import LineFile
from slowfast_jax.train.metrics import Recorder
from slowfast_jax.train.options import LoopOptions, options_of
from slowfast_jax.train.preemption import PREEMPTED, Preemption
from slowfast_jax.train.program import (
  Program,
  Shapes,
  compile_step,
  compile_steps,
  shapes_of,
)
from slowfast_jax.train.resume import MAY_CHANGE, Begin, Counts, restore_or_init, run_facts
from slowfast_jax.train.setup import Setup, check_batch, open_setup, place_batch
from slowfast_jax.train.step import TrainState
from slowfast_jax.train.telemetry import Telemetry

__all__ = ["DONE", "MAY_CHANGE", "PREEMPTED", "compile_step", "train"]

DONE = 0

# progress(done, total, text); say(line).
Progress = Callable[[int, int, str], Any]
Say = Callable[[str], Any]


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  progress: Progress | None = None,
  say: Say | None = None,
) -> int:
  """Trains, or goes on where the same command stopped.

  Args:
    config: see configs/demo.py.
    workdir: gets checkpoints/, metrics.jsonl, telemetry.jsonl and, at the end, export/.
    progress: is told of every step.
    say: is told what happens around the steps, a line each.

  Returns:
    0 when it is done, 42 when it was asked to stop (SIGTERM) and has saved. Asked while there is
    nothing new to save, the whole process leaves with 42 at once.

  Raises:
    UserError: something that the user can mend, from a wrong field to a loss that is not finite.
  """
  keep_freed_memory()
  progress, say = progress or (lambda *_: None), say or (lambda _: None)
  folder = epath.Path(workdir).absolute()
  options = options_of(config)
  with Preemption(say) as preemption, contextlib.ExitStack() as stack:
    with preemption.nothing_to_lose():
      setup = open_setup(config)
      folder.mkdir(parents=True, exist_ok=True)
      checkpoints = Checkpoints(folder / "checkpoints", options.keep)
      stack.enter_context(contextlib.closing(checkpoints))
      begin = restore_or_init(setup, checkpoints, say)
      if begin.step < options.steps:
        run = _Run.prepare(setup, options, folder, begin, checkpoints, preemption, say)
    progress(begin.step, options.steps, "")
    state = begin.state
    if begin.step < options.steps:
      with contextlib.closing(run):
        state, code = run.steps(lambda step, text: progress(step, options.steps, text))
      if code == PREEMPTED:
        return code
    checkpoints.wait()
    with preemption.nothing_to_lose():
      save_export(folder / "export", setup.export(state.params))
      say(f"exported to {folder / 'export'}")
  return DONE


@dataclasses.dataclass(frozen=True)
class _Run:
  """Everything that the steps need."""

  setup: Setup
  options: LoopOptions
  folder: epath.Path
  begin: Begin
  checkpoints: Checkpoints
  preemption: Preemption
  batches: Iterator[Batch]
  programs: dict[Shapes, Program]
  metrics: LineFile
  telemetry: Telemetry

  @classmethod
  def prepare(
    cls,
    setup: Setup,
    options: LoopOptions,
    folder: epath.Path,
    begin: Begin,
    checkpoints: Checkpoints,
    preemption: Preemption,
    say: Say,
  ) -> "_Run":
    """Reads the first batch, judges it, and compiles."""
    batches = setup.pipeline.iterate(begin.step)
    first = next(batches)
    if problem := check_batch(first, setup.pipeline):
      say(problem)
    programs = compile_steps(setup, begin.state, say)
    placed = (place_batch(batch, setup.mesh) for batch in itertools.chain([first], batches))
    metrics = LineFile(folder / "metrics.jsonl", begin.step)
    telemetry = Telemetry(folder / "telemetry.jsonl", begin.step)
    return cls(
      setup, options, folder, begin, checkpoints, preemption, placed, programs, metrics, telemetry
    )

  def steps(self, show: Callable[[int, str], Any]) -> tuple[TrainState, int]:
    """Runs all steps that are left. Returns the state after them, and DONE or PREEMPTED."""
    begin, options, state = self.begin, self.options, self.begin.state
    total = sum_over_processes(2)
    with self.preemption.waiting_for_others():
      if int(total([self.preemption.asked, 0])[0]):
        return state, PREEMPTED
    recorder = Recorder(
      self.metrics,
      begin.counts,
      options.log_every,
      options.max_skipped,
      self.telemetry,
      show,
      self._blame,
    )
    self.telemetry.start()
    for step in range(begin.step + 1, options.steps + 1):
      with self.telemetry.waiting_for_data():
        batch = next(self.batches)
      # Ahead of the step, so that it is known as soon as the step before is done.
      told = total([self.preemption.asked, self.setup.pipeline.num_failures])
      program = self.programs[shapes_of(batch)]
      state, metrics = program.run(state, batch)
      recorder.flush()  # Waits for the step before, not for this one.
      asked, failed = told.tolist()
      recorder.add(step, metrics, begin.counts.failed_samples + failed, program.flops)
      last = step == options.steps
      if asked or last or step % options.checkpoint_every == 0:
        recorder.flush()
        # A state in which steps are skipped may itself be the reason: the good one must stay.
        if last or not recorder.counts.skipped_in_a_row:
          self._save(step, state, recorder.counts)
      if asked:
        return state, PREEMPTED
    return state, DONE

  def close(self) -> None:
    self.metrics.close()
    self.telemetry.close()

  def _save(self, step: int, state: TrainState, counts: Counts) -> None:
    self.checkpoints.save(step, state, run_facts(self.setup, counts))

  def _blame(self, step: int) -> str:
    """Writes down what the step has shown, for whoever looks for the reason."""
    file = self.folder / f"skipped-step-{step}.json"
    if jax.process_index() == 0:
      file.write_text(json.dumps(self.setup.pipeline.records_of(step), indent=1) + "\n")
    return f"The records of this step: {file}."
