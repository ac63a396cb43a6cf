# SPDX-License-Identifier: Apache-2.0
"""Frames and still images to the squares that a vision encoder takes, offline and exactly.

PIL's bicubic filter is the one that the released encoders were trained with; OpenCV, swscale and
`jax.image` all differ from it. Pixels stay uint8: scaling and normalising happen on the device.
"""

from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Policy = Literal["siglip", "clip", "pad"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def preprocess(
  image: UInt8[np.ndarray, "h w C"],
  size: int,
  policy: Policy,
  *,
  mean: tuple[float, float, float] = CLIP_MEAN,
) -> UInt8[np.ndarray, "size size C"]:
  """Makes an image size x size, with the geometry that its encoder was trained with.

  Args:
    image: RGB pixels.
    size: the encoder's image size.
    policy: `siglip` resizes height and width alike and so changes the aspect ratio; `clip` resizes
      the shortest edge and crops the centre; `pad` first adds bands that make the image square
      (still images only: frames of a video are never padded).
    mean: the encoder's mean colour, 0 to 1, of the bands that `pad` adds.

  Raises:
    ValueError: not an RGB uint8 image, or a wrong argument.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
    raise ValueError(f"image must be uint8 [h, w, 3], got {image.dtype} {list(image.shape)}.")
  if size < 1:
    raise ValueError(f"size must be at least 1 pixel, got {size}.")
  picture = Image.fromarray(image)
  if policy == "pad":
    picture = _pad_to_square(picture, mean)
  elif policy == "clip":
    return np.array(_center_crop(_resize_shortest_edge(picture, size), size))
  elif policy != "siglip":
    raise ValueError(f'policy must be "siglip", "clip" or "pad", got {policy!r}.')
  return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def _pad_to_square(picture: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
  width, height = picture.size
  side = max(width, height)
  red, green, blue = (int(channel * 255) for channel in mean)
  square = Image.new("RGB", (side, side), (red, green, blue))
  square.paste(picture, ((side - width) // 2, (side - height) // 2))
  return square


def _resize_shortest_edge(picture: Image.Image, size: int) -> Image.Image:
  width, height = picture.size
  short, long = min(width, height), max(width, height)
  longer = int(size * long / short)
  shape = (size, longer) if width <= height else (longer, size)
  return picture.resize(shape, Image.Resampling.BICUBIC)


def _center_crop(picture: Image.Image, size: int) -> Image.Image:
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  return picture.crop((left, top, left + size, top + size))
