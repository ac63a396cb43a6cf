# SPDX-License-Identifier: Apache-2.0
"""One step: parts of a batch, who learns, and what a loss that is not finite may change."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.train.optimizer import OptimizerConfig, make_optimizer, split_frozen
from slowfast_jax.train.step import TrainState, make_train_step
from tests.models.tiny import CONFIG, ROWS, batch_of, geometry_of, random_params

# A state is built of shapes and of shardings too, which no array annotation describes.
TrainState.__init__ = inspect.unwrap(TrainState.__init__)

OPTIMIZER = OptimizerConfig(1e-3, 0, 100, groups=(("^vision", 0.0),), max_grad_norm=1e9)


def program(**options):
  step = make_train_step(CONFIG, OPTIMIZER, dtype=jnp.float32, remat="none", **options)
  # Programs that run once or twice.
  return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def batch():
  """Rows with one to five samples, a text among them, with few or many targets."""
  return batch_of(ROWS[:8], geometry_of(CONFIG))[0]


@pytest.fixture(scope="module")
def state():
  params = random_params(CONFIG, 0)
  learning, _ = split_frozen(params, OPTIMIZER)
  return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(OPTIMIZER).init(learning))


@pytest.fixture(scope="module")
def whole():
  return program(z_loss=1e-3)


@pytest.fixture(scope="module")
def done(whole, state, batch):
  return whole(state, batch)


def test_four_times_two_rows_are_eight(done, state, batch):
  expected, expected_metrics = done
  got, metrics = program(z_loss=1e-3, accumulation=4)(state, batch)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  ours, theirs = flatten(got.opt_state), flatten(expected.opt_state)
  assert any(".mu." in name for name in ours)
  largest = max(np.abs(x).max() for name, x in theirs.items() if ".mu." in name)
  for name, value in ours.items():
    # Adam's first moment is the gradient: sums of the same terms in another order.
    np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-6 * largest, err_msg=name)


def test_frozen_parts_stay_bit_for_bit_and_have_no_memory(done, state):
  before, after = flatten(state.params), flatten(done[0].params)
  frozen = [name for name in before if name.startswith("vision")]
  for name in frozen:
    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
  assert any(np.any(after[name] != before[name]) for name in set(before) - set(frozen))
  assert not [name for name in flatten(done[0].opt_state) if "vision" in name]


def test_norms_of_the_parts_that_learn_make_the_whole(done):
  metrics = done[1]
  parts = {name for name in metrics if name.startswith("grad_norm/")}
  assert parts == {f"grad_norm/{part}" for part in ("projector", "decoder", "adapters")}
  norm = np.sqrt(sum(float(metrics[name]) ** 2 for name in parts))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
  assert metrics["skipped"] == 0


def test_a_loss_that_is_not_finite_changes_nothing(whole, done, batch):
  state, _ = done
  bad = dataclasses.replace(batch, loss_weights=batch.loss_weights.at[0].mul(jnp.inf))
  after, metrics = whole(state, bad)
  assert metrics["skipped"] == 1
  assert not np.isfinite(metrics["loss"])
  assert int(after.step) == int(state.step) + 1
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)


def test_bfloat16_learns_with_float32_parameters_gradients_and_moments(state, batch):
  step = make_train_step(CONFIG, OPTIMIZER, dtype=jnp.bfloat16, remat="full")
  after, metrics = jax.eval_shape(step, state, batch)
  arrays = [*jax.tree.leaves((after.params, after.opt_state)), *metrics.values()]
  assert {x.dtype for x in arrays} == {jnp.dtype("float32"), jnp.dtype("int32")}
