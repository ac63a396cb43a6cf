# SPDX-License-Identifier: Apache-2.0
"""The gradient of every hybrid parameter, against differences of the loss of the NumPy oracle."""

import jax
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.train.losses import next_token_loss
from tests.models import oracle
from tests.models.tiny import (
  LENGTH,
  Case,
  V,
  batch_of,
  config,
  geometry_of,
  random_params,
  weights_of,
)

# A video, a text and an image, packed into one row. What is behind the first half is learned.
CASES = [Case((1, V, 2, 3, 4), (3,)), Case((5, 6, 7)), Case((V, 8, 9), (1,))]
# Each parameter costs two runs of the oracle: few heads, all of them in two hybrid layers.
SMALL = {"num_layers": 2, "head_dim": 2, "mlp_width": 4, "vocab_size": 12}
STEP = 1e-4


def oracle_loss(weights, cfg):
  """Mean cross-entropy of all learned tokens."""
  losses = []
  for case in CASES:
    scores, ids = oracle.logits(weights, cfg, case.ids, case.videos(), LENGTH), case.ids
    for i in range(-(len(ids) // 2), 0):  # From the end, where a token is one position.
      row = scores[i - 1]
      losses.append(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[ids[i]])
  return np.mean(losses)


def differences(weights, cfg, name):
  """(loss(w + h) - loss(w - h)) / 2 h of each element of a parameter; the error is of order h^2."""
  found = np.zeros_like(weights[name])
  for index in np.ndindex(found.shape):
    for sign in (1, -1):
      changed = weights[name].copy()
      changed[index] += sign * STEP
      found[index] += sign * oracle_loss({**weights, name: changed}, cfg) / (2 * STEP)
  return found


@pytest.mark.parametrize(
  ("gate", "queries"),
  [
    ("dynamic", "text-only-masksystem"),
    ("dynamic-tanh", "text-only"),
    ("dynamic-tanh-warmup", "text-only"),
    ("dynamic-tanh-warmup", "all"),
  ],
)
def test_every_hybrid_parameter_gets_the_gradient_of_the_equations(gate, queries):
  hybrid = {"every": 1, "max_depth": 2, "gate": gate, "queries": queries}
  cfg = config(decoder=SMALL, hybrid=hybrid)
  batch, slow = batch_of([CASES], geometry_of(cfg))
  graphdef, params = graphdef_of(cfg), random_params(cfg, 0)

  def loss(params):
    model = nnx.merge(graphdef, params)
    hidden = model.forward(batch, slow)
    return next_token_loss(hidden, model.decoder.logits, batch.targets, batch.loss_weights)[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  weights = weights_of(nnx.merge(graphdef, params))
  np.testing.assert_allclose(value, oracle_loss(weights, cfg), rtol=1e-6)

  found = {name: x for name, x in flatten(gradient).items() if name.startswith("adapters.")}
  parts = {name.removeprefix("adapters.") for name in found}
  expected_parts = {"kv.kernel", "kv.bias", "gate.kernel", "gate.bias"}
  assert parts == expected_parts | ({"warm_up"} if "warmup" in gate else set())
  for name, ours in found.items():
    expected = differences(weights, cfg, name)
    assert np.abs(expected).max() > 1e-4, name
    # float32 rounds sums whose terms cancel, so the error is one of the largest element's: 1e-6
    # of it is found. The differences themselves are good to 1e-8.
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=name)
