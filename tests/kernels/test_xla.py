# SPDX-License-Identifier: Apache-2.0
"""The blockwise form against NumPy float64, and what the compiler says of its memory."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.kernels.cross_attention import cudnn
from slowfast_jax.kernels.cross_attention.xla import MIN_BLOCK, block_size, cross_attention_xla
from tests.kernels import oracle

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@functools.partial(jax.jit, static_argnames=("block", "scale"))
def run(q, k, v, do, dlse, masks, block=None, scale=None):
  def attention(q, k, v):
    return cross_attention_xla(q, k, v, **masks, block=block, scale=scale)

  primal, transpose = jax.vjp(attention, q, k, v)
  return *primal, *transpose((do, dlse))


def relative(found, expected, least=1e-30):
  """Largest error over the largest value expected, or `least`."""
  error = np.max(np.abs(np.asarray(found, np.float64) - expected), initial=0)
  return error / max(np.max(np.abs(expected), initial=0), least)


def check(sizes, mask_kind, dtype="float32", seed=0, block=None, scale=None):
  """Output, log-sum-exp and all gradients of one call; masks and arrays come from the seed."""
  rng = np.random.default_rng(seed)
  *arrays, dlse = oracle.draw(rng, *sizes)
  arrays, dlse = [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(dlse, jnp.float32)
  masks = oracle.draw_masks(rng, mask_kind, *sizes[:3])
  found = run(*arrays, dlse, masks, block, scale)
  exact = [np.asarray(x, np.float64) for x in arrays]
  out, lse, _ = oracle.forward(*exact[:3], masks.items(), scale)
  empty = np.isneginf(lse)
  np.testing.assert_array_equal(np.isneginf(found[1]), empty)
  np.testing.assert_array_equal(np.asarray(found[0], np.float64)[empty], 0)
  # Logits are of size 1, and a log-sum-exp may be their difference.
  assert relative(np.where(empty, 0, found[1]), np.where(empty, 0, lse), 1) <= TOLERANCE[dtype]
  gradients = oracle.backward(*exact, np.asarray(dlse, np.float64), masks.items(), scale)
  for i, (got, expected) in enumerate(zip((found[0], *found[2:]), (out, *gradients))):
    assert got.dtype == jnp.dtype(dtype)
    assert relative(got, expected) <= TOLERANCE[dtype], ("out", "dq", "dk", "dv")[i]


# (B, T, S, K, G, H), masks, dtype, block.
@pytest.mark.parametrize(
  ("sizes", "mask_kind", "dtype", "block"),
  [
    ((1, 1, 1, 1, 1, 128), "all", "float32", None),
    ((2, 7, 81, 2, 7, 128), "segments", "float32", 32),
    ((3, 7, 1000, 2, 7, 64), "lengths", "float32", 128),
    ((2, 128, 1000, 2, 2, 64), "both", "float32", 250),
    ((1, 300, 1000, 1, 2, 72), "scattered", "float32", None),
    ((1, 1, 5184, 4, 7, 128), "all", "float32", None),
    ((1, 128, 5184, 1, 7, 80), "both", "float32", None),
    ((2, 1, 1000, 4, 7, 64), "lengths", "bfloat16", 512),
    ((1, 7, 5184, 4, 7, 128), "segments", "bfloat16", 1024),
    ((2, 300, 81, 2, 1, 64), "both", "bfloat16", 40),
  ],
)
def test_blocks_against_the_oracle(sizes, mask_kind, dtype, block):
  check(sizes, mask_kind, dtype, block=block)


def test_another_scale():
  check((2, 5, 20, 2, 2, 8), "both", block=8, scale=0.7)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
  sizes=st.tuples(*(st.integers(1, n) for n in (3, 20, 90, 3, 4, 12))),
  mask_kind=st.sampled_from(["all", "lengths", "segments", "both", "scattered"]),
  block=st.sampled_from([None, 1, 7, 32]),
  seed=st.integers(0, 99),
)
def test_any_shape(sizes, mask_kind, block, seed):
  check(sizes, mask_kind, seed=seed, block=block)


def test_gradients_are_central_differences():
  """Of the NumPy oracle's outputs, so that its own gradients are not what is trusted."""
  rng = np.random.default_rng(1)
  *inputs, do, dlse = oracle.draw(rng, 3, 4, 11, 2, 2, 6)
  masks = oracle.draw_masks(rng, "both", 3, 4, 11)
  arrays = [jnp.asarray(x, jnp.float32) for x in (*inputs, do, dlse)]
  found = run(*arrays, masks, block=3)[2:]

  def loss(inputs):
    out, lse, _ = oracle.forward(*inputs, masks.items())
    return np.sum(out * do) + np.sum(np.where(np.isneginf(lse), 0, lse) * dlse)

  step = 1e-5
  for i in range(3):
    for _ in range(4):
      direction = rng.normal(size=inputs[i].shape)
      moved = [
        [x + sign * step * direction if j == i else x for j, x in enumerate(inputs)]
        for sign in (1, -1)
      ]
      expected = (loss(moved[0]) - loss(moved[1])) / (2 * step)
      assert np.sum(found[i] * direction) == pytest.approx(expected, rel=1e-5, abs=1e-5)


