# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt against NumPy, its grid of tokens, its gradients, and what its config refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from slowfast_jax.models.vision import make_vision
from slowfast_jax.models.vit import CLIP_MEAN, CLIP_STD
from tests.models import oracle
from tests.models.tiny import random_module, weights_of


def config(**changes):
  sizes = {"image_size": 35, "depths": (1, 2, 1), "widths": (4, 6, 8)}
  return ConvNeXtConfig(**sizes | changes)


def frames(size=35, count=2):
  return np.random.default_rng(0).normal(0, 1, (count, size, size, 3)).astype(np.float32)


def run(model, pixels):
  with jax.disable_jit():  # Eager: the tests share their small programs.
    return np.asarray(model(jnp.asarray(pixels)))


@pytest.mark.parametrize(
  "changes",
  [{}, {"norm_eps": 0.1}, {"image_size": 20, "depths": (2,), "widths": (5,)}],
  ids=["three-stages", "eps", "one-stage"],
)
def test_it_is_what_the_equations_give(changes):
  cfg = config(**changes)
  model = random_module(lambda r: ConvNeXt(cfg, rngs=r))
  weights = {f"vision.{name}": x for name, x in weights_of(model).items()}
  pixels = frames(cfg.image_size)
  got = run(model, pixels)
  assert got.shape == (2, cfg.tokens_per_frame, cfg.width)
  for one, frame in zip(got, pixels):
    expected = oracle.convnext(weights, cfg, frame.astype(np.float64))
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_block_adds_almost_nothing():
  """Its layer scale is 1e-6."""
  cfg = config(depths=(3,), widths=(4,))
  model = jax.jit(lambda: make_vision(cfg, rngs=nnx.Rngs(0)))()
  pixels = jnp.asarray(frames())
  np.testing.assert_allclose(model(pixels), model.stem(pixels).reshape(2, 64, 4), atol=1e-4)


def test_parameters_have_the_names_that_stored_ones_have():
  names = weights_of(random_module(lambda r: ConvNeXt(config(), rngs=r)))
  shapes = {name: x.shape for name, x in names.items()}
  assert shapes["stem.conv.kernel"] == (4, 4, 3, 4)
  assert shapes["stages.1.downsample.kernel"] == (2, 2, 4, 6)
  assert shapes["stages.1.blocks.depthwise.kernel"] == (2, 7, 7, 6)
  assert shapes["stages.1.blocks.fc1.kernel"] == (2, 6, 24)
  assert shapes["stages.1.blocks.layer_scale"] == (2, 6)
  assert not [name for name in names if name.startswith("stages.0.downsample")]


def test_gradients_are_finite_and_reach_every_parameter_and_pixel():
  cfg = config(depths=(1, 1), widths=(4, 6))
  graphdef, params = nnx.split(random_module(lambda r: ConvNeXt(cfg, rngs=r)))

  @jax.jit
  def gradients(params, pixels):
    def loss(params, pixels):
      return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(pixels)))

    return jax.grad(loss, argnums=(0, 1))(params, pixels)

  of_params, of_pixels = gradients(params, jnp.asarray(frames()))
  for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
  assert np.isfinite(of_pixels).all()
  assert np.asarray(of_pixels[:, :32, :32]).all()
  assert not np.asarray(of_pixels[:, 32:]).any()  # Rows that fill no square of the stem.


def test_half_precision_stays_half():
  model = random_module(lambda r: ConvNeXt(config(), rngs=r))
  half = jax.eval_shape(model, jax.ShapeDtypeStruct((1, 35, 35, 3), jnp.bfloat16))
  assert (half.dtype, half.shape) == (jnp.bfloat16, (1, 4, 8))


def test_sizes_and_pixels():
  cfg = ConvNeXtConfig(image_size=576, depths=(3, 4, 30, 3), widths=(384, 768, 1536, 3072))
  assert (cfg.stride, cfg.side, cfg.tokens_per_frame, cfg.width) == (32, 18, 324, 3072)
  assert (cfg.pixel_mean, cfg.pixel_std) == (CLIP_MEAN, CLIP_STD)
  assert config(depths=[1, 2, 1], widths=[4, 6, 8]) == config()  # As JSON has them.
  assert hash(config(depths=[1, 2, 1])) == hash(config())


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"family": "clip"}, "family must be 'convnext', got 'clip'"),
    ({"depths": (1, 2)}, "one number for each stage, got .1, 2. and .4, 6, 8."),
    ({"depths": (), "widths": ()}, "one number for each stage"),
    ({"depths": (1, 0, 1)}, "depths and widths must be at least 1, got .1, 0, 1."),
    ({"widths": (4, 6, -8)}, "depths and widths must be at least 1"),
    ({"image_size": 15}, "image_size must be at least 16, the stride of 3 stages, got 15"),
  ],
)
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)
