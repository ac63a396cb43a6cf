# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: prompts, answer extraction and scores."""

from collections.abc import Callable

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks.activitynetqa import ActivityNetQA
from slowfast_jax.eval.tasks.benchmark import Benchmark
from slowfast_jax.eval.tasks.egoschema import EgoSchema, EgoSchemaSubset
from slowfast_jax.eval.tasks.jsonl import JsonlTask
from slowfast_jax.eval.tasks.longvideobench import LongVideoBench
from slowfast_jax.eval.tasks.mlvu import MLVU
from slowfast_jax.eval.tasks.mvbench import MVBench
from slowfast_jax.eval.tasks.nextqa import NextQA
from slowfast_jax.eval.tasks.perceptiontest import PerceptionTest
from slowfast_jax.eval.tasks.task import Doc, Prediction, Task
from slowfast_jax.eval.tasks.tempcompass import Captioning, CaptionMatching, MultiChoice, YesNo
from slowfast_jax.eval.tasks.videomme import VideoMME, VideoMMESubtitles

__all__ = ["BENCHMARKS", "TASKS", "Benchmark", "Doc", "Prediction", "Task", "get_task"]

BENCHMARKS: dict[str, type[Benchmark]] = {
  benchmark.name: benchmark
  for benchmark in (
    *(VideoMME, VideoMMESubtitles, MLVU, MVBench, EgoSchema, EgoSchemaSubset, LongVideoBench),
    *(PerceptionTest, NextQA, ActivityNetQA, MultiChoice, YesNo, CaptionMatching, Captioning),
  )
}
TASKS: dict[str, Callable[..., Task]] = {"jsonl": JsonlTask, **BENCHMARKS}


def get_task(name: str, prompt_set: str | None = None) -> Task:
  """A task by its name.

  Args:
    name: one of TASKS.
    prompt_set: how its questions are worded; None: the task's own default.

  Raises:
    UserError: there is no such task or prompt set.
  """
  if name not in TASKS:
    raise UserError(f"There is no task {name!r}; choose from {sorted(TASKS)}.")
  return TASKS[name]() if prompt_set is None else TASKS[name](prompt_set=prompt_set)