# --- What is compiled ---


def compiled(keys, queries=512, heads=4, kv_heads=2, head_dim=64, block=None):
  """Forward and backward with lengths and segments."""
  q = jax.ShapeDtypeStruct((1, queries, heads, head_dim), jnp.float32)
  k = jax.ShapeDtypeStruct((1, keys, kv_heads, head_dim), jnp.float32)
  dlse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
  masks = {
    "kv_lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
    "q_segments": jax.ShapeDtypeStruct(q.shape[:2], jnp.int32),
    "kv_segments": jax.ShapeDtypeStruct(k.shape[:2], jnp.int32),
  }
  return run.lower(q, k, k, q, dlse, masks, block).compile()


def shapes_of(program):
  """All array shapes in the optimised program."""
  found = re.findall(r"[a-z]\w*\[([\d,]+)\]", program.as_text())
  return {tuple(map(int, shape.split(","))) for shape in found}


def test_memory_is_linear_in_the_slow_tokens():
  lengths = (10_000, 20_000, 40_000, 80_000)
  programs = [compiled(keys) for keys in lengths]
  memory = [program.memory_analysis() for program in programs]
  whole = [m.temp_size_in_bytes + m.output_size_in_bytes + m.argument_size_in_bytes for m in memory]
  exponent = np.polyfit(np.log(lengths), np.log(whole), 1)[0]
  assert exponent <= 1.02
  # Beyond arguments and gradients nothing grows at all.
  assert memory[-1].temp_size_in_bytes <= 1.05 * memory[0].temp_size_in_bytes
  for keys, program in zip(lengths, programs):
    # The largest array with an axis of all slow tokens is K or V: no scores.
    largest = max(np.prod(shape) for shape in shapes_of(program) if max(shape) >= keys)
    assert largest == keys * 2 * 64


def test_keys_of_one_block_are_attended_to_without_a_loop():
  assert "while" in compiled(90, queries=4, block=32).as_text()
  assert "while" not in compiled(90, queries=4).as_text()


def test_a_block_is_smaller_the_more_queries_there_are():
  assert block_size((1, 1, 28, 128)) > 10_000
  sizes = [block_size((1, queries, 28, 128)) for queries in (1, 64, 512, 10**6)]
  assert sizes == sorted(sizes, reverse=True)
  assert sizes[-1] == MIN_BLOCK


# --- cuDNN ---


def test_cudnn_asks_for_a_gpu():
  q, k = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 3, 2, 8))
  with pytest.raises(ValueError, match="cudnn. runs on NVIDIA GPUs, and this is compiled for cpu"):
    cudnn.cross_attention_cudnn(q, k, k)
