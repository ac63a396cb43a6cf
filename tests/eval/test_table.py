# SPDX-License-Identifier: Apache-2.0
"""Scores stand beside the strict and the published ones, in the same unit."""

from slowfast_jax.eval.table import summarize
from slowfast_jax.eval.tasks import BENCHMARKS

COUNTS = {"n": 10, "unparsed": 1, "errors": 0, "prompt_set": "paper"}


def cells(task, row):
  return [line.split() for line in summarize(task, {**row, **COUNTS, **row}).splitlines()]


def test_published_numbers_stand_in_the_line_of_the_score():
  row = {
    "lvb_acc": 0.5,
    "by_duration_group": {"15": 0.75},
    "strict": {"lvb_acc": 0.25, "unparsed": 3},
    **COUNTS,
  }
  assert summarize("longvideobench", row).splitlines() == [
    "longvideobench (prompts: paper)",
    "                         here  strict  paper, 64 frames  paper, 96 frames",
    "  lvb_acc               0.500   0.250             0.566             0.580",
    "  by_duration_group 15  0.750",
    "  n                        10",
    "  unparsed                  1       3",
    "  errors                    0",
  ]


def test_percentages_stay_percentages():
  row = {"mvbench_accuracy": 50.0, "strict": {"mvbench_accuracy": 40.0, "unparsed": 3}, **COUNTS}
  assert ["mvbench_accuracy", "50.000", "40.000", "68.900", "68.600"] in cells("mvbench", row)


def test_proxies_are_never_beside_published_numbers():
  row = {"exact_match_proxy": 50.0, **COUNTS}
  assert ["exact_match_proxy", "50.000"] in cells("activitynetqa", row)
  assert ["score", "54.800", "54.500"] in cells("activitynetqa", row)
  judged = {**row, "judge": {"model": "m", "accuracy": 51.0, "score": 3.0}}
  assert ["judge", "accuracy", "51.000", "54.800", "54.500"] in cells("activitynetqa", judged)
  assert ["score", "0.592", "0.598"] in cells("egoschema", COUNTS)
  assert "submission.json" in summarize("egoschema", COUNTS)


def test_other_prompts_are_said_to_be_others():
  row = {**COUNTS, "accuracy": 0.5, "prompt_set": "upstream"}
  assert "do not compare" in summarize("perceptiontest", row)
  assert "do not compare" not in summarize("perceptiontest", {**row, "prompt_set": "paper"})
  assert "do not compare" not in summarize("jsonl", {**row, "prompt_set": "letter"})


def test_every_benchmark_can_be_shown():
  for name in BENCHMARKS:
    assert summarize(name, COUNTS).startswith(f"{name} (prompts: paper)\n")
