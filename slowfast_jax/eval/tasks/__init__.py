# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: prompts, answer extraction and scores."""

from collections.abc import Callable

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks.jsonl import JsonlTask
from slowfast_jax.eval.tasks.task import Doc, Prediction, Task

__all__ = ["TASKS", "Doc", "Prediction", "Task", "get_task"]

TASKS: dict[str, Callable[..., Task]] = {"jsonl": JsonlTask}


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
