# SPDX-License-Identifier: Apache-2.0
"""Temporal augmentation: which of a record's frames a training sample shows.

A record holds frames that were sampled once. Where it holds more than the model takes, an epoch can
show others than the one before: the frames keep their even spacing and start at a random offset.
"""

import numpy as np
from jaxtyping import Int

from slowfast_jax.data.mixture import derive_seed


def sample_seed(seed: int, source: int, sample: int, epoch: int) -> int:
  """The seed of a sample's augmentation: of nothing else, so that a resumed run draws the same."""
  return derive_seed(seed, 5, source, sample, epoch)


def offset_frames(num_stored: int, num_wanted: int, seed: int) -> Int[np.ndarray, " n"]:
  """Chooses frames at a random sampling offset.

  Frame i of n is the stored frame floor((i S + r) / n) of S, with one r for all of them, drawn from
  0 to S - 1 alike. So the frames are spread over the whole video, as the sampler "uniform" spreads
  them, S / n apart, and every stored frame is shown with the same probability n / S. The endings of
  a video, which the sampler always shows, are shown as rarely as the rest.

  Args:
    num_stored: S, frames of the record.
    num_wanted: n, frames of the sample; a record with no more than these is shown as it is.
    seed: of r, see `sample_seed`.
  """
  if num_stored <= num_wanted:
    return np.arange(num_stored)
  # The raw generator: its numbers are the same in every release of NumPy.
  offset = int(np.random.PCG64(seed).random_raw()) % num_stored
  return (np.arange(num_wanted) * num_stored + offset) // num_wanted
