# SPDX-License-Identifier: Apache-2.0
"""What the HTML pages of evaluations share: they load nothing, run nothing, and escape all text."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from slowfast_jax.data.video import read_frames
from slowfast_jax.errors import UserError
from slowfast_jax.eval.pictures import read_pictures
from slowfast_jax.eval.tasks.media import find_video

T = TypeVar("T")

# Pixels of a thumbnail's longer side: about 3 kB each.
_SIDE = 128
# Frames of a strip, spread over those that the model saw.
_STRIP = 8
# Characters of a text: subtitles in a prompt can be pages.
_TEXT = 1500


def render(template: str, **values: Any) -> str:
  """A page from a template of this folder."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
  environment.filters["short"] = lambda text: text if len(text) <= _TEXT else f"{text[:_TEXT]} …"
  return environment.get_template(template).render(**values)


def spread(items: Sequence[T], most: int) -> list[T]:
  """At most so many of the items, evenly from first to last."""
  count = min(most, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def strip(video: Path, frames: Mapping[str, Any]) -> list[dict[str, Any]] | str:
  """Small pictures of what a model saw, with their seconds; or why there are none.

  Args:
    video: a file, or a folder of pictures.
    frames: how they were chosen, the fields of a `VideoConfig`.
  """
  path, count = find_video(video), frames["num_frames"]
  try:
    if path.is_dir():
      images, times = read_pictures(path, count, _thumbnail)
    else:
      found = read_frames(
        path,
        count,
        sampler=frames["sampler"],
        target_fps=frames["target_fps"],
        transform=_thumbnail,
      )
      images, times = list(found.images), found.timestamps
  except UserError as error:
    return str(error)
  except Exception as error:  # One strange file must not cost the page.
    return f"{path}: {type(error).__name__}: {error}"
  return [
    {"uri": uri, "time": float(time)} for uri, time in spread(list(zip(images, times)), _STRIP)
  ]


def _thumbnail(image: UInt8[np.ndarray, "h w C"]) -> str:
  """The picture as a data address."""
  picture = Image.fromarray(image)
  picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
  pixels = np.ascontiguousarray(np.asarray(picture))
  data = simplejpeg.encode_jpeg(pixels, quality=80, colorspace="RGB", colorsubsampling="420")
  return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
