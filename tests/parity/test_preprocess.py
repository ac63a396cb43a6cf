# SPDX-License-Identifier: Apache-2.0
"""Images to normalised pixels, against the image processors of Hugging Face that use PIL."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from slowfast_jax.data.preprocess import preprocess
from tests.models import tiny

SIZE = 30
SQUARE = {"height": SIZE, "width": SIZE}
CENTRE = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# Our policy, our encoder, and who does the same.
CASES = {
  "siglip": ("siglip", "siglip", SiglipImageProcessorPil(size=SQUARE)),
  "clip": ("clip", "clip", CLIPImageProcessorPil(**CENTRE)),
  "pad-clip": ("pad", "clip", LlavaImageProcessorPil(do_pad=True, **CENTRE)),
  "pad-siglip": ("pad", "siglip", LlavaImageProcessorPil(do_pad=True, **CENTRE, **HALVES)),
}
# Height and width: odd, smaller than the encoder's size, just beside it, and very long.
SHAPES = (
  (61, 91),
  (97, 60),
  (17, 23),
  (23, 16),
  (30, 30),
  (29, 31),
  (31, 29),
  (33, 200),
  (211, 31),
)


def image(height, width):
  """A ramp under noise that reaches both ends of the scale."""
  rng = np.random.default_rng([height, width])
  ramp = np.linspace(0, 255, height)[:, None, None] * np.linspace(0, 1, width)[:, None]
  return np.clip(ramp + rng.normal(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)


def device_normalise(family):
  """uint8 frames [B, h, w, 3] as the model's own encoder is given them."""
  model = tiny.random_model(tiny.config(vision={"family": family}))
  model.vision = lambda frames, policy: einops.rearrange(frames, "B h w C -> B (h w) C")
  model.projector = lambda tokens: tokens

  def normalise(frames):
    tokens = model.encode(frames[None], jnp.float32)[0]
    return einops.rearrange(tokens, "B (h w) C -> B h w C", h=frames.shape[1])

  return jax.jit(normalise)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_the_processor(case):
  policy, family, processor = CASES[case]
  vision = tiny.config(vision={"family": family}).vision
  images = [image(*shape) for shape in SHAPES]
  ours = np.stack([preprocess(x, SIZE, policy, mean=vision.pixel_mean) for x in images])

  pictures = [Image.fromarray(x) for x in images]
  raw = processor(pictures, do_rescale=False, do_normalize=False)["pixel_values"]
  raw = einops.rearrange(np.stack(raw), "B C h w -> B h w C")
  assert raw.dtype == ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, raw)

  normalised = einops.rearrange(np.stack(processor(pictures)["pixel_values"]), "B C h w -> B h w C")
  got = device_normalise(family)(ours)
  np.testing.assert_allclose(got, normalised, rtol=0, atol=1e-5)
