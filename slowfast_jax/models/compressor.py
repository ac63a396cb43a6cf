# SPDX-License-Identifier: Apache-2.0
"""The compressor: slow tokens to few fast tokens (paper section 3.1).

Every temporal rule, strided sampling, average pooling and its adaptive fallback with overlapping
windows, is a row-stochastic matrix built on the host. On the device the compressor is one einsum
and a spatial pool: no dynamic shapes and no gathers.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def pooling_matrix(
  num_frames: int, sampling_stride: int, temporal_stride: int, min_fast_frames: int
) -> Float[np.ndarray, "Q F"]:
  """The temporal map of the compressor: fast frame q = sum over f of M[q, f] * slow frame f.

  A single frame is its own fast frame. Frames that the strides leave out have a column of zeros.

  Raises:
    ValueError: an argument is not positive.
  """
  arguments = (num_frames, sampling_stride, temporal_stride, min_fast_frames)
  if min(arguments) < 1:
    raise ValueError(
      "num_frames, sampling_stride, temporal_stride and min_fast_frames must all be at least 1, "
      f"got {arguments}."
    )
  if num_frames == 1:
    return np.ones((1, 1), np.float32)
  kept = _sampled_frames(num_frames, sampling_stride, min_fast_frames)
  windows = _windows(len(kept), temporal_stride, min_fast_frames)
  matrix = np.zeros((len(windows), num_frames), np.float32)
  for q, (start, stop) in enumerate(windows):
    for frame in kept[start:stop]:
      matrix[q, frame] += 1.0 / (stop - start)
  return matrix


def _sampled_frames(num_frames: int, stride: int, minimum: int) -> list[int]:
  if stride == 1 or num_frames < minimum:
    return list(range(num_frames))
  count = max(num_frames // stride, minimum)
  return [min(int(i * (num_frames / count)), num_frames - 1) for i in range(count)]


def _windows(count: int, stride: int, minimum: int) -> list[tuple[int, int]]:
  """Half-open spans of sampled frames that are averaged into one fast frame each."""
  if stride == 1:
    return [(i, i + 1) for i in range(count)]
  if count // stride >= minimum:
    return [(i * stride, (i + 1) * stride) for i in range(count // stride)]
  out = min(count, minimum)
  return [(i * count // out, math.ceil((i + 1) * count / out)) for i in range(out)]


def spatial_pool(x: Float[Array, "*L P D"], stride: int) -> Float[Array, "*L p D"]:
  """Averages stride x stride squares of each frame's square token grid; leftover rows are dropped.

  Raises:
    ValueError: P is not a square, or the grid is smaller than the stride.
  """
  if stride == 1:
    return x
  side = math.isqrt(x.shape[-2])
  if side * side != x.shape[-2]:
    raise ValueError(f"Spatial pooling needs a square token grid, got {x.shape[-2]} tokens.")
  if side < stride:
    raise ValueError(f"A {side} x {side} token grid cannot be pooled with stride {stride}.")
  # A product with ones: by its own estimate, what XLA for TPU makes of windows takes four times as
  # long.
  squares = jnp.asarray(_squares(side, stride), x.dtype)
  sums = jnp.einsum(
    "pP,...PD->...pD", squares, x, precision="highest", preferred_element_type=jnp.float32
  )
  return (sums / stride**2).astype(x.dtype)


def _squares(side: int, stride: int) -> Float[np.ndarray, "p P"]:
  """1 where a token of a grid lies in a square."""
  out = side // stride
  line = np.zeros((out, side), np.float32)
  line[np.arange(out * stride) // stride, np.arange(out * stride)] = 1.0
  return np.kron(line, line)


def compress(
  slow: Float[Array, "B F P D"], pooling: Float[Array, "B Q F"], spatial_stride: int
) -> Float[Array, "B Q p D"]:
  """Fast tokens of every row: the temporal map, then the spatial pool (semantics: compressor)."""
  pooled = jnp.einsum("BQF,BFPD->BQPD", pooling.astype(slow.dtype), slow)
  return spatial_pool(pooled, spatial_stride)
