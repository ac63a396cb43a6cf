# SPDX-License-Identifier: Apache-2.0
"""Mixtures: shares, orders that are pinned, and mixture files with what is wrong in them."""

import collections
import json

import numpy as np
import pytest

from slowfast_jax.data.mixture import Draws, MixtureError, MixtureSource, SampleOrder, read_mixture

WEIGHTS = (0.7, 0.25, 0.04, 0.01)


@pytest.mark.parametrize("start", [0, 7_777])
def test_shares_are_kept_within_one_percent(start):
  draws = Draws(WEIGHTS, seed=start)
  counts = collections.Counter(draws[i][0] for i in range(start, start + 20_000))
  for source, weight in enumerate(WEIGHTS):
    assert counts[source] == pytest.approx(20_000 * weight, rel=0.01)


def test_shares_are_kept_in_short_runs_too():
  draws = Draws((3.0, 1.0), seed=1)
  first = np.array([draws[i][0] for i in range(2000)])
  for length in (100, 500, 2000):
    for start in range(0, 2000, length):
      assert abs((first[start : start + length] == 0).sum() - 0.75 * length) <= 2
  assert 5 < np.abs(np.diff(first[:100])).sum() < 50, "shuffled, not every fourth in turn"


def test_each_source_is_gone_through_without_gap_or_repeat():
  draws = Draws(WEIGHTS, seed=2)
  ordinals = collections.defaultdict(list)
  for i in range(30_000):  # Three cycles.
    source, ordinal = draws[i]
    ordinals[source].append(ordinal)
  assert all(sorted(values) == list(range(len(values))) for values in ordinals.values())


def test_the_order_is_pinned():
  """Changing it would change what an interrupted run trains on after the next release."""
  draws = Draws((2.0, 1.0), seed=3)
  assert [draws[i] for i in range(8)] == [
    (0, 11),
    (1, 2),
    (0, 6),
    (0, 5),
    (1, 0),
    (0, 10),
    (1, 3),
    (1, 5),
  ]
  assert [draws[i] for i in range(123_456, 123_460)] == [
    (0, 82310),
    (1, 41146),
    (1, 41147),
    (0, 82300),
  ]
  order = SampleOrder(7, seed=3)
  assert [order[i] for i in range(14)] == [0, 3, 1, 2, 4, 5, 6, 4, 6, 0, 2, 5, 3, 1]


def test_tiny_weights_still_come():
  draws = Draws((1e9, 1.0, 1.0), seed=0)
  counts = collections.Counter(draws[i][0] for i in range(10_000))
  assert counts == {0: 9998, 1: 1, 2: 1}


def test_seeds_give_other_orders():
  orders = [tuple(Draws((1.0, 1.0), seed)[i][0] for i in range(100)) for seed in (0, 1)]
  assert orders[0] != orders[1]


# Files.


def write(tmp_path, value):
  file = tmp_path / "mix.json"
  file.write_text(value if isinstance(value, str) else json.dumps(value))
  return file


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mixture_file(tmp_path, wrapped):
  sources = [
    {"name": "talks", "path": "../talks", "weight": 3, "licence": "CC-BY-4.0"},
    {"path": "gs://bucket/stills", "weight": 0.5},
  ]
  file = write(tmp_path, {"sources": sources} if wrapped else sources)
  assert read_mixture(file) == [
    MixtureSource("talks", f"{tmp_path}/../talks", 3, "CC-BY-4.0"),
    MixtureSource("stills", "gs://bucket/stills", 0.5),
  ]


@pytest.mark.parametrize(
  ("value", "words"),
  [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ([], "expected a list of sources"),
    ({"a": 1}, "expected a list of sources"),
    ([3], "source 1: expected an object"),
    ([{"path": "a"}, {"weight": 1}], "source 2: path is missing"),
    ([{"path": ["a"]}], "path must be a text, got"),
    ([{"path": "a", "weight": "1"}], "weight must be a number, got '1'"),
    ([{"path": "a", "weight": True}], "weight must be a number, got True"),
    ([{"path": "a", "weight": 0}], "weight must be a positive number, got 0"),
    ('[{"path": "a", "weight": NaN}]', "weight must be a positive number, got nan"),
    ([{"path": "a", "wieght": 1}], "there is no field 'wieght'; it may have"),
    ([{"path": "a/x"}, {"path": "b/x"}], "two sources are called 'x'"),
    ([{"path": "a", "weight": 1}, {"path": "b"}], "'b' has no weight and others have"),
  ],
)
def test_what_is_wrong_with_a_mixture_file(tmp_path, value, words):
  file = write(tmp_path, value)
  with pytest.raises(MixtureError, match=words) as caught:
    read_mixture(file)
  assert str(caught.value).startswith(str(file))


def test_a_missing_mixture_file(tmp_path):
  with pytest.raises(MixtureError, match="mix.json: cannot be read: No such file"):
    read_mixture(tmp_path / "mix.json")
