# SPDX-License-Identifier: Apache-2.0
"""The TPU's self-attention, interpreted on the CPU, against attention with a dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.kernels import one_query
from slowfast_jax.kernels.self_attention import LANES, Causal, attention_on_tpu, self_attention
from slowfast_jax.sharding import make_mesh

# Two samples and padding in one row, one sample in the other; no multiple of a block.
SEGMENTS = jnp.array([[1] * 90 + [2] * 60 + [0] * 50, [1] * 200])


def arrays(heads, kv_heads, head_dim):
  rng = np.random.default_rng(0)
  shapes = [(2, 200, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
  return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
  ("mask", "sizes", "valid"),
  [(Causal(SEGMENTS), (4, 2, 64), None), (None, (2, 2, 72), 170)],
  ids=["decoder", "encoder"],
)
def test_output_and_gradients_are_those_of_a_dense_mask(mask, sizes, valid):
  *inputs, weights = arrays(*sizes)
  if mask is not None:  # What padding gets means nothing.
    weights = weights * (SEGMENTS > 0)[:, :, None, None]
  else:
    weights = weights.at[:, valid:].set(0.0)

  def run(attend):
    def loss(q, k, v):
      out = attend(q, k, v) * (weights != 0)
      return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients

  kernel = run(lambda *x: attention_on_tpu(*x, mask, valid=valid, interpret=True))
  for got, expected in zip(kernel, run(lambda *x: self_attention(*x, mask, valid=valid))):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_query_of_a_cache_reads_what_attention_reads(kv_heads):
  q, k, v, _ = (x[:1] for x in arrays(4, kv_heads, 8))
  mask = (jnp.arange(200) <= 70)[None, None, None]
  assert one_query.applies(q[:, :1].shape, k.shape)
  out = jax.jit(self_attention)(q[:, :1], k, v, mask)
  expected = jax.nn.dot_product_attention(q[:, :1], k, v, mask=mask)
  np.testing.assert_allclose(out, expected, atol=1e-6)
  half = [x.astype(jnp.bfloat16) for x in (q[:, :1], k, v)]
  rounded = self_attention(*half, mask)
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_allclose(rounded.astype(jnp.float32), expected, atol=2e-2)


def test_padded_heads_of_values_change_nothing():
  q, k, v, _ = arrays(2, 2, 72)
  wide = jnp.pad(v, [(0, 0)] * 3 + [(0, LANES - 72)])
  plain, padded = (
    jax.jit(lambda v: attention_on_tpu(q, k, v, None, valid=170, interpret=True))(values)
    for values in (v, wide)
  )
  np.testing.assert_allclose(padded[..., :72], plain, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(padded[..., 72:], 0.0)


def test_rows_and_heads_over_a_mesh_change_nothing():
  q, k, v, _ = arrays(4, 2, 64)
  alone = attention_on_tpu(q, k, v, None, interpret=True)
  mesh = make_mesh({"data": 2, "tensor": 2, "context": 2})
  with jax.set_mesh(mesh):
    for rows in ("batch", "frames"):
      spread = jax.jit(lambda *x, rows=rows: attention_on_tpu(*x, None, rows=rows, interpret=True))
      np.testing.assert_allclose(spread(q, k, v), alone, rtol=1e-6, atol=1e-6)
