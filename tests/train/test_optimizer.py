# SPDX-License-Identifier: Apache-2.0
"""The schedule in numbers, who is decayed, and which parameters learn faster."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slowfast_jax.train.optimizer import (
  OptimizerConfig,
  make_optimizer,
  parameter_paths,
  schedule,
  split_frozen,
)

CONFIG = OptimizerConfig(
  learning_rate=0.1, warmup_steps=4, total_steps=12, final_fraction=0.2, max_grad_norm=1e9
)


def make_params(**values):
  params = {
    name: {key: nnx.Param(jnp.asarray(value)) for key, value in part.items()}
    for name, part in values.items()
  }
  return nnx.State(params)


def values_of(params):
  return dict(zip(parameter_paths(params), map(float, jax.tree.leaves(params))))


def updates(config, params, gradients, steps=1):
  optimizer = make_optimizer(config)
  state = optimizer.init(params)
  for _ in range(steps):
    update, state = optimizer.update(gradients, state, params)
  return values_of(update)


@pytest.mark.parametrize(
  ("step", "rate"),
  [(0, 0.0), (1, 0.025), (2, 0.05), (4, 0.1), (6, 0.0882843), (8, 0.06), (12, 0.02), (99, 0.02)],
)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(step, rate):
  np.testing.assert_allclose(schedule(CONFIG)(step), rate, rtol=1e-5, atol=1e-9)


def test_a_run_that_is_all_warm_up_has_a_schedule():
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, total_steps=5)
  np.testing.assert_allclose(schedule(config)(5), 0.05, rtol=1e-6)


def test_the_first_matching_group_sets_the_factor():
  params = make_params(
    vision={"kernel": 1.0}, adapters={"kernel": 1.0, "warm_up": 1.0}, decoder={"kernel": 1.0}
  )
  gradients = jax.tree.map(jnp.ones_like, params)
  groups = (("^vision", 0.5), (r"warm_up$", 10.0), ("^adapters", 2.0))
  config = OptimizerConfig(0.1, 0, 100, max_grad_norm=1e9, groups=groups)
  # Adam's first step is the sign of the gradient.
  expected = {
    "vision.kernel": -0.05,
    "adapters.kernel": -0.2,
    "adapters.warm_up": -1.0,
    "decoder.kernel": -0.1,
  }
  got = updates(config, params, gradients)
  assert got == pytest.approx(expected, rel=1e-5)


def test_a_group_with_factor_0_is_frozen():
  params = make_params(vision={"kernel": 1.0}, decoder={"kernel": 2.0, "bias": 3.0})
  groups = (("decoder.bias", 0.1), ("vision|bias", 0.0))  # The first match counts.
  learning, frozen = split_frozen(params, OptimizerConfig(0.1, 0, 100, groups=groups))
  assert values_of(learning) == {"decoder.bias": 3.0, "decoder.kernel": 2.0}
  assert values_of(frozen) == {"vision.kernel": 1.0}
  assert values_of(nnx.merge_state(learning, frozen)) == values_of(params)


def test_only_matrices_are_decayed():
  params = make_params(
    layer={"kernel": 2.0, "bias": 2.0, "scale": 2.0, "warm_up": 2.0, "embedding": 2.0}
  )
  gradients = jax.tree.map(jnp.zeros_like, params)
  config = OptimizerConfig(0.1, 0, 100, weight_decay=0.5)
  assert updates(config, params, gradients) == pytest.approx(
    {
      "layer.kernel": -0.1,
      "layer.embedding": -0.1,
      "layer.bias": 0.0,
      "layer.scale": 0.0,
      "layer.warm_up": 0.0,
    }
  )


def test_gradients_are_scaled_down_to_the_norm():
  """Adam forgets the scale of one gradient, but not that one step's was larger than another's."""
  params = make_params(layer={"kernel": 0.0})
  clipped = make_optimizer(OptimizerConfig(1.0, 0, 100, b1=0.0, b2=0.5, max_grad_norm=1.0))
  plain = make_optimizer(OptimizerConfig(1.0, 0, 100, b1=0.0, b2=0.5, max_grad_norm=1e9))
  rate = float(schedule(OptimizerConfig(1.0, 0, 100))(1))
  # v = (1 - b2) (b2 g1² + g2²) / (1 - b2²): 1 for gradients 1, 1 and 11 for gradients 1, 4.
  for optimizer, expected in ((clipped, 1.0), (plain, 4 / np.sqrt(11))):
    state = optimizer.init(params)
    for size in (1.0, 4.0):
      gradients = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params)
      update, state = optimizer.update(gradients, state, params)
    assert values_of(update)["layer.kernel"] == pytest.approx(-expected * rate, rel=1e-4)


def test_the_optimiser_is_adamw():
  params = make_params(layer={"kernel": 0.5})
  config = OptimizerConfig(0.1, 0, 10**9, weight_decay=0.3, b1=0.9, b2=0.98, max_grad_norm=1e9)
  reference = optax.adamw(0.1, b1=0.9, b2=0.98, weight_decay=0.3)
  gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.7), params)
  expected, _ = reference.update(gradients, reference.init(params), params)
  assert updates(config, params, gradients) == pytest.approx(values_of(expected), rel=1e-5)
