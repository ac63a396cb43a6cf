# SPDX-License-Identifier: Apache-2.0
"""Words for quadrants: the loss against a computation by hand, and what its gradient teaches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slowfast_jax.demo.align import word_loss
from slowfast_jax.models.slowfast import graphdef_of
from tests.generate.tiny import CONFIG, SIZE, make_export

EXPORT = make_export(hybrid=False)
GRAPHDEF = graphdef_of(EXPORT.model)
# Red, green and blue, by tokens that stand for them.
IDS = jnp.array([70, 80, 90])
COLOURS = np.array([(220, 0, 0), (0, 220, 0), (0, 0, 220)], np.uint8)


def pictures(count, seed=0):
  """Each quadrant is red, green or blue, and its target says so."""
  chosen = np.random.default_rng(seed).integers(0, 3, (count, 2, 2))
  images = COLOURS[chosen].repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)
  return images[:, None], np.eye(3, dtype=np.float32)[chosen.reshape(count, 4)]


@jax.jit
def loss_and_gradient(params, frames, targets):
  return jax.value_and_grad(
    lambda params: word_loss(nnx.merge(GRAPHDEF, params), frames, targets, IDS)
  )(params)


@pytest.fixture(scope="module")
def batch():
  return pictures(32)


@pytest.fixture(scope="module")
def gradient(batch):
  return loss_and_gradient(EXPORT.params, *batch)[1]


def test_it_is_what_a_hand_computation_gives(batch):
  images, targets = batch
  model = nnx.merge(GRAPHDEF, EXPORT.params)
  side = CONFIG.vision.side
  tokens = np.asarray(jax.jit(lambda f: model.encode(f, jnp.float32))(images))
  grid = tokens.reshape(len(images), side, side, -1)
  words = np.asarray(EXPORT.params["decoder"]["embed"]["embedding"][...])[np.asarray(IDS)]
  total = 0.0
  for picture, labels in zip(grid, targets):
    for region in range(4):
      y, x = divmod(region, 2)
      part = picture[y * side // 2 : (y + 1) * side // 2, x * side // 2 : (x + 1) * side // 2]
      for word, yes in zip(words, labels[region]):
        p = 1 / (1 + np.exp(-(4 * part.mean(axis=(0, 1)) @ word - 2)))
        total -= np.log(p if yes else 1 - p)
  loss, _ = loss_and_gradient(EXPORT.params, images, targets)
  np.testing.assert_allclose(loss, total / (4 * len(images)), rtol=1e-4)


def test_only_the_encoder_and_the_words_learn(gradient):
  moved = jax.tree.map(lambda g: bool(jnp.any(g != 0)), gradient)
  assert any(jax.tree.leaves(moved["vision"]))
  assert all(jax.tree.leaves(moved["projector"]))
  assert not any(jax.tree.leaves(moved["decoder"]["layers"]))
  rows = np.abs(np.asarray(gradient["decoder"]["embed"]["embedding"][...])).sum(axis=1)
  assert np.flatnonzero(rows).tolist() == IDS.tolist()


def test_the_gradient_is_the_slope(batch, gradient):
  """A little step along it changes the loss by the squared norm."""
  flat = jax.tree.leaves(jax.tree.map(lambda g: jnp.sum(g**2), gradient))
  step = 1e-3 / float(sum(flat))
  sides = [
    jax.tree.map(lambda p, g, s=sign: p + s * step * g, EXPORT.params, gradient) for sign in (1, -1)
  ]
  up, down = (float(loss_and_gradient(params, *batch)[0]) for params in sides)
  np.testing.assert_allclose(up - down, 2e-3, rtol=0.1)


def test_quadrants_learn_their_own_words(batch):
  """From chance to unseen pictures: a mixed-up order of the quadrants could not."""
  optimizer = optax.adam(3e-3)

  @jax.jit
  def fit(params, frames, targets):
    def step(carry, _):
      params, state = carry
      loss, gradient = loss_and_gradient(params, frames, targets)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=80)
    return params, losses

  params, losses = fit(EXPORT.params, *batch)
  unseen, _ = loss_and_gradient(params, *pictures(32, seed=1))
  assert losses[0] > 1
  assert unseen < 0.3
