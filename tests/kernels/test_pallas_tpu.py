# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels, interpreted, against NumPy float64: outputs, log-sum-exps and gradients."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Public JAX has no way to ask whether races were found.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from slowfast_jax.kernels.cross_attention import blocks as block_table
from slowfast_jax.kernels.cross_attention.blocks import BackwardBlocks, Blocks, ForwardBlocks
from slowfast_jax.kernels.cross_attention.pallas_tpu import cross_attention_pallas_tpu
from slowfast_jax.kernels.cross_attention.tiling import Fold
from tests.kernels import oracle

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def small_blocks(
  rows, key_block=256, chunk=128, row_blocks=1, strip=128, transposed=False, cores=1
):
  """Sizes with several blocks, chunks and strips even on small shapes."""
  row_block = block_table.round_up(-(-rows // row_blocks), chunk)
  sizes = (key_block, chunk, row_block, strip, None)
  return Blocks(ForwardBlocks(*sizes, cores), BackwardBlocks(*sizes, transposed))


@functools.partial(jax.jit, static_argnames=("blocks", "gradients"))
def run(q, k, v, do, dlse, masks, blocks=None, gradients=False):
  def attention(q, k, v):
    return cross_attention_pallas_tpu(q, k, v, **masks, interpret=True, blocks=blocks)

  if not gradients:
    return attention(q, k, v)
  primal, transpose = jax.vjp(attention, q, k, v)
  return *primal, *transpose((do, dlse))


def relative(found, expected, least=1e-30):
  """Largest error over the largest value expected, or `least`."""
  error = np.max(np.abs(np.asarray(found, np.float64) - expected), initial=0)
  return error / max(np.max(np.abs(expected), initial=0), least)


def check(sizes, mask_kind, dtype="float32", seed=0, gradients=False, **options):
  """Compares one call with the oracle; masks and arrays are drawn from the seed."""
  rng = np.random.default_rng(seed)
  B, T, S = sizes[:3]
  arrays = [jnp.asarray(x, dtype) for x in oracle.draw(rng, *sizes)[:4]]
  dlse = jnp.asarray(rng.normal(size=arrays[0].shape[:3]), jnp.float32)
  masks = oracle.draw_masks(rng, mask_kind, B, T, S)
  rows = Fold.of(arrays[0].shape, arrays[1].shape).rows
  blocks = small_blocks(rows, **options) if options.pop("small", True) else None
  found = run(*arrays, dlse, masks, blocks=blocks, gradients=gradients)
  exact = [np.asarray(x, np.float64) for x in arrays]
  out, lse, _ = oracle.forward(*exact[:3], masks.items())
  np.testing.assert_array_equal(np.isneginf(found[1]), np.isneginf(lse))
  empty = np.isneginf(lse)
  np.testing.assert_array_equal(np.asarray(found[0], np.float64)[empty], 0)
  assert relative(found[0], out) <= TOLERANCE[dtype]
  # Logits are of size 1, and a log-sum-exp may be their difference.
  assert relative(np.where(empty, 0, found[1]), np.where(empty, 0, lse), 1) <= TOLERANCE[dtype]
  assert found[0].dtype == arrays[0].dtype
  assert found[1].dtype == jnp.float32
  if gradients:
    expected = oracle.backward(*exact, np.asarray(dlse, np.float64), masks.items())
    for gradient, exact_gradient, array in zip(found[2:], expected, arrays):
      assert gradient.dtype == array.dtype
      assert relative(gradient, exact_gradient) <= TOLERANCE[dtype]


# (B, T, S, K, G, H), masks, dtype: each size, group and head size of the model family at least
# once. 64: two heads share 128 lanes; 72 and 80 are padded unless all heads fit in 128 lanes.
FORWARD = [
  ((1, 1, 1, 1, 1, 128), "all", "float32"),
  ((2, 7, 81, 2, 7, 128), "segments", "float32"),
  ((3, 7, 1000, 2, 7, 64), "lengths", "float32"),
  ((2, 128, 1000, 2, 2, 64), "both", "float32"),
  ((1, 300, 1000, 1, 2, 128), "scattered", "float32"),
  ((2, 7, 1000, 2, 2, 72), "both", "float32"),
  ((2, 7, 81, 1, 7, 80), "lengths", "float32"),
  ((2, 3, 300, 3, 1, 64), "both", "float32"),
  ((1, 7, 5184, 1, 7, 128), "lengths", "float32"),
  ((1, 7, 5184, 1, 7, 128), "all", "bfloat16"),
  ((2, 128, 1000, 2, 2, 64), "both", "bfloat16"),
  ((4, 1, 1000, 4, 7, 128), "lengths", "bfloat16"),
]


@pytest.mark.parametrize(("sizes", "masks", "dtype"), FORWARD, ids=str)
def test_forward(sizes, masks, dtype):
  check(sizes, masks, dtype)


@pytest.mark.parametrize("masks", ["all", "lengths", "both", "scattered"])
def test_rows_that_fill_half_of_the_lanes(masks):
  check((2, 25, 700, 2, 7, 128), masks, chunk=192)
  check((2, 25, 700, 2, 7, 128), masks, "bfloat16", chunk=192)


@pytest.mark.parametrize(("heads", "cores"), [(4, 2), (3, 2)])
def test_heads_are_dealt_among_cores(heads, cores):
  check((1, 7, 700, heads, 2, 128), "both", cores=cores)


GRADIENTS = [
  ((2, 7, 81, 2, 7, 128), "all", "float32", {}),
  ((3, 33, 700, 2, 2, 64), "both", "float32", {"transposed": True}),
  ((1, 128, 300, 1, 2, 72), "scattered", "float32", {"row_blocks": 2, "transposed": True}),
  ((2, 100, 300, 1, 7, 80), "lengths", "float32", {"row_blocks": 3}),
  ((2, 33, 700, 2, 2, 128), "segments", "bfloat16", {"transposed": True}),
  ((2, 100, 300, 1, 7, 64), "lengths", "bfloat16", {"row_blocks": 3}),
]


@pytest.mark.parametrize(("sizes", "masks", "dtype", "options"), GRADIENTS, ids=str)
def test_gradients(sizes, masks, dtype, options):
  check(sizes, masks, dtype, gradients=True, **options)


def test_gradients_with_the_sizes_of_the_table():
  check((1, 65, 900, 2, 7, 64), "both", gradients=True, small=False)


def test_gradients_are_finite_differences():
  """Of the kernel's own output along a random direction, no oracle between."""
  rng = np.random.default_rng(3)
  *arrays, dlse = (jnp.asarray(x, jnp.float32) for x in oracle.draw(rng, 1, 3, 200, 1, 2, 64))
  inputs, cotangents = arrays[:3], (arrays[3], dlse)
  towards = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in inputs]
  blocks = small_blocks(6, key_block=128)

  def value(step):
    moved = [x + step * d for x, d in zip(inputs, towards)]
    primal = run(*moved, *cotangents, {}, blocks=blocks)
    return sum(
      float(np.sum(np.multiply(*pair, dtype=np.float64))) for pair in zip(primal, cotangents)
    )

  gradients = run(*inputs, *cotangents, {}, blocks=blocks, gradients=True)[2:]
  slope = sum(
    float(np.sum(np.multiply(*pair, dtype=np.float64))) for pair in zip(gradients, towards)
  )
  step = 1e-3
  measured = (value(step) - value(-step)) / (2 * step)
  # The output's float32 rounding, 6e-8 of sums of size 10, is divided by the step: 1e-3 of slopes
  # of size 1; the central difference's own error is of the order of step^2.
  assert measured == pytest.approx(slope, rel=2e-3, abs=2e-3)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
  sizes=st.tuples(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([6, 32, 64, 72, 128]),
  ),
  masks=st.sampled_from(["all", "lengths", "segments", "both", "scattered"]),
  seed=st.integers(0, 1000),
  transposed=st.booleans(),
)
def test_any_shape(sizes, masks, seed, transposed):
  check(sizes, masks, seed=seed, gradients=True, transposed=transposed)


