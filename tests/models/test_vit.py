# SPDX-License-Identifier: Apache-2.0
"""The encoders and the projector against NumPy, and which hidden state is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.models import vit
from slowfast_jax.models.projector import Projector, projector_depth
from slowfast_jax.models.vit import CLIP_MEAN, CLIP_STD, ViT, ViTConfig
from tests.models import oracle
from tests.models.tiny import random_module, weights_of

LAYERS = 3


def config(family="siglip", **changes):
  sizes = {"image_size": 7, "patch_size": 2, "width": 8, "num_heads": 2, "mlp_width": 12}
  return ViTConfig(family, **sizes | {"num_layers": LAYERS} | changes)


def frames(size=7, count=2):
  return np.random.default_rng(0).normal(0, 1, (count, size, size, 3)).astype(np.float32)


def run(vit, pixels):
  # Eager: the tests share their small programs. An empty scan cannot be eager.
  with jax.disable_jit(vit.cfg.num_blocks > 0):
    return np.asarray(vit(jnp.asarray(pixels)))


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("select", [-1, -2, LAYERS, 1, 0, -4])
def test_it_is_what_the_equations_give(family, select):
  """Counted as Hugging Face does, of the whole encoder: 0 is the input of the first block."""
  whole = random_module(lambda r: ViT(config(family, select_layer=-1), rngs=r))
  cfg = config(family, select_layer=select)
  vit = random_module(lambda r: ViT(cfg, rngs=r))
  weights = {f"vision.{name}": x for name, x in weights_of(whole).items()}
  kept = len(vit.blocks.fc1.bias[...])
  assert kept == range(LAYERS + 1)[select]
  for name in ("patch", "position", "class_token", "pre_norm"):
    setattr(vit, name, getattr(whole, name))
  copy_blocks(whole, vit, kept)
  got = run(vit, frames())
  assert got.shape == (2, 9, 8)
  for one, pixels in zip(got, frames()):
    expected = oracle.drop_class(cfg, oracle.hidden_states(weights, cfg, pixels)[select])
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def copy_blocks(source, target, count):
  for name in ("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"):
    a, b = getattr(source.blocks, name), getattr(target.blocks, name)
    for weight in ("kernel", "scale", "bias"):
      if hasattr(a, weight):
        getattr(b, weight)[...] = getattr(a, weight)[...][:count]


def test_heads_of_values_may_be_padded(monkeypatch):
  module = random_module(lambda r: ViT(config(), rngs=r))
  plain, widths = run(module, frames()), []

  def attend(q, k, v, **_):
    widths.append((q.shape[-1], v.shape[-1]))
    weights = jax.nn.softmax(jnp.einsum("BTNH,BLNH->BNTL", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("BNTL,BLNW->BTNW", weights, v)

  monkeypatch.setattr(vit, "self_attention", attend)
  monkeypatch.setattr(vit, "padded_head", lambda size: size + 3)
  np.testing.assert_allclose(run(module, frames()), plain, rtol=1e-5, atol=1e-5)
  assert set(widths) == {(4, 7)}


def test_pixels_that_fill_no_patch_are_not_seen():
  vit = random_module(lambda r: ViT(config(), rngs=r))
  pixels = frames()
  edge = pixels.copy()
  edge[:, 6:], edge[:, :, 6:] = 1e3, 1e3
  np.testing.assert_array_equal(run(vit, edge), run(vit, pixels))
  pixels[:, 5, 5] += 1
  assert np.abs(run(vit, edge) - run(vit, pixels)).max() > 1e-3


def test_sizes_and_pixels():
  siglip, clip = config(image_size=384, patch_size=14), config("clip")
  assert (siglip.side, siglip.tokens_per_frame, siglip.num_blocks) == (27, 729, 2)
  assert (siglip.pixel_mean, siglip.pixel_std) == ((0.5,) * 3, (0.5,) * 3)
  assert (clip.pixel_mean, clip.pixel_std) == (CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"family": "dino"}, "family must be 'siglip' or 'clip', got 'dino'"),
    ({"width": 9}, "width must be a multiple of num_heads, got 9 and 2"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"mlp_width": -1}, "mlp_width must be at least 1, got -1"),
    ({"select_layer": -5}, "select_layer -5 does not exist with 3 layers"),
    ({"select_layer": 4}, "select_layer 4 does not exist with 3 layers"),
    ({"image_size": 1}, "image_size must be at least patch_size, got 1 and 2"),
  ],
)
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)


# --- The projector ---


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_projector(kind, depth):
  projector = random_module(lambda r: Projector(kind, 6, 4, rngs=r))
  assert projector_depth(kind) == len(projector.layers) == depth
  x = np.random.default_rng(0).normal(0, 1, (2, 3, 6))
  expected = oracle.projector(weights_of(projector), kind, x, prefix="")
  np.testing.assert_allclose(projector(jnp.float32(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "kind", ["mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "mlp2x_gelu ", "", "mlp"]
)
def test_unknown_projectors(kind):
  with pytest.raises(ValueError, match="must be 'linear' or 'mlp<n>x_gelu', got"):
    projector_depth(kind)
