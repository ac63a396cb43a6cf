# SPDX-License-Identifier: Apache-2.0
"""Comparisons of two runs agree with closed forms and with SciPy."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from slowfast_jax.errors import UserError
from slowfast_jax.eval.compare import compare_runs, describe, difference, mcnemar


@pytest.mark.parametrize(
  ("only_first", "only_second", "p_value"),
  [
    (0, 0, 1.0),
    (1, 0, 1.0),
    (5, 5, 1.0),
    (0, 5, 2 / 32),
    (8, 2, 2 * (1 + 10 + 45) / 1024),
    (2, 8, 2 * (1 + 10 + 45) / 1024),
    (1, 9, 2 * 11 / 1024),
  ],
)
def test_mcnemar_by_hand(only_first, only_second, p_value):
  assert mcnemar(only_first, only_second) == p_value


@pytest.mark.parametrize("pair", [(3, 17), (60, 40), (131, 90), (2000, 2300), (0, 4000)])
def test_mcnemar_as_scipy_has_it(pair):
  expected = scipy.stats.binomtest(min(pair), sum(pair), 0.5).pvalue
  assert mcnemar(*pair) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_intervals_are_those_of_the_normal_distribution_where_it_holds():
  rng = np.random.default_rng(1)
  first, second = rng.random(2000) < 0.6, rng.random(2000) < 0.65
  found = difference(first, second, [str(i) for i in range(2000)])
  assert (found.first, found.second) == (first.mean(), second.mean())
  steps = second.astype(float) - first
  for low_high, values in [
    (found.first_interval, first),
    (found.second_interval, second),
    (found.interval, steps),
  ]:
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low_high == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 20)


def test_a_video_counts_as_one_however_many_questions_it_has():
  rng = np.random.default_rng(2)
  first, second = rng.random((2, 300)) < 0.5
  videos = [str(i) for i in range(300)]
  once = difference(first, second, videos)
  eight = difference(np.repeat(first, 8), np.repeat(second, 8), np.repeat(videos, 8).tolist())
  assert eight.interval == once.interval
  # Had they been independent questions, it would be three times as narrow.
  apart = difference(np.repeat(first, 8), np.repeat(second, 8), [str(i) for i in range(2400)])
  width, narrow = np.diff(once.interval)[0], np.diff(apart.interval)[0]
  assert narrow == pytest.approx(width / math.sqrt(8), rel=0.1)


def test_videos_of_different_sizes_are_weighed_by_questions():
  # Nine questions right on one video, one wrong on the other: 0.9; drawn: 0, 0.9 or 1.
  found = difference([True] * 9 + [False], [False] * 10, ["a"] * 9 + ["b"])
  assert found.first == 0.9
  assert found.first_interval == (0.0, 1.0)
  assert found.interval == (-1.0, 0.0)


def line(number, right, strict=None, **changes):
  strict = right if strict is None else strict
  names = {"id": f"q{number}", "video": f"{number}.mp4", "gold": "A", "error": ""}
  return {**names, "right": right, "strict_right": strict, **changes}


def write(folder, lines, task="mlvu"):
  folder.mkdir()
  (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  (folder / "run.json").write_text(json.dumps({"task": task}))
  return folder


def test_two_folders_with_a_known_difference(tmp_path):
  """40 questions: 20 both right, 10 neither, 8 only the second, 2 only the first."""
  pairs = [(1, 1)] * 20 + [(0, 0)] * 10 + [(0, 1)] * 8 + [(1, 0)] * 2
  first = write(tmp_path / "a", [line(i, bool(a), False) for i, (a, _) in enumerate(pairs)])
  others = [line(i, bool(b), False) for i, (_, b) in enumerate(pairs)]
  second = write(tmp_path / "b", others[::-1])  # Answered in another order.
  count, found = compare_runs(first, second)
  assert (count, list(found)) == (40, ["by the tool's rules", "strictly"])
  scored = found["by the tool's rules"]
  assert (scored.first, scored.second) == (0.55, 0.7)
  assert (scored.only_first, scored.only_second) == (2, 8)
  assert scored.p_value == 0.109375 == scipy.stats.binomtest(2, 10).pvalue
  assert found["strictly"].p_value == 1.0
  shown = describe(first, second, count, found)
  assert "  B - A  +15.00   [" in shown
  assert "right in A only: 2, in B only: 8; McNemar's exact p = 0.1094\n" in shown


def test_a_judge_of_both_is_compared_too(tmp_path):
  folders = [write(tmp_path / name, [line(i, False) for i in range(6)]) for name in "ab"]
  for folder, judged in zip(folders, ((None, None), (True, True))):
    said = [{"id": f"q{i}", "right": right, "error": ""} for i, right in enumerate(judged)]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
  found = compare_runs(*folders)[1]
  assert list(found) == ["by the tool's rules", "strictly", "by the judge"]
  assert (found["by the judge"].first, found["by the judge"].second) == (0.0, 2 / 6)
  (folders[0] / "judgements.jsonl").unlink()
  assert "by the judge" not in compare_runs(*folders)[1]


def test_what_cannot_be_compared_is_named(tmp_path):
  lines = [line(i, True) for i in range(3)]
  whole = write(tmp_path / "whole", lines)
  for name, other, message in [
    ("none", None, "there is no predictions.jsonl in it"),
    ("less", lines[:2], "the first has 3, the second 2, and 2 are in both"),
    ("more", [*lines[:2], line(3, True)], "the first has 3, the second 3, and 2 are in both"),
    ("gold", [*lines[:2], line(2, True, gold="B")], "right answers of question 'q2' differ"),
    ("old", [{"id": "q0", "error": ""}], "question 'q0' has no scores; evaluate it anew"),
  ]:
    folder = tmp_path / name
    if other is not None:
      write(folder, other)
    with pytest.raises(UserError, match=message):
      compare_runs(whole, folder)
  with pytest.raises(UserError, match="is of the task 'mlvu' and .* of 'mvbench'"):
    compare_runs(whole, write(tmp_path / "task", lines, "mvbench"))
  secret = write(tmp_path / "secret", [line(0, False, gold="")])
  with pytest.raises(UserError, match="the right answers are not public"):
    compare_runs(secret, secret)


def test_a_half_written_last_line_does_not_count(tmp_path):
  folder = write(tmp_path / "run", [line(0, True)])
  file = folder / "predictions.jsonl"
  file.write_text(file.read_text() + '{"id": "q1", "ri')
  assert compare_runs(folder, folder)[0] == 1
