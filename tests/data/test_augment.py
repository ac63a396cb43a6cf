# SPDX-License-Identifier: Apache-2.0
"""Random sampling offsets: even spacing, fair to every frame, and pinned."""

import collections

import numpy as np
import pytest

from slowfast_jax.data.augment import offset_frames, sample_seed


@pytest.mark.parametrize(("stored", "wanted"), [(64, 32), (100, 32), (33, 32), (7, 1), (5, 2)])
def test_frames_are_evenly_spaced_and_alike_often_shown(stored, wanted):
  shown = [offset_frames(stored, wanted, seed) for seed in range(4000)]
  for frames in shown[:500]:
    assert len(frames) == wanted
    assert 0 <= frames[0] <= frames[-1] < stored
    assert set(np.diff(frames)) <= {stored // wanted, -(-stored // wanted)}
  counts = collections.Counter(np.concatenate(shown).tolist())
  expected = len(shown) * wanted / stored
  # Five standard deviations of a count.
  tolerance = 5 * np.sqrt(expected)
  assert all(abs(counts[i] - expected) < tolerance for i in range(stored))


@pytest.mark.parametrize("stored", [0, 1, 8])
def test_what_fits_is_shown_whole(stored):
  assert offset_frames(stored, 8, seed=3).tolist() == list(range(stored))


def test_the_choice_is_pinned():
  """Changing it would change what an interrupted run trains on after the next release."""
  seeds = [sample_seed(0, 1, 17, epoch) for epoch in range(3)]
  assert len(set(seeds)) == 3
  chosen = [offset_frames(10, 3, seed).tolist() for seed in seeds]
  assert chosen == [[3, 6, 9], [0, 3, 7], [0, 4, 7]]
