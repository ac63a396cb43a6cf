# SPDX-License-Identifier: Apache-2.0
"""The encoders' geometry, against PIL's bicubic filter written out in NumPy."""

import inspect

import numpy as np
import pytest

from slowfast_jax.data.preprocess import CLIP_MEAN, preprocess


def random_image(height: int, width: int) -> np.ndarray:
  return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def bicubic_weights(old: int, new: int) -> np.ndarray:
  """[new, old]: Keys' kernel with a = -0.5, widened when shrinking, renormalised at the edges."""
  scale = old / new
  widening = max(scale, 1.0)
  x = np.abs((np.arange(old) + 0.5) - (np.arange(new)[:, None] + 0.5) * scale) / widening
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
  weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
  return weights / weights.sum(1, keepdims=True)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Columns first, rounded in between, as PIL does."""
  rows = np.einsum("hwc,vw->hvc", image.astype(float), bicubic_weights(image.shape[1], width))
  rows = np.clip(np.round(rows), 0, 255)
  both = np.einsum("hvc,uh->uvc", rows, bicubic_weights(image.shape[0], height))
  return np.clip(np.round(both), 0, 255)


@pytest.mark.parametrize("shape", [(60, 90), (90, 61), (20, 14), (32, 32)])
def test_siglip_resizes_to_a_square(shape):
  image = random_image(*shape)
  out = preprocess(image, 32, "siglip")
  assert out.shape == (32, 32, 3)
  assert out.dtype == np.uint8
  np.testing.assert_allclose(out, resize(image, 32, 32), atol=1)


@pytest.mark.parametrize(
  ("shape", "resized", "top", "left"),
  [
    ((60, 90), (32, 48), 0, 8),
    ((60, 91), (32, 48), 0, 8),  # 48.53 is cut off.
    ((97, 60), (51, 32), 9, 0),  # 51.73 is cut off; an odd rest of 19 leaves 9 above.
    ((20, 35), (32, 56), 0, 12),
    ((32, 32), (32, 32), 0, 0),
  ],
)
def test_clip_crops_the_centre(shape, resized, top, left):
  image = random_image(*shape)
  expected = resize(image, *resized)[top : top + 32, left : left + 32]
  out = preprocess(image, 32, "clip")
  assert out.shape == (32, 32, 3)
  np.testing.assert_allclose(out, expected, atol=1)


@pytest.mark.parametrize(("shape", "top", "left"), [((20, 33), 6, 0), ((33, 20), 0, 6)])
def test_pad_keeps_the_whole_image(shape, top, left):
  image = random_image(*shape)
  out = preprocess(image, 33, "pad")
  expected = np.full((33, 33, 3), (122, 116, 104), np.uint8)  # CLIP's mean colour, cut off.
  expected[top : top + shape[0], left : left + shape[1]] = image
  assert np.array_equal(out, expected)


def test_pad_uses_the_mean_of_the_encoder():
  out = preprocess(random_image(2, 64), 64, "pad", mean=(0.5, 0.5, 0.5))
  assert np.array_equal(out[0, 0], (127, 127, 127))
  assert tuple(int(c * 255) for c in CLIP_MEAN) == (122, 116, 104)


@pytest.mark.parametrize("policy", ["siglip", "clip", "pad"])
def test_an_image_of_the_right_size_stays_as_it_is(policy):
  image = random_image(24, 24)
  assert np.array_equal(preprocess(image, 24, policy), image)


def test_extreme_shapes():
  for policy in ("siglip", "clip", "pad"):
    assert preprocess(random_image(1, 500), 16, policy).shape == (16, 16, 3)


@pytest.mark.parametrize(
  ("image", "size", "policy", "text"),
  [
    (np.zeros((4, 4, 3), np.float32), 4, "clip", r"uint8 \[h, w, 3\], got float32 \[4, 4, 3\]"),
    (np.zeros((4, 4), np.uint8), 4, "clip", r"uint8 \[h, w, 3\], got uint8 \[4, 4\]"),
    (np.zeros((4, 4, 4), np.uint8), 4, "clip", r"got uint8 \[4, 4, 4\]"),
    (np.zeros((0, 4, 3), np.uint8), 4, "clip", r"got uint8 \[0, 4, 3\]"),
    (np.zeros((4, 4, 3), np.uint8), 0, "clip", "size must be at least 1 pixel, got 0"),
    (np.zeros((4, 4, 3), np.uint8), 4, "fit", 'must be "siglip", "clip" or "pad", got \'fit\''),
  ],
)
def test_wrong_arguments_are_named(image, size, policy, text):
  with pytest.raises(ValueError, match=text):
    inspect.unwrap(preprocess)(image, size, policy)  # Without the tests' check of annotations.
