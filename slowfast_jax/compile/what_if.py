# SPDX-License-Identifier: Apache-2.0
"""Sweeps: every combination of some values of a config's fields, compiled and put in order.

What was compiled before is not compiled again: results lie in a folder, by what they depend on.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import slowfast_jax
from slowfast_jax.compile.report import gib, summarize
from slowfast_jax.compile.run import Job, Say, compile_job
from slowfast_jax.config import load_config
from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.files import replace_json


@dataclasses.dataclass(frozen=True)
class Point:
  """One combination.

  Attributes:
    changes: FIELD=VALUE, of every field that is swept.
    summary: its figures, as of `report.summarize`; None: it could not be compiled.
    problem: why not.
  """

  changes: tuple[str, ...]
  summary: dict[str, Any] | None
  problem: str = ""

  @property
  def fits(self) -> bool:
    return self.summary is not None and self.summary["fits"]

  @property
  def rows_per_second(self) -> float:
    """By the estimate, of the last of its programs; 0 where it does not run."""
    if self.summary is None or not self.fits:
      return 0.0
    program = self.summary["programs"][-1]
    return program["rows"] / program["estimate"]["seconds"]


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
  """All combinations of FIELD=VALUE,VALUE,...

  Raises:
    UsageError: a word is not of this form.
  """
  fields = []
  for sweep in sweeps:
    field, equals, values = sweep.partition("=")
    if not equals or not field or not all(values.split(",")):
      raise UsageError(
        f"--what-if {sweep}: expected FIELD=VALUE,VALUE,... as train.remat=full,dots"
      )
    fields.append([f"{field}={value}" for value in values.split(",")])
  return list(itertools.product(*fields))


def sweep(
  job: Job,
  sweeps: Sequence[str],
  samples: int,
  cache: Path,
  progress: Callable[[int, int, str], Any],
) -> list[Point]:
  """Compiles all combinations, the fastest first; those that do not run come last.

  Args:
    job: what is compiled; its overrides hold for every point.
    sweeps: see `combinations`.
    samples: of an epoch.
    cache: folder of results.
    progress: is told (points done, points, what is being done).

  Raises:
    UsageError: a field that the config does not have, or a word that is no sweep.
  """
  changes = combinations(sweeps)
  jobs = [
    dataclasses.replace(job, overrides=(*job.overrides, *(f"--config.{word}" for word in words)))
    for words in changes
  ]
  for one in jobs:  # All fields exist, before hours are spent.
    load_config(one.config, one.overrides)
  points = []
  for i, (words, one) in enumerate(zip(changes, jobs)):

    def say(now: str, seconds: float, i: int = i, words: tuple[str, ...] = words) -> None:
      progress(i, len(jobs), f"{' '.join(words)}: {now}, {seconds:.0f} s")

    points.append(_point(words, one, samples, cache, say))
  progress(len(jobs), len(jobs), "")
  return sorted(points, key=lambda point: -point.rows_per_second)


def table(points: Sequence[Point]) -> str:
  """The points in their order, a line each."""
  width = max(len(" ".join(point.changes)) for point in points)
  head = f"{'':{width}}  {'HBM':>10}  {'step':>9}  {'rows/s':>8}  MFU"
  return "\n".join([head, *(f"{' '.join(p.changes):<{width}}  {_row(p)}" for p in points)])


def cache_folder() -> Path:
  """Where results lie unless another folder is named."""
  root = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
  return Path(root) / "slowfast_jax" / "compile"


def _row(point: Point) -> str:
  if point.summary is None:
    return f"not possible: {point.problem}"
  program = point.summary["programs"][-1]
  used = gib(program["hbm_used"])
  if not point.fits:
    return f"{used:>10}  does not fit by {gib(program['hbm_used'] - program['hbm_limit'])}"
  guess = program["estimate"]
  low, high = guess["mfu"]
  return (
    f"{used:>10}  {guess['seconds']:>7.3g} s  {point.rows_per_second:>8.1f}  {low:.3f}-{high:.3f}"
  )


def _point(words: tuple[str, ...], job: Job, samples: int, cache: Path, say: Say) -> Point:
  file = cache / f"{_key(job)}.json"
  try:
    if file.is_file():
      result = json.loads(file.read_text())
    else:
      result = compile_job(job, say)
      cache.mkdir(parents=True, exist_ok=True)
      replace_json(file, result)
  except UserError as error:  # Values that do not go together; another point may do.
    return Point(words, None, str(error).splitlines()[0])
  return Point(words, summarize(result, job.topology, job.what, samples))


def _key(job: Job) -> str:
  """Of all that a result depends on: the job, the config behind it, this package, the compiler."""
  config = load_config(job.config, job.overrides).to_json_best_effort(sort_keys=True)
  parts = [config, str(job.topology), job.what, json.dumps(job.generation, sort_keys=True)]
  parts += [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  digest = hashlib.sha256("\n".join(parts).encode())
  for source in sorted(Path(slowfast_jax.__file__).parent.rglob("*.py")):
    digest.update(source.read_bytes())
  return digest.hexdigest()[:32]
