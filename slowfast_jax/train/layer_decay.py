# SPDX-License-Identifier: Apache-2.0
"""Layer-wise decay of the encoder's learning rate (Clark et al., arXiv 2003.10555, section 3).

Early layers of a pretrained encoder know what every picture needs, so they should move least. The
last block learns at the decay factor, the one before at its square, and so on; what comes before
the blocks, as the patches' projection, is one further.
"""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

# Blocks are stacked: a transformer has one stack, a ConvNeXt one a stage.
_STACK = re.compile(r"^vision\.(?:stages\.(\d+)\.)?blocks\.")
_STAGE = re.compile(r"^vision\.stages\.(\d+)\.")


def layer_factors(
  lengths: Mapping[str, int], decay: float
) -> dict[str, Float[np.ndarray, "..."] | float]:
  """Factors of the learning rate by parameter path: of each layer of a stack, or one number.

  Args:
    lengths: the first axis of every parameter.
    decay: the factor from a block to the one before it.
  """
  if decay == 1:
    return {}
  depths: dict[int, int] = {}  # Blocks of each stage.
  for path, length in lengths.items():
    if match := _STACK.match(path):
      depths[int(match[1] or 0)] = length
  factors: dict[str, Float[np.ndarray, ...] | float] = {}
  for path in lengths:
    if not path.startswith("vision."):
      continue
    match = _STAGE.match(path)
    stage = int(match[1]) if match else 0
    above = sum(depth for other, depth in depths.items() if other > stage)
    depth = depths.get(stage, 0)
    if _STACK.match(path):
      factors[path] = decay ** (above + depth - np.arange(depth))
    else:
      # A stage's own downsampling learns as its first block, all else of the encoder as its stem.
      factors[path] = decay ** (above + depth + (match is None))
  return factors
