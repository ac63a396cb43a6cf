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

from slowfast_jax.checkpoints.store import Checkpoints, best_of, save_export
from slowfast_jax.distributed import sum_over_processes
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch
from slowfast_jax.train.best import Scores
from slowfast_jax.train.host import keep_freed_memory
from slowfast_jax.train.lines import EVALUATED, LineFile, read_lines
from slowfast_jax.train.metrics import Recorder
from slowfast_jax.train.options import LoopOptions, options_of
from slowfast_jax.train.preemption import PREEMPTED, Preemption
from slowfast_jax.train.program import (
  Program,
  Shapes,
  compile_steps,
  shapes_of,
)
from slowfast_jax.train.report import write_report
from slowfast_jax.train.resume import Begin, restore_or_init, run_facts
from slowfast_jax.train.setup import Setup, check_batch, open_setup, place_batch
from slowfast_jax.train.step import TrainState
from slowfast_jax.train.telemetry import Telemetry
from slowfast_jax.train.trackers import Tracker, numbers_of, open_trackers
from slowfast_jax.train.watch import Watch

DONE = 0

# progress(done, total, text); say(line).
Progress = Callable[[int, int, str], Any]
Say = Callable[[str], Any]
# Metrics of an export; the second folder is for what an evaluation writes.
Evaluate = Callable[[epath.Path, epath.Path], dict[str, float]]


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  progress: Progress | None = None,
  say: Say | None = None,
  evaluate: Evaluate | None = None,
  preemption: Preemption | None = None,
) -> int:
  """Trains, or goes on where the same command stopped.

  Args:
    config: its fields are those of `defaults.training_defaults`.
    workdir: gets checkpoints/, metrics.jsonl, telemetry.jsonl and, at the end, export/ and
      report.html; docs/training.md has them all.
    progress: is told of every step.
    say: is told what happens around the steps, a line each.
    evaluate: what is done every `eval.every` steps.
    preemption: whether the process has been asked to stop, of a caller who listens already; None:
      it is listened from here on.

  Returns:
    0 when it is done, 42 when it was asked to stop (SIGTERM) and has saved. Asked while there is
    nothing new to save, the whole process leaves with 42 at once.

  Raises:
    UserError: something that the user can mend, from a wrong field to a loss that is not finite.
  """
  progress, say = progress or (lambda *_: None), say or (lambda _: None)
  folder = epath.Path(workdir).absolute()
  options = options_of(config)
  with contextlib.ExitStack() as stack:
    if preemption is None:
      preemption = stack.enter_context(Preemption(say))
    with preemption.nothing_to_lose():
      keep_freed_memory()
      setup = open_setup(config)
      folder.mkdir(parents=True, exist_ok=True)
      scores = Scores(folder / "best.json", options.keep_best)
      checkpoints = Checkpoints(folder / "checkpoints", options.keep, scores)
      stack.enter_context(contextlib.closing(checkpoints))
      begin = restore_or_init(setup, checkpoints, say)
      if begin.step < options.steps:
        run = _Run.prepare(
          setup, options, folder, begin, checkpoints, scores, preemption, say, evaluate
        )
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
      if jax.process_index() == 0:
        write_report(folder, options.steps)
      say(f"exported to {folder / 'export'}")
  return DONE


def export(config: ml_collections.ConfigDict, workdir: str, which: str, say: Say) -> None:
  """Exports a checkpoint of a run, without training.

  Args:
    config: of the run.
    workdir: gets export/.
    which: "latest", "best", or the number of a step.
    say: is told what is exported.

  Raises:
    UserError: there is no such checkpoint, or it cannot be read.
  """
  folder, options = epath.Path(workdir).absolute(), options_of(config)
  setup = open_setup(config)
  scores = Scores(folder / "best.json", options.keep_best)
  # The run may go on meanwhile, so nothing in its folder is touched.
  with contextlib.closing(Checkpoints(folder / "checkpoints", keep=None)) as kept:
    steps = kept.all_steps()
    known = {str(step): step for step in steps}
    if steps:
      known["latest"] = steps[-1]
    if (best := best_of(scores, steps)) is not None:
      known["best"] = best
    if which not in known:
      raise UserError(
        f"--export {which}: {folder / 'checkpoints'} has no such checkpoint; choose from "
        f"{', '.join(known) or 'none: it is empty'}."
      )
    state = restore_or_init(setup, kept, say, only=known[which]).state
  save_export(folder / "export", setup.export(state.params))
  say(f"exported to {folder / 'export'}")


