# SPDX-License-Identifier: Apache-2.0
"""Whether one run of an evaluation is better than another on the same questions, or lucky.

Scores are compared question by question: exactly (McNemar's test), and by drawing the videos anew
(bootstrap), for the questions of one video are not independent.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from slowfast_jax.errors import UserError
from slowfast_jax.eval.results import JUDGEMENTS, PREDICTIONS, RUN, parse_lines

DRAWS = 10_000
# Draws at once: 19,000 videos times 500 draws take 76 MB.
_CHUNK = 500
# What is compared, by the field of a prediction.
SCORINGS = {"right": "by the tool's rules", "strict_right": "strictly"}
JUDGED = "by the judge"


@dataclasses.dataclass(frozen=True)
class Difference:
  """How two runs differ under one scoring. All accuracies are fractions of the questions.

  Attributes:
    first, second: the runs' accuracies.
    first_interval, second_interval: their 95% bootstrap confidence intervals.
    interval: that of the second minus the first.
    only_first, only_second: questions that only this run has right.
    p_value: how likely so uneven a split of those is, were both runs equally good; McNemar's exact
      test, two-sided.
  """

  first: float
  second: float
  first_interval: tuple[float, float]
  second_interval: tuple[float, float]
  interval: tuple[float, float]
  only_first: int
  only_second: int
  p_value: float


def compare_runs(first: Path, second: Path) -> tuple[int, dict[str, Difference]]:
  """Compares two folders that `slowfast eval` wrote.

  Returns:
    How many questions both have, and the differences by the name of the scoring.

  Raises:
    UserError: a folder has no predictions, or they are of different tasks or questions.
  """
  lines = read_pairs(first, second)
  videos = [line["video"] for line, _ in lines]
  fields = dict(SCORINGS)
  if all(JUDGED in line for pair in lines for line in pair):
    fields[JUDGED] = JUDGED
  found = {}
  for field, name in fields.items():
    right = np.array([[line[field] for line in pair] for pair in lines], bool)
    found[name] = difference(right[:, 0], right[:, 1], videos)
  return len(lines), found


def read_pairs(first: Path, second: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """What two runs made of every question; errors as of `compare_runs`."""
  before, after = _read(first), _read(second)
  _check_same(first, second, before, after)
  return [(before[name], after[name]) for name in before]


def difference(
  first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, videos: Sequence[str]
) -> Difference:
  """How two runs differ.

  Args:
    first, second: whether each question is right.
    videos: of each question.
  """
  right = np.stack([np.asarray(first, bool), np.asarray(second, bool)], axis=1)
  _, video = np.unique(np.asarray(videos), return_inverse=True)
  counts = np.bincount(video)
  sums = np.stack([np.bincount(video, weights=column) for column in right.T], axis=1)
  drawn = bootstrap(sums, counts)
  only_first = int((right[:, 0] & ~right[:, 1]).sum())
  only_second = int((right[:, 1] & ~right[:, 0]).sum())
  accuracy = right.mean(axis=0)
  return Difference(
    first=float(accuracy[0]),
    second=float(accuracy[1]),
    first_interval=_interval(drawn[:, 0]),
    second_interval=_interval(drawn[:, 1]),
    interval=_interval(drawn[:, 1] - drawn[:, 0]),
    only_first=only_first,
    only_second=only_second,
    p_value=mcnemar(only_first, only_second),
  )


def bootstrap(
  sums: Float[np.ndarray, "videos runs"], counts: Int[np.ndarray, " videos"], seed: int = 0
) -> Float[np.ndarray, "draws runs"]:
  """Accuracies of DRAWS samples of the videos, with replacement.

  Args:
    sums: right answers of each video, of each run.
    counts: questions of each video.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  chances = np.full(len(counts), 1 / len(counts))
  found = []
  for _ in range(DRAWS // _CHUNK):
    times = rng.multinomial(len(counts), chances, _CHUNK)
    found.append((times @ sums) / (times @ counts)[:, None])
  return np.concatenate(found)


def mcnemar(only_first: int, only_second: int) -> float:
  """The exact two-sided p-value: a fair coin for each question that only one run has right."""
  tosses, fewer = only_first + only_second, min(only_first, only_second)
  term, tail = 1, 0
  for heads in range(fewer + 1):
    tail += term
    term = term * (tosses - heads) // (heads + 1)
  return min(1.0, 2 * tail / 2**tosses)


def describe(
  first: Path, second: Path, questions: int, differences: Mapping[str, Difference]
) -> str:
  """The comparison for people."""
  lines = [f"A {first}", f"B {second}", f"{questions} questions"]
  for scoring, d in differences.items():
    lines += [
      f"{scoring}",
      f"  A      {_percent(d.first)}  {_span(d.first_interval)}",
      f"  B      {_percent(d.second)}  {_span(d.second_interval)}",
      f"  B - A  {100 * (d.second - d.first):+6.2f}   {_span(d.interval)}",
      f"  right in A only: {d.only_first}, in B only: {d.only_second}; "
      f"McNemar's exact p = {d.p_value:.4g}",
    ]
  return "\n".join([*lines, "Intervals: 95%, videos drawn anew 10,000 times."])


def _percent(share: float) -> str:
  return f"{100 * share:6.2f}%"


def _span(interval: tuple[float, float]) -> str:
  return f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _interval(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
  low, high = np.quantile(values, (0.025, 0.975))
  return float(low), float(high)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
  path = folder / PREDICTIONS
  if not path.is_file():
    raise UserError(f"{folder}: there is no {PREDICTIONS} in it; name the --workdir of two runs.")
  content = path.read_bytes()
  lines = parse_lines(content[: content.rfind(b"\n") + 1], path)
  if lacking := [line["id"] for line in lines if not set(SCORINGS) | {"video"} <= set(line)]:
    raise UserError(f"{path}: question {lacking[0]!r} has no scores; evaluate it anew.")
  return {line["id"]: line for line in _with_verdicts(folder, lines)}


def _with_verdicts(folder: Path, lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
  """Adds what the judge said, where there was one; where it was not asked the rules decide."""
  path = folder / JUDGEMENTS
  if not path.is_file():
    return lines
  said = {line["id"]: bool(line["right"]) for line in parse_lines(path.read_bytes(), path)}
  return [{**line, JUDGED: said.get(line["id"], line["right"])} for line in lines]


def _check_same(
  first: Path, second: Path, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
  tasks = [
    json.loads((folder / RUN).read_text(encoding="utf-8"))["task"] for folder in (first, second)
  ]
  if tasks[0] != tasks[1]:
    raise UserError(f"{first} is of the task {tasks[0]!r} and {second} of {tasks[1]!r}.")
  if not before or before.keys() != after.keys():
    raise UserError(
      f"{first} and {second} must answer the same questions: the first has {len(before)}, the "
      f"second {len(after)}, and {len(before.keys() & after.keys())} are in both. Finish both runs."
    )
  if other := [name for name in before if before[name]["gold"] != after[name]["gold"]]:
    raise UserError(f"{first} and {second}: the right answers of question {other[0]!r} differ.")
  if not any(line["gold"] for line in before.values()):
    raise UserError(f"{first}: nothing can be compared, for the right answers are not public.")
