# SPDX-License-Identifier: Apache-2.0
"""Draws follow the model's probabilities, cut to the nucleus; every row has its own seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.generate.sampling import likeliest, make_sampling, next_token

draw = jax.jit(next_token)
P = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)


@pytest.mark.parametrize(
  ("top_p", "top_k", "kept"),
  [
    (0.3, 0, {1}),
    (0.4, 0, {1}),
    (0.41, 0, {1, 3}),
    (0.75, 0, {1, 3, 4}),
    (1.0, 0, {0, 1, 2, 3, 4}),
    (1e-9, 0, {1}),
    (1.0, 1, {1}),
    (1.0, 3, {1, 3, 4}),
    (1.0, 2**40, {0, 1, 2, 3, 4}),
    # Of the two likeliest, 0.4 and 0.3, the first alone has 0.57 of their probability.
    (0.57, 2, {1}),
    (0.58, 2, {1, 3}),
  ],
)
def test_what_can_be_drawn_are_the_fewest_likeliest_tokens(top_p, top_k, kept):
  sampling = make_sampling(1, 1.0, top_p, top_k)
  found = likeliest(jnp.log(P)[None], sampling.top_p, sampling.top_k)[0]
  assert set(np.flatnonzero(np.isfinite(found)).tolist()) == kept


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.75)])
def test_draws_follow_the_probabilities(temperature, top_p):
  rows = 4000
  sampling = make_sampling(rows, temperature, top_p, seed=list(range(rows)))
  tokens = draw(jnp.broadcast_to(jnp.log(P), (rows, 5)), sampling, np.full(rows, 2))
  expected = P ** (1 / temperature)
  if top_p == 0.75:
    expected[[0, 2]] = 0
  shares = np.bincount(tokens, minlength=5) / rows
  np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)


def test_rows_are_greedy_or_drawn_each_for_itself():
  sampling = make_sampling(4, 1.0, seed=[7, 8, 7, 0])
  sampling.temperature[3] = 0.0
  steps = [draw(jnp.broadcast_to(jnp.log(P), (4, 5)), sampling, np.full(4, i)) for i in range(20)]
  rows = np.stack(steps, axis=1)
  np.testing.assert_array_equal(rows[0], rows[2])
  assert (rows[0] != rows[1]).any()
  assert set(rows[3]) == {1}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-1.0, 1.0, 0, 0), "temperature .* got -1"),
    ((float("nan"), 1.0, 0, 0), "temperature .* got nan"),
    ((1.0, 0.0, 0, 0), "top_p .* got 0"),
    ((1.0, 1.5, 0, 0), "top_p .* got 1.5"),
    ((1.0, 1.0, -1, 0), "top_k .* got -1"),
    ((1.0, 1.0, 0, [1, 2]), r"one a prompt \(3\), got 2"),
  ],
)
def test_values_out_of_range_are_named(arguments, message):
  with pytest.raises(UserError, match=message):
    make_sampling(3, *arguments)


def test_seeds_may_be_of_any_size():
  seeds = make_sampling(3, seed=[2**70, -1, 1]).seed
  assert len(set(seeds.tolist())) == 3
