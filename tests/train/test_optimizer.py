# SPDX-License-Identifier: Apache-2.0
"""The schedule in numbers, who is decayed, and which parameters learn faster."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import abstract_params
from slowfast_jax.sharding import make_mesh, state_shardings
from slowfast_jax.train.layer_decay import layer_factors
from slowfast_jax.train.optimizer import (
  OptimizerConfig,
  make_optimizer,
  parameter_paths,
  schedule,
  split_frozen,
)
from tests.models import tiny

CONFIG = OptimizerConfig(
  learning_rate=0.1, warmup_steps=4, total_steps=12, final_fraction=0.2, max_grad_norm=1e9
)

WSD = OptimizerConfig(0.1, 4, 20, schedule="wsd", decay_steps=8, final_fraction=0.2)


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


def test_an_infinite_norm_leaves_gradients_as_they_are():
  params = make_params(layer={"kernel": 0.0})
  gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
  optimizer = make_optimizer(OptimizerConfig(0.1, 0, 100, max_grad_norm=float("inf")))
  _, (_, adam, *_) = optimizer.update(gradients, optimizer.init(params), params)
  np.testing.assert_allclose(jax.tree.leaves(adam.mu), 1e-4, rtol=1e-5)


def test_the_optimiser_is_adamw():
  params = make_params(layer={"kernel": 0.5})
  config = OptimizerConfig(0.1, 0, 10**9, weight_decay=0.3, b1=0.9, b2=0.98, max_grad_norm=1e9)
  reference = optax.adamw(0.1, b1=0.9, b2=0.98, weight_decay=0.3)
  gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.7), params)
  expected, _ = reference.update(gradients, reference.init(params), params)
  assert updates(config, params, gradients) == pytest.approx(values_of(expected), rel=1e-5)


@pytest.mark.parametrize(
  ("step", "rate"), [(0, 0.0), (2, 0.05), (4, 0.1), (12, 0.1), (14, 0.08), (20, 0.02), (99, 0.02)]
)
def test_the_rate_rises_stays_and_falls_in_a_line(step, rate):
  np.testing.assert_allclose(schedule(WSD)(step), rate, rtol=1e-5, atol=1e-9)


def test_a_group_may_have_its_own_decay():
  params = make_params(a={"kernel": 2.0}, b={"kernel": 2.0}, c={"kernel": 2.0})
  gradients = jax.tree.map(jnp.zeros_like, params)
  groups = (("^a", 1.0, 0.5), ("^b", 2.0, 0.0))
  config = OptimizerConfig(0.1, 0, 100, weight_decay=0.5, groups=groups)
  expected = {"a.kernel": -0.05, "b.kernel": 0.0, "c.kernel": -0.1}
  assert updates(config, params, gradients) == pytest.approx(expected)


def test_early_layers_of_an_encoder_learn_less():
  blocks = {"vision.blocks.fc1.kernel": 3}
  got = layer_factors({**blocks, "vision.patch.kernel": 4, "decoder.layers.x": 5}, 0.5)
  assert set(got) == {*blocks, "vision.patch.kernel"}
  np.testing.assert_allclose(got["vision.blocks.fc1.kernel"], [0.125, 0.25, 0.5])
  assert got["vision.patch.kernel"] == 0.0625
  stages = {f"vision.stages.{i}.blocks.fc1.kernel": depth for i, depth in enumerate((2, 1))}
  got = layer_factors({**stages, "vision.stages.1.downsample.bias": 9, "vision.stem.x": 9}, 0.5)
  np.testing.assert_allclose(got["vision.stages.0.blocks.fc1.kernel"], [0.125, 0.25])
  np.testing.assert_allclose(got["vision.stages.1.blocks.fc1.kernel"], [0.5])
  assert got["vision.stages.1.downsample.bias"] == 0.5
  assert got["vision.stem.x"] == 0.0625


def test_factors_of_layers_and_of_groups_multiply():
  params = make_params(vision={"patch": 1.0}, decoder={"kernel": 1.0})
  blocks = {"blocks": {"kernel": nnx.Param(jnp.ones((2, 3)))}}
  params["vision"] = {**params["vision"], **blocks}
  params = nnx.State(params)
  config = OptimizerConfig(0.1, 0, 100, groups=(("^vision", 0.5),), layer_decay=0.1)
  optimizer = make_optimizer(config)
  update, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
  np.testing.assert_allclose(
    update["vision"]["blocks"]["kernel"][...], [[-5e-4] * 3, [-5e-3] * 3], rtol=1e-5
  )
  np.testing.assert_allclose(update["vision"]["patch"][...], -5e-5, rtol=1e-5)
  np.testing.assert_allclose(update["decoder"]["kernel"][...], -0.1, rtol=1e-5)


@pytest.fixture(scope="module")
def model():
  """Parameters and gradients of a whole model."""
  params = tiny.random_params(tiny.CONFIG, 0)
  return params, tiny.randomise(params, 1)


def one_update(model, **fields):
  params, gradients = model
  optimizer = make_optimizer(OptimizerConfig(0.1, 0, 10**9, max_grad_norm=1e9, **fields))

  def run(params, gradients):
    state = optimizer.init(params)
    return state, optimizer.update(gradients, state, params)[0]

  state, update = jax.jit(run)(params, gradients)
  return flatten(state), flatten(update)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam(model):
  state, update = one_update(model, name="muon")
  _, adam = one_update(model, name="adamw")
  for name, x in update.items():
    if not name.endswith("kernel") or "depthwise" in name or name == "decoder.head.kernel":
      np.testing.assert_allclose(x, adam[name], rtol=1e-5, err_msg=name)
  # Of each layer: q is one map of 8 channels to 4 heads of 4. Muon's iteration leaves singular
  # values between 0.7 and 1.2 of what they should be.
  q = np.asarray(update["decoder.layers.attention.q.kernel"]).reshape(4, 8, 16)
  sizes = np.linalg.svd(q, compute_uv=False) / (0.1 * 0.2 * 4)
  assert 0.6 < sizes.min() < sizes.max() < 1.3
  out = np.asarray(update["decoder.layers.attention.out.kernel"]).reshape(4, 16, 8)
  sizes = np.linalg.svd(out, compute_uv=False) / (0.1 * 0.2 * 4)
  assert 0.6 < sizes.min() < sizes.max() < 1.3
  moments = [name for name in state if "layers.mlp.up.kernel" in name]
  assert len(moments) == 1, "matrices have one moment"


def test_adafactor_remembers_sums_of_rows_and_columns(model):
  wide = {"width": 128, "head_dim": 64, "mlp_width": 256}
  cfg = tiny.config(decoder=wide, hybrid=None)
  shapes = abstract_params(cfg)
  optimizer = make_optimizer(OptimizerConfig(0.1, 0, 100, name="adafactor"))
  state = flatten(jax.eval_shape(optimizer.init, shapes))
  sizes = [x.size for name, x in state.items() if "layers.mlp.up.kernel" in name]
  assert sum(sizes) < 0.02 * flatten(shapes)["decoder.layers.mlp.up.kernel"].size
  placed = jax.tree.leaves(
    state_shardings(jax.eval_shape(optimizer.init, shapes), make_mesh({"fsdp": 8}))
  )
  assert len(placed) == len(state)
  _, update = one_update(model, name="adafactor")
  assert all(np.isfinite(x).all() and np.any(x) for x in update.values())


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"name": "sgd"}, "optimizer.name must be one of .*'adafactor'.*, got 'sgd'"),
    ({"schedule": "step"}, "optimizer.schedule must be one of .*, got 'step'"),
    ({"schedule": "wsd"}, "optimizer.decay_steps .* at least 1 .* train.steps = 20, got 0"),
    ({"schedule": "wsd", "decay_steps": 17}, "between warmup_steps = 4 .*, got 17"),
    ({"layer_decay": 1.5}, "optimizer.layer_decay must be above 0, at most 1, got 1.5"),
    ({"max_grad_norm": 0.0}, "optimizer.max_grad_norm must be above 0, got 0.0; inf scales no"),
    ({"max_grad_norm": float("nan")}, "optimizer.max_grad_norm must be above 0, got nan"),
    ({"learning_rate": -1e-3}, "optimizer.learning_rate must be above 0, got -0.001"),
    ({"warmup_steps": -1}, "optimizer.warmup_steps must not be negative, got -1"),
    ({"weight_decay": -0.1}, "optimizer.weight_decay must not be negative, got -0.1"),
    ({"final_fraction": -0.1}, "optimizer.final_fraction must not be negative, got -0.1"),
    ({"b1": 1.0}, "optimizer.b1 must be at least 0 and below 1, got 1.0"),
    ({"b2": -0.5}, "optimizer.b2 must be at least 0 and below 1, got -0.5"),
    ({"groups": (("x",),)}, r"optimizer.groups: each must be \(regex, .*, got \('x',\)"),
    ({"groups": (("x", "y"),)}, "optimizer.groups: each must be"),
    ({"groups": (("x", -1.0),)}, "factors must not be negative"),
    ({"groups": (("(", 1.0),)}, r"optimizer.groups: '\(' is no regex"),
  ],
)
def test_what_makes_no_sense_is_named(fields, words):
  with pytest.raises(UserError, match=words):
    OptimizerConfig(**{"learning_rate": 0.1, "warmup_steps": 4, "total_steps": 20} | fields)