def test_no_races_and_nothing_uninitialized_is_read():
  """Under the interpreter that simulates a TPU's memories and DMAs."""
  rng = np.random.default_rng(2)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in oracle.draw(rng, 1, 100, 500, 2, 2, 128)[:3])
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  lengths = jnp.array([400], jnp.int32)

  def loss(q, k, v):
    out, lse = cross_attention_pallas_tpu(
      q, k, v, lengths, interpret=simulated, blocks=small_blocks(200)
    )
    return jnp.sum(out) + jnp.sum(lse)

  gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
  assert not interpret_pallas_call.races.races_found
  exact = [np.asarray(x, np.float64) for x in (q, k, v)]
  ones = np.ones(q.shape), np.ones(q.shape[:3])
  expected = oracle.backward(*exact, *ones, {"kv_lengths": np.array([400])}.items())
  for found, gradient in zip(gradients, expected):
    assert relative(found, gradient) <= TOLERANCE["float32"]


def test_what_lies_behind_the_keys_is_not_read():
  """Not a number there would spread through a product with a zero."""
  rng = np.random.default_rng(1)
  q, k, v, do, _ = (jnp.asarray(x, jnp.float32) for x in oracle.draw(rng, 2, 5, 500, 1, 2, 128))
  lengths = np.array([300, 11], np.int32)
  hidden = (np.arange(500) >= lengths[:, None])[:, :, None, None]
  dlse = jnp.zeros(q.shape[:3])
  masks = {"kv_lengths": lengths}
  blocks = small_blocks(10)
  expected = run(q, k, v, do, dlse, masks, blocks=blocks, gradients=True)
  k, v = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
  found = run(q, k, v, do, dlse, masks, blocks=blocks, gradients=True)
  for x, y in zip(found, expected):
    np.testing.assert_array_equal(x, y)
