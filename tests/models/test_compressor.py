# SPDX-License-Identifier: Apache-2.0
"""The pooling map by hand, as a property, and against the rules written frame by frame."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slowfast_jax.models.compressor import compress, pooling_matrix, spatial_pool
from tests.models import oracle


def matrix_of(rows, num_frames):
  """A matrix by the frames that each row averages."""
  matrix = np.zeros((len(rows), num_frames))
  for q, frames in enumerate(rows):
    for frame in frames:
      matrix[q, frame] += 1 / len(frames)
  return matrix


# --- The temporal map ---


@pytest.mark.parametrize(
  ("arguments", "rows"),
  [
    # Released: every 4, every 6, and every 4 of every second frame.
    ((64, 1, 4, 16), [range(4 * q, 4 * q + 4) for q in range(16)]),
    ((96, 1, 6, 16), [range(6 * q, 6 * q + 6) for q in range(16)]),
    ((128, 2, 4, 16), [(8 * q, 8 * q + 2, 8 * q + 4, 8 * q + 6) for q in range(16)]),
    # A tail shorter than the stride is dropped.
    ((67, 1, 4, 16), [range(4 * q, 4 * q + 4) for q in range(16)]),
    ((9, 1, 4, 1), [range(0, 4), range(4, 8)]),
    # Too few for the stride: windows of 2.5 frames, rounded outwards, overlap.
    ((10, 1, 4, 4), [(0, 1, 2), (2, 3, 4), (5, 6, 7), (7, 8, 9)]),
    ((5, 1, 2, 3), [(0, 1), (1, 2, 3), (3, 4)]),
    ((7, 1, 7, 2), [(0, 1, 2, 3), (3, 4, 5, 6)]),
    # Fewer frames than the minimum: each is its own fast frame.
    ((3, 1, 4, 16), [(0,), (1,), (2,)]),
    ((3, 2, 1, 4), [(0,), (1,), (2,)]),
    ((3, 2, 4, 4), [(0,), (1,), (2,)]),
    # Sampling: equal steps of num_frames / count, rounded down.
    ((7, 2, 1, 1), [(0,), (2,), (4,)]),
    ((5, 2, 1, 4), [(0,), (1,), (2,), (3,)]),
    ((20, 2, 1, 16), [(i,) for i in (0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18)]),
    ((16, 2, 1, 16), [(i,) for i in range(16)]),
    # Both, and the second falls back to windows of the frames that the first left.
    ((20, 2, 4, 4), [(0, 2, 4), (4, 6, 8), (10, 12, 14), (14, 16, 18)]),
    # Nothing is asked for; a still image.
    ((3, 1, 1, 16), [(0,), (1,), (2,)]),
    ((1, 4, 4, 16), [(0,)]),
    ((1, 1, 1, 1), [(0,)]),
  ],
)
def test_pooling_by_hand(arguments, rows):
  got = pooling_matrix(*arguments)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, matrix_of(rows, arguments[0]), rtol=1e-7)


@given(
  num_frames=st.integers(1, 200),
  sampling_stride=st.integers(1, 9),
  temporal_stride=st.integers(1, 9),
  min_fast_frames=st.integers(1, 40),
)
@example(num_frames=64, sampling_stride=1, temporal_stride=4, min_fast_frames=16)
@example(num_frames=2, sampling_stride=2, temporal_stride=2, min_fast_frames=1)
def test_every_fast_frame_is_a_mean_of_frames_in_order(
  num_frames, sampling_stride, temporal_stride, min_fast_frames
):
  strides = sampling_stride, temporal_stride
  matrix = pooling_matrix(num_frames, *strides, min_fast_frames)
  # The strides leave the minimum, or all there are.
  assert len(matrix) >= min(num_frames, min_fast_frames)
  assert len(matrix) <= max(num_frames // sampling_stride // temporal_stride, min_fast_frames)
  np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
  assert (matrix >= 0).all()
  firsts = [np.flatnonzero(row)[0] for row in matrix]
  lasts = [np.flatnonzero(row)[-1] for row in matrix]
  assert (np.diff(firsts) > 0).all()
  assert (np.diff(lasts) > 0).all()
  # Frame f is the f-th unit vector, so that its fast tokens spell the matrix.
  frames = np.eye(num_frames)[:, None, :]
  expected = oracle.fast_tokens(frames, *strides, 1, min_fast_frames)
  np.testing.assert_allclose(matrix, expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", [0, -1])
@pytest.mark.parametrize("argument", range(4))
def test_arguments_must_be_positive(argument, wrong):
  arguments = [8, 2, 2, 4]
  arguments[argument] = wrong
  with pytest.raises(ValueError, match=rf"must all be at least 1, got \({arguments[0]}, "):
    pooling_matrix(*arguments)


# --- The grid of a frame ---


def test_squares_of_the_grid_are_averaged():
  grid = jnp.arange(16.0).reshape(1, 16, 1)
  np.testing.assert_array_equal(spatial_pool(grid, 2)[0, :, 0], [2.5, 4.5, 10.5, 12.5])
  np.testing.assert_array_equal(spatial_pool(grid, 4)[0, :, 0], [7.5])


def test_squares_of_half_precision_are_summed_in_float32():
  grid = jnp.array([[256.0], [1.0], [1.0], [2.0]], jnp.bfloat16)
  assert spatial_pool(grid, 2).dtype == jnp.bfloat16
  np.testing.assert_array_equal(spatial_pool(grid, 2).astype(jnp.float32), [[65.0]])


def test_what_fills_no_square_is_left_out():
  grid = jnp.arange(9.0).reshape(9, 1)
  np.testing.assert_array_equal(spatial_pool(grid, 2), [[2.0]])
  np.testing.assert_array_equal(spatial_pool(jnp.arange(16.0)[:, None], 3), [[5.0]])


def test_the_released_grid():
  assert spatial_pool(jnp.zeros((2, 3, 18 * 18, 1)), 2).shape == (2, 3, 81, 1)


def test_stride_one_takes_any_number_of_tokens():
  x = jnp.arange(6.0).reshape(1, 3, 2)
  np.testing.assert_array_equal(spatial_pool(x, 1), x)


def test_grids_that_cannot_be_pooled():
  with pytest.raises(ValueError, match="needs a square token grid, got 6 tokens"):
    spatial_pool(jnp.zeros((6, 2)), 2)
  with pytest.raises(ValueError, match="A 2 x 2 token grid cannot be pooled with stride 3"):
    spatial_pool(jnp.zeros((4, 2)), 3)


# --- Both ---


def test_rows_of_a_batch_have_their_own_maps():
  """The second row is shorter: rows and columns of its padding are zero."""
  slow = np.random.default_rng(0).normal(size=(2, 5, 4, 3))
  pooling = np.zeros((2, 3, 5), np.float32)
  pooling[0] = pooling_matrix(5, 1, 2, 3)
  pooling[1, :1, :2] = pooling_matrix(2, 1, 2, 1)
  slow[1, 2:] = 1e3
  fast = np.asarray(compress(jnp.float32(slow), jnp.asarray(pooling), 2))
  assert fast.shape == (2, 3, 1, 3)
  np.testing.assert_allclose(
    fast[0, :, 0], oracle.fast_tokens(slow[0], 1, 2, 2, 3), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(fast[1, 0, 0], slow[1, :2].mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(fast[1, 1:], 0)
