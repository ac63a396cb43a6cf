# SPDX-License-Identifier: Apache-2.0
"""A small part of crash_matrix.py, which has the whole."""

from tests.train.crash_matrix import run_matrix


def test_runs_killed_at_random_moments_end_as_the_unbroken_one(tmp_path):
  told = run_matrix(tmp_path, kills=1, terms=1, processes=1, seed=0, steps=20)
  assert told["runs that ended as the unbroken one"] == 1