@dataclasses.dataclass(frozen=True)
class _Run:
  """Everything that the steps need."""

  setup: Setup
  options: LoopOptions
  folder: epath.Path
  begin: Begin
  checkpoints: Checkpoints
  scores: Scores
  preemption: Preemption
  say: Say
  evaluate: Evaluate | None
  batches: Iterator[Batch]
  programs: dict[Shapes, Program]
  metrics: LineFile
  telemetry: Telemetry
  trackers: list[Tracker]

  @classmethod
  def prepare(
    cls,
    setup: Setup,
    options: LoopOptions,
    folder: epath.Path,
    begin: Begin,
    checkpoints: Checkpoints,
    scores: Scores,
    preemption: Preemption,
    say: Say,
    evaluate: Evaluate | None,
  ) -> "_Run":
    """Reads the first batch, judges it, and compiles."""
    batches = setup.pipeline.iterate(begin.step)
    first = next(batches)
    if problem := check_batch(first, setup.pipeline):
      say(problem)
    programs = compile_steps(setup, begin.state, say)
    placed = (place_batch(batch, setup.mesh) for batch in itertools.chain([first], batches))
    trackers = []
    if jax.process_index() == 0:
      trackers = open_trackers(options.trackers, folder, begin.step, setup.config)

    def tell(step: int, line: dict[str, Any]) -> None:
      for tracker in trackers:
        tracker.write(step, numbers_of(line))

    return cls(
      setup=setup,
      options=options,
      folder=folder,
      begin=begin,
      checkpoints=checkpoints,
      scores=scores,
      preemption=preemption,
      say=say,
      evaluate=evaluate if options.eval_every else None,
      batches=placed,
      programs=programs,
      metrics=LineFile(folder / "metrics.jsonl", begin.step),
      telemetry=Telemetry(folder / "telemetry.jsonl", begin.step, tell),
      trackers=trackers,
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
    watch = Watch(self.folder, options.hang_seconds, options.profile, recorder.flush, self.say)
    self._evaluate(begin.step, state)  # Where a run was stopped before it could.
    self.telemetry.start()
    with watch:
      for step in range(begin.step + 1, options.steps + 1):
        watch.before(step)
        with self.telemetry.waiting_for_data():
          batch = next(self.batches)
        # Ahead of the step, so that it is known as soon as the step before is done.
        told = total([self.preemption.asked, self.setup.pipeline.num_failures])
        program = self.programs[shapes_of(batch)]
        state, metrics = program.run(state, batch)
        recorder.flush()  # Waits for the step before, not for this one.
        asked, failed = told.tolist()
        recorder.add(step, metrics, begin.counts.failed_samples + failed, program.flops)
        saved = False
        if asked or self._is_due(step):
          recorder.flush()
          saved = self._save(step, state, recorder)
        if asked:
          return state, PREEMPTED
        watch.rest()
        if saved:
          self._evaluate(step, state)
    return state, DONE

  def close(self) -> None:
    self.metrics.close()
    self.telemetry.close()
    for tracker in self.trackers:
      tracker.close()

  def _is_due(self, step: int) -> bool:
    """Whether there is a checkpoint of this step, whatever happens."""
    options = self.options
    evaluated = self.evaluate is not None and step % options.eval_every == 0
    return step == options.steps or step % options.checkpoint_every == 0 or evaluated

  def _save(self, step: int, state: TrainState, recorder: Recorder) -> bool:
    """Whether it is saved: a state in which steps are skipped is not, but the last one."""
    # It may itself be the reason: the good one must stay.
    if recorder.counts.skipped_in_a_row and step < self.options.steps:
      return False
    self.metrics.flush()  # A run that goes on from this checkpoint does not write them again.
    self.scores.rate(step, recorder.latest, self.checkpoints.all_steps())
    self.checkpoints.save(step, state, run_facts(self.setup, recorder.counts))
    return True

  def _evaluate(self, step: int, state: TrainState) -> None:
    """Evaluates the state, which is saved, unless that is done or not due."""
    if self.evaluate is None or not step or step % self.options.eval_every:
      return
    first, together = jax.process_index() == 0, sum_over_processes(1)
    lines = read_lines(self.folder / "metrics.jsonl") if first else []
    done = any(line["step"] == step and EVALUATED in line for line in lines)
    if int(together([done])[0]):
      return
    self.checkpoints.wait()
    with self.telemetry.aside(), self.preemption.nothing_to_lose():
      folder = self.folder / "eval" / str(step)
      if first and folder.exists():
        folder.rmtree()  # Of another export, byte by byte, of the same state.
      int(together([0])[0])  # Nobody writes before that, or reads before all is written.
      save_export(folder / "export", self.setup.export(state.params))
      int(together([0])[0])
      found = self.evaluate(folder / "export", folder)
      if first:
        (folder / "export").rmtree()
    self.metrics.write({"step": step, EVALUATED: True, **found})
    self.scores.rate(step, found, self.checkpoints.all_steps())
    for tracker in self.trackers:
      tracker.write(step, {f"eval/{name}": value for name, value in numbers_of(found).items()})
    self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

  def _blame(self, step: int) -> str:
    """Writes down what the step has shown, for whoever looks for the reason."""
    file = self.folder / f"skipped-step-{step}.json"
    if jax.process_index() == 0:
      file.write_text(json.dumps(self.setup.pipeline.records_of(step), indent=1) + "\n")
    return f"The records of this step: {file}."
