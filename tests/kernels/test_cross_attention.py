# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention against NumPy float64: outputs, log-sum-exps, gradients and errors."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.kernels.cross_attention import cross_attention
from slowfast_jax.kernels.cross_attention.reference import cross_attention_reference

# B, T, S, K, H; query heads of one kv head: alone, a pair, and as in Qwen2 7B.
SHAPE = (3, 4, 7, 2, 6)
GROUPS = (1, 2, 7)
# Those that run on any machine.
IMPLEMENTATIONS = ("xla", "pallas_tpu_interpret")
RUNS = [*(("xla", groups) for groups in GROUPS), ("pallas_tpu_interpret", 7)]


def oracle(q, k, v, lengths=None, q_segments=None, kv_segments=None, scale=None):
  """One query and head at a time."""
  B, T, N, H = q.shape
  out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
  scale = 1 / math.sqrt(H) if scale is None else scale
  for b, t, n in np.ndindex(B, T, N):
    head = n // (N // k.shape[2])
    seen = [
      s
      for s in range(k.shape[1])
      if (lengths is None or s < lengths[b])
      and (q_segments is None or (q_segments[b, t] == kv_segments[b, s] and q_segments[b, t] > 0))
    ]
    if seen:
      scores = [scale * np.dot(q[b, t, n], k[b, s, head]) for s in seen]
      total = sum(math.exp(score) for score in scores)
      lse[b, t, n] = math.log(total)
      for s, score in zip(seen, scores):
        out[b, t, n] += math.exp(score) / total * v[b, s, head]
  return out, lse


@functools.cache
def arrays(groups):
  B, T, S, K, H = SHAPE
  rng = np.random.default_rng(groups)
  return tuple(rng.normal(size=(B, n, h, H)) for n, h in ((T, K * groups), (S, K), (S, K)))


LENGTHS = np.array([7, 0, 4], np.int32)
Q_SEGMENTS = np.array([[1, 1, 2, 0], [1, 2, 3, 3], [2, 1, 0, 0]], np.int32)
KV_SEGMENTS = np.array(
  [[1, 1, 1, 2, 0, 0, 0], [1, 3, 3, 1, 3, 0, 1], [1, 1, 1, 1, 2, 2, 0]], np.int32
)
MASKS = {
  "all": {},
  "lengths": {"kv_lengths": LENGTHS},
  "segments": {"q_segments": Q_SEGMENTS, "kv_segments": KV_SEGMENTS},
  "both": {"kv_lengths": LENGTHS, "q_segments": Q_SEGMENTS, "kv_segments": KV_SEGMENTS},
}


def expected_of(inputs, masks, scale=None):
  return oracle(
    *inputs, masks.get("kv_lengths"), masks.get("q_segments"), masks.get("kv_segments"), scale
  )


def call(inputs, masks, **options):
  inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
  return cross_attention(*inputs, **{k: jnp.asarray(x) for k, x in masks.items()}, **options)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("implementation", "groups"), [(None, 2), *RUNS])
def test_outputs(implementation, groups, masks):
  out, lse = call(arrays(groups), masks, implementation=implementation)
  expected_out, expected_lse = expected_of(arrays(groups), masks)
  np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("groups", GROUPS)
