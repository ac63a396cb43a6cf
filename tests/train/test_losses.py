# SPDX-License-Identifier: Apache-2.0
"""The loss in numbers: which positions count, and what a batch without any gives."""

import jax
import jax.numpy as jnp
import numpy as np

from slowfast_jax.train.losses import next_token_loss

# Probabilities 1/2, 1/4, 1/4 at every position.
LOGITS = jnp.log(jnp.array([[[2.0, 1.0, 1.0]] * 3] * 2))


def loss(targets, weights):
  value, metrics = next_token_loss(LOGITS, jnp.array(targets), jnp.array(weights, jnp.float32))
  assert float(metrics["loss"]) == float(value)
  return float(value), float(metrics["token_accuracy"])


def test_mean_of_the_weighted_positions():
  value, accuracy = loss([[0, 1, 2], [0, 0, 0]], [[1, 1, 0], [1, 0, 0]])
  np.testing.assert_allclose(value, np.log([2, 4, 2]).mean(), rtol=1e-6)
  np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)


def test_weights_weigh():
  value, accuracy = loss([[0, 1, 0], [0, 0, 0]], [[3, 1, 0], [0, 0, 0]])
  np.testing.assert_allclose(value, (3 * np.log(2) + np.log(4)) / 4, rtol=1e-6)
  np.testing.assert_allclose(accuracy, 3 / 4, rtol=1e-6)


def test_rows_count_by_their_tokens_not_equally():
  value, _ = loss([[0, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]])
  np.testing.assert_allclose(value, (3 * np.log(2) + np.log(4)) / 4, rtol=1e-6)


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
  assert loss([[0, 1, 2]] * 2, [[0, 0, 0]] * 2) == (0.0, 0.0)
  gradient = jax.grad(lambda x: next_token_loss(x, jnp.zeros((2, 3), int), jnp.zeros((2, 3)))[0])
  np.testing.assert_array_equal(gradient(LOGITS), 0.0)


def test_bfloat16_scores_are_summed_in_float32():
  value, _ = next_token_loss(LOGITS.astype(jnp.bfloat16), jnp.zeros((2, 3), int), jnp.ones((2, 3)))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, np.log(2), rtol=1e-2)
