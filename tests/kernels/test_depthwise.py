# SPDX-License-Identifier: Apache-2.0
"""The TPU's depthwise convolution, interpreted on the CPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.kernels.depthwise import depthwise, depthwise_on_tpu
from slowfast_jax.sharding import make_mesh


# With 13 columns a row has only as many zeros as it needs.
def arrays(dtype=jnp.float32, frames=2, rows=5, columns=13, width=256):
  rng = np.random.default_rng(0)
  x, weights = (rng.standard_normal((frames, rows, columns, width)) for _ in range(2))
  kernel = rng.standard_normal((7, 7, width)) / 7
  return jnp.asarray(x, dtype), jnp.asarray(kernel, jnp.float32), jnp.asarray(weights, dtype)


def run(convolve, x, kernel, weights):
  def loss(x, kernel):
    y = convolve(x, kernel)
    return jnp.sum((y * weights).astype(jnp.float32)), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)
  return [np.asarray(array, np.float32) for array in (y, *gradients)]


def on_tpu(x, kernel):
  return depthwise_on_tpu(x, kernel, interpret=True)


# Outputs and gradients of bfloat16 are rounded once, of numbers up to 64.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.25)])
def test_output_and_gradients_are_those_of_a_convolution(dtype, atol):
  inputs = arrays(dtype)
  for got, expected in zip(run(on_tpu, *inputs), run(depthwise, *inputs)):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


def test_frames_over_a_mesh_change_nothing():
  inputs = arrays(frames=8, width=128)
  alone = run(on_tpu, *inputs)
  with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
    for got, expected in zip(run(on_tpu, *inputs), alone):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
