# SPDX-License-Identifier: Apache-2.0
"""The settings of `slowfast prepare`, checked."""

import dataclasses
import math
import re

from slowfast_jax.data.preprocess import Policy
from slowfast_jax.data.video import Sampler
from slowfast_jax.errors import UserError


class PrepareError(UserError):
  """Videos cannot be prepared, or too many of them; what to change."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """How videos become records.

  Attributes:
    num_frames: at most so many a video.
    sampler: which frames: "uniform" or "fps", see `frame_indices`.
    target_fps: of the sampler "fps".
    size: height and width of the stored frames.
    policy: the geometry of "siglip" or "clip", see `preprocess`.
    quality: of the JPEG frames, 1 to 100.
    shards: how many files; None = one for every 256 videos.
    workers: processes; None = as many as there are cores. Changes speed, never results.
    on_error: "skip" goes past broken videos, "fail" stops at the first, "budget=1%" stops when
      more than that share is broken.
    timeout: seconds that one video may take.
    dedup: files of equal content become one record with the conversations of all.
    follow_links: links in the media folders may lead out of them.
  """

  num_frames: int = 32
  sampler: Sampler = "uniform"
  target_fps: float = 2.0
  size: int = 384
  policy: Policy = "siglip"
  quality: int = 95
  shards: int | None = None
  workers: int | None = None
  on_error: str = "skip"
  timeout: float = 300.0
  dedup: bool = False
  follow_links: bool = False

  def __post_init__(self):
    choices = {"sampler": ("uniform", "fps"), "policy": ("siglip", "clip")}
    for name, values in choices.items():
      if getattr(self, name) not in values:
        raise PrepareError(f"{name} must be one of {values}, got {getattr(self, name)!r}.")
    for name in ("num_frames", "size", "shards", "workers"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise PrepareError(f"{name} must be at least 1, got {value}.")
    for name in ("target_fps", "timeout"):
      if not 0 < getattr(self, name) < math.inf:
        raise PrepareError(f"{name} must be a positive number, got {getattr(self, name)}.")
    if not 1 <= self.quality <= 100:
      raise PrepareError(f"quality must lie between 1 and 100, got {self.quality}.")
    self.error_budget()

  def error_budget(self) -> float:
    """The share of videos that may be broken."""
    if self.on_error in ("skip", "fail"):
      return 1.0 if self.on_error == "skip" else 0.0
    match = re.fullmatch(r"budget=(\d+(?:\.\d+)?)%", self.on_error)
    if not match or float(match[1]) > 100:
      raise PrepareError(
        f'on_error must be "skip", "fail" or a share as in "budget=1%", got {self.on_error!r}.'
      )
    return float(match[1]) / 100
