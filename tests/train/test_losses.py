# SPDX-License-Identifier: Apache-2.0
"""The loss in numbers: which positions count, and what a batch without any gives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.sharding import make_mesh
from slowfast_jax.train import losses
from slowfast_jax.train.losses import SCORES_AT_ONCE, chunk_length, next_token_loss


@jax.tree_util.Partial
def same(scores):
  """Scores as the last hidden states: nothing is left to project."""
  return scores


# Probabilities 1/2, 1/4, 1/4 at every position.
LOGITS = jnp.log(jnp.array([[[2.0, 1.0, 1.0]] * 3] * 2))


def loss(targets, weights):
  value, metrics = next_token_loss(
    LOGITS, same, jnp.array(targets), jnp.array(weights, jnp.float32)
  )
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
  gradient = jax.grad(
    lambda x: next_token_loss(x, same, jnp.zeros((2, 3), int), jnp.zeros((2, 3)))[0]
  )
  np.testing.assert_array_equal(gradient(LOGITS), 0.0)


def test_bfloat16_scores_are_summed_in_float32():
  value, _ = next_token_loss(
    LOGITS.astype(jnp.bfloat16), same, jnp.zeros((2, 3), int), jnp.ones((2, 3))
  )
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, np.log(2), rtol=1e-2)


# Four rows of 24 positions of which few are learned, some rows none; weights that differ.
B, T, D, V = 4, 24, 8, 40
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(V, size=(B, T)))
WEIGHTS = jnp.asarray(
  RNG.uniform(size=(B, T)) * (RNG.uniform(size=(B, T)) < [[0.9], [0.4], [0.1], [0]])
)


def program(chunk, z_loss=1e-2, most=None):
  def run(hidden, head):
    project = jax.tree_util.Partial(jnp.matmul, b=head)
    options = {"z_loss": z_loss, "chunk": chunk, "most": most}
    return next_token_loss(hidden, project, TARGETS, WEIGHTS, **options)

  return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def plain():
  return program(None)(HIDDEN, HEAD)


@pytest.mark.parametrize("chunk", [1, 5, 8, 23])
def test_the_loss_in_chunks_is_the_plain_loss(plain, chunk):
  # Sums of some hundred numbers of size 1, in another order.
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, program(chunk)(HIDDEN, HEAD), plain)


def test_positions_beyond_the_most_that_are_learned_are_not_scored(plain):
  most = int((WEIGHTS > 0).sum(1).max())
  assert most < T
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, program(most - 1, most=most)(HIDDEN, HEAD), plain)
  scanned = program(most - 1, most=most).lower(HIDDEN, HEAD).as_text()
  assert f"tensor<2x{B}x{-(-most // 2)}x{D}xf32>" in scanned


def test_all_that_may_be_learned_are_scored_once_where_they_fit(plain):
  most = int((WEIGHTS > 0).sum(1).max())
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  compiled = program(most, most=most).lower(HIDDEN, HEAD).compile()
  jax.tree.map(check, compiled(HIDDEN, HEAD), plain)
  # In a product or without one.
  scored = re.compile(rf"f32\[(?:{B},{most}|{B * most}),{V}\]\S* dot\(")
  assert len(scored.findall(compiled.as_text())) == 1


@pytest.mark.parametrize("options", [{"chunk": 8}, {"chunk": 23, "most": 23}], ids=["parts", "one"])
def test_a_head_that_is_spread_gives_the_same_loss_and_gradients(plain, options):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  head = jax.device_put(HEAD, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))

  def run(hidden, head):
    project = jax.tree_util.Partial(_times, nnx.Param(head, axes=("embed", "vocab")))
    return next_token_loss(hidden, project, TARGETS, WEIGHTS, z_loss=1e-2, **options)

  with jax.set_mesh(mesh):
    found = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(HIDDEN, head)
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, found, plain)


def _times(head, hidden):
  return hidden @ head[...]


def test_a_frozen_head_has_no_gradient_and_changes_no_other(plain):
  def run(hidden):
    project = jax.tree_util.Partial(jnp.matmul, b=HEAD)
    return next_token_loss(hidden, project, TARGETS, WEIGHTS, z_loss=1e-2, chunk=8)[0]

  frozen = jax.jit(jax.grad(run))
  np.testing.assert_allclose(frozen(HIDDEN), plain[1][0], rtol=1e-5, atol=1e-6)
  # The product that would make one.
  made = re.compile(rf"f32\[{D},{V}\]\S* dot\(")
  assert not made.search(frozen.lower(HIDDEN).compile().as_text())
  assert made.search(program(8).lower(HIDDEN, HEAD).compile().as_text())


def test_the_z_loss_is_the_mean_squared_log_partition(plain):
  (value, metrics), _ = plain
  partition = np.log(np.exp(np.asarray(HIDDEN @ HEAD, np.float64)).sum(-1))
  expected = 1e-2 * np.sum(WEIGHTS * partition**2) / np.sum(WEIGHTS)
  np.testing.assert_allclose(metrics["z_loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(value, metrics["loss"] + expected, rtol=1e-6)
  (value, metrics), _ = program(5, z_loss=0.0)(HIDDEN, HEAD)
  assert set(metrics) == {"loss", "token_accuracy"}
  np.testing.assert_allclose(value, metrics["loss"])


def test_scores_of_all_positions_never_exist():
  def sizes(chunk):
    text = program(chunk).lower(HIDDEN, HEAD).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    return {math.prod(map(int, shape.split(","))) for shape in shapes}

  assert B * T * V in sizes(None)
  assert max(sizes(8)) < B * T * V
  assert B * 8 * V in sizes(8)


def test_the_scores_that_exist_together_are_those_of_a_device():
  assert chunk_length(4, 2**20) == SCORES_AT_ONCE // 2**22
  assert chunk_length(1, 2 * SCORES_AT_ONCE) == 1
  with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
    assert chunk_length(4, 2**20) == SCORES_AT_ONCE // 2**19


def test_v6e_scores_more_together(monkeypatch):
  monkeypatch.setattr(losses, "target_device_kind", lambda: "TPU v6 lite")
  assert chunk_length(4, 2**20) == 4 * SCORES_AT_ONCE // 2**22