def test_the_specification(groups, masks):
  inputs = [jnp.asarray(x, jnp.float32) for x in arrays(groups)]
  out, lse = cross_attention_reference(*inputs, **{k: jnp.asarray(x) for k, x in masks.items()})
  expected_out, expected_lse = expected_of(arrays(groups), masks)
  np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_keys_gets_zero_and_minus_infinity(implementation):
  out, lse = call(arrays(2), MASKS["both"], implementation=implementation)
  for b, t in ((0, 3), (1, 0), (1, 3), (2, 0), (2, 2)):
    np.testing.assert_array_equal(out[b, t], 0)
    np.testing.assert_array_equal(lse[b, t], -np.inf)
  assert np.isfinite(lse[2, 1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_and_no_lse(implementation):
  inputs = arrays(2)
  out = call(inputs, {}, scale=0.7, implementation=implementation, return_lse=False)
  np.testing.assert_allclose(out, oracle(*inputs, scale=0.7)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
  q, k, v = arrays(2)
  out, lse = call((q * 100, k * 10, v), {}, implementation=implementation)
  best = np.argmax(np.einsum("BTKGH,BSKH->BTKGS", q.reshape(3, 4, 2, 2, 6), k), axis=-1)
  assert np.isfinite(lse).all()
  assert lse.max() > 500
  np.testing.assert_allclose(out[0, 0, 0], v[0, best[0, 0, 0, 0], 0], atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_keys_have_no_effect(implementation):
  q, k, v = arrays(2)
  hidden = (np.arange(7) >= LENGTHS[:, None]) | (KV_SEGMENTS == 0)
  poison = [np.where(hidden[:, :, None, None], 1e3, x) for x in (k, v)]
  expected = call((q, k, v), MASKS["both"], implementation=implementation)
  got = call((q, *poison), MASKS["both"], implementation=implementation)
  for a, b in zip(got, expected):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_is_computed_in_float32(implementation):
  half = [jnp.asarray(x, jnp.bfloat16) for x in arrays(2)]
  out, lse = cross_attention(*half, implementation=implementation)
  assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
  expected_out, expected_lse = oracle(*(np.asarray(x, np.float64) for x in half))
  # The kernel rounds queries once more, after their scaling.
  rounding = {"xla": (1e-5, 2**-8), "pallas_tpu_interpret": (1e-2, 1e-2)}[implementation]
  np.testing.assert_allclose(lse, expected_lse, rtol=rounding[0], atol=rounding[0])
  out = np.asarray(out, np.float64)
  np.testing.assert_allclose(out, expected_out, rtol=rounding[1], atol=rounding[1])


# --- Gradients ---


def loss_weights(groups):
  """Cotangents of outputs and log-sum-exps."""
  B, T, _, K, H = SHAPE
  rng = np.random.default_rng(9)
  return rng.normal(size=(B, T, K * groups, H)), rng.normal(size=(B, T, K * groups))


def weighted(out, lse, weights, xp):
  """A scalar that depends on every output; log-sum-exps of empty rows are left out."""
  finite = xp.where(xp.isneginf(lse), 0.0, lse)
  return xp.sum(out * weights[0]) + xp.sum(finite * weights[1])


@pytest.mark.parametrize("masks", [MASKS["all"], MASKS["both"]], ids=["all", "both"])
@pytest.mark.parametrize(("implementation", "groups"), RUNS)
def test_gradients_are_central_differences(implementation, groups, masks):
  inputs, weights = arrays(groups), loss_weights(groups)

  @functools.partial(jax.jit, static_argnums=3)
  def gradients(q, k, v, implementation):
    def loss(q, k, v):
      out = call((q, k, v), masks, implementation=implementation)
      return weighted(*out, [jnp.float32(w) for w in weights], jnp)

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  found = gradients(*(jnp.float32(x) for x in inputs), implementation)
  rng, step = np.random.default_rng(3), 1e-5
  for i in range(3):
    assert np.isfinite(found[i]).all()
    for _ in range(4):
      direction = rng.normal(size=inputs[i].shape)
      ends = []
      for sign in (1, -1):
        moved = [x + sign * step * direction if j == i else x for j, x in enumerate(inputs)]
        ends.append(weighted(*expected_of(moved, masks), weights, np))
      expected = (ends[0] - ends[1]) / (2 * step)
      assert np.sum(found[i] * direction) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_without_keys_send_no_gradient(implementation):
  """Not even of their log-sum-exp, which is minus infinity."""

  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(q, k, v):
    out, lse = call((q, k, v), MASKS["both"], implementation=implementation)
    return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

  q, k, v = gradients(*(jnp.float32(x) for x in arrays(2)))
  for gradient in (q, k, v):
    assert np.isfinite(gradient).all()
  for b, t in ((0, 3), (1, 0), (1, 3), (2, 0), (2, 2)):
    np.testing.assert_array_equal(q[b, t], 0)
  for gradient in (k, v):
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_array_equal(gradient[2, 4:], 0)
    assert np.abs(gradient[2, 0]).max() > 0


# --- Errors ---


def shaped(q=(2, 3, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8), **masks):
  floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q, k, v)]
  return floats, {name: jax.ShapeDtypeStruct(s, jnp.int32) for name, s in masks.items()}


@pytest.mark.parametrize(
  ("shapes", "words"),
  [
    ({"q": (2, 3, 8)}, r"takes q \[B, T, N, H\] and k, v \[B, S, K, H\], got q \(2, 3, 8\)"),
    ({"k": (5, 2, 8), "v": (5, 2, 8)}, r"got q \(2, 3, 4, 8\), k \(5, 2, 8\)"),
    ({"v": (2, 6, 2, 8)}, r"k \(2, 5, 2, 8\), v \(2, 6, 2, 8\)"),
    ({"q": (1, 3, 4, 8)}, r"q \(1, 3, 4, 8\) and k \(2, 5, 2, 8\) differ in batch or head size"),
    ({"q": (2, 3, 4, 6)}, r"q \(2, 3, 4, 6\) and k \(2, 5, 2, 8\) differ in batch or head size"),
    ({"q": (2, 3, 3, 8)}, "query heads must be a multiple of kv heads, got 3 and 2"),
    ({"q_segments": (2, 3)}, "q_segments and kv_segments must be given together"),
    ({"kv_segments": (2, 5)}, "q_segments and kv_segments must be given together"),
    ({"kv_lengths": (3,)}, r"kv_lengths must have shape \(2,\), got \(3,\)"),
    ({"kv_lengths": (2, 1)}, r"kv_lengths must have shape \(2,\), got \(2, 1\)"),
    (
      {"q_segments": (2, 4), "kv_segments": (2, 5)},
      r"q_segments must have shape \(2, 3\), got \(2, 4\)",
    ),
    (
      {"q_segments": (2, 3), "kv_segments": (1, 5)},
      r"kv_segments must have shape \(2, 5\), got \(1, 5\)",
    ),
  ],
)
def test_shapes_that_do_not_belong_together(shapes, words):
  floats, masks = shaped(**shapes)
  # As users call it; the checker of annotations under test would speak first.
  with pytest.raises(ValueError, match=words):
    inspect.unwrap(cross_attention)(*floats, **masks)


def test_unknown_implementations():
  with pytest.raises(ValueError, match=r"Unknown implementation 'cuda' .*choose from \[.*'xla'"):
    call(arrays(1), {}, implementation="cuda")
