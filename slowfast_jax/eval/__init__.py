# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: tasks, scoring and the runner."""

from slowfast_jax.eval.tasks import get_task

__all__ = ["get_task"]
