# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes, their start, norms in half precision, and stacks of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.models.layers import (
  Embedding,
  Keys,
  LayerNorm,
  Projection,
  RMSNorm,
  gradient_written,
  layer_of,
  linear,
  look_up,
  make_param,
  stack,
  unstack,
  written,
)
from slowfast_jax.sharding import make_mesh
from tests.models import oracle


def test_every_axis_has_a_name():
  zeros = nnx.initializers.zeros
  param = make_param(zeros, nnx.Rngs(0), (2, 3), ("embed", None))
  assert param.get_metadata()["axes"] == ("embed", None)
  with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 axis names, got \('embed',\)"):
    make_param(zeros, nnx.Rngs(0), (2, 3), ("embed",))


@pytest.mark.parametrize(
  ("equation", "shape", "fan_in", "bias_shape"),
  [
    ("...D,DNH->...NH", (64, 8, 32), 64, (8, 32)),
    ("...NH,NHD->...D", (8, 32, 64), 256, (64,)),
  ],
)
def test_projections_start_at_one_over_the_root_of_their_inputs(
  equation, shape, fan_in, bias_shape
):
  axes = ("embed", "heads", None)
  options = {"bias": True, "gain": 0.5, "bias_start": 2.0}
  projection = Projection(equation, shape, axes, **options, rngs=nnx.Rngs(0))
  assert np.std(projection.kernel[...]) == pytest.approx(0.5 * fan_in**-0.5, rel=0.02)
  assert projection.bias.get_metadata()["axes"] == axes[-len(bias_shape) :]
  np.testing.assert_array_equal(projection.bias[...], np.full(bias_shape, 2.0))
  assert Projection(equation, shape, axes, rngs=nnx.Rngs(0)).bias is None


@pytest.mark.parametrize(("mark", "barriers"), [(written, (1, 1)), (gradient_written, (0, 1))])
def test_arrays_or_their_gradients_are_written_and_nothing_changes(mark, barriers):
  def run(x):
    return jnp.sum(jnp.sin(mark((jnp.cos(x), x))[0]))

  x = jnp.arange(3.0)
  value, gradient = jax.value_and_grad(run)(x)
  np.testing.assert_allclose(value, jnp.sum(jnp.sin(jnp.cos(x))), rtol=1e-6)
  np.testing.assert_allclose(gradient, -jnp.cos(jnp.cos(x)) * jnp.sin(x), rtol=1e-6)
  counts = [str(jax.make_jaxpr(f)(x)).count("optimization_barrier") for f in (run, jax.grad(run))]
  assert tuple(counts) == barriers


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_of_half_precision_have_float32_statistics(kind):
  x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4, 64)), jnp.bfloat16)
  norm = kind(64, eps=1e-6, rngs=nnx.Rngs(0))
  got = norm(x)
  assert got.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  expected = oracle.rms(exact, 1, 1e-6) if kind is RMSNorm else oracle.layer_norm(exact, 1, 0, 1e-6)
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_an_embedding_and_its_transpose():
  embedding = Embedding(5, 3, rngs=nnx.Rngs(0))
  table = np.asarray(embedding.embedding[...])
  ids = jnp.array([[4, 0]])
  np.testing.assert_array_equal(embedding(ids, jnp.float32), table[np.asarray(ids)])
  assert embedding(ids, jnp.bfloat16).dtype == jnp.bfloat16
  np.testing.assert_allclose(embedding.attend(jnp.eye(3)), table.T, rtol=1e-6)


def test_a_stack_is_its_layers():
  def make(rngs):
    return Projection("...D,DM->...M", (2, 3), ("embed", "mlp"), bias=True, rngs=rngs)

  layers = stack(make, 4, rngs=nnx.Rngs(0))
  assert layers.kernel.get_metadata()["axes"] == ("layers", "embed", "mlp")
  assert layers.bias.get_metadata()["axes"] == ("layers", "mlp")
  kernel = np.asarray(layers.kernel[...])
  assert kernel.shape == (4, 2, 3)
  assert len(np.unique(kernel)) == kernel.size
  layer = layer_of(layers, 2)
  np.testing.assert_array_equal(layer.kernel[...], kernel[2])
  x = jnp.ones((5, 2))
  np.testing.assert_allclose(layer(x), np.asarray(x) @ kernel[2], rtol=1e-6)
  graphdef, states = unstack(layers, 1, 3)
  _, out = jax.lax.scan(lambda c, state: (c, nnx.merge(graphdef, state)(x)), None, states)
  np.testing.assert_allclose(out, np.asarray(x) @ kernel[1:3], rtol=1e-6)


def test_gradients_of_kernels_are_summed_in_float32():
  """Of thousands of bfloat16 terms: a sum in bfloat16 would be wrong in the third digit."""
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.uniform(size=(8, 512, n)), jnp.bfloat16) for n in (4, 6))
  kernel = jnp.ones((4, 2, 3))
  y, transpose = jax.vjp(lambda x, kernel: linear("...D,DNH->...NH", x, kernel), x, kernel)
  dx, got = transpose(dy.reshape(y.shape))
  assert (y.dtype, dx.dtype, got.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  expected = np.einsum("BTD,BTM->DM", *(np.asarray(a, np.float64) for a in (x, dy)))
  np.testing.assert_allclose(got.reshape(4, 6), expected, rtol=1e-5)
  plain = jax.grad(lambda x: jnp.sum(jnp.einsum("BTD,DNH->BTNH", x, kernel) * dy.reshape(y.shape)))
  np.testing.assert_allclose(
    dx.astype(jnp.float32), plain(x.astype(jnp.float32)), rtol=0.02, atol=0.02
  )


def test_what_only_a_frozen_kernel_would_need_is_not_kept():
  kernels, x = jnp.ones((16, 64, 64)), jnp.ones((256, 64))

  def memory(argument):
    def loss(kernels, x):
      return jnp.sum(jax.lax.scan(lambda x, k: (linear("BD,DE->BE", x, k), None), x, kernels)[0])

    compiled = jax.jit(jax.grad(loss, argument)).lower(kernels, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory(0) > 16 * x.nbytes
  assert memory(1) < 4 * x.nbytes


def test_keys_are_those_of_the_librarys_stream():
  key = jax.random.key(3)
  ours, theirs = Keys(key), nnx.Rngs(key)
  for _ in range(3):
    assert jnp.array_equal(jax.random.key_data(ours.params()), jax.random.key_data(theirs.params()))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_spread_table_gives_the_same_rows_and_gradient_and_is_never_whole(sizes):
  keys = jax.random.split(jax.random.key(0), 3)
  table, ids = jax.random.normal(keys[0], (40, 16)), jax.random.randint(keys[1], (8, 5), 0, 40)
  factors = jax.random.normal(keys[2], (8, 5, 16))

  def run(table):
    rows = look_up(table, ids, jnp.float32)
    return jnp.sum(rows * factors), rows

  program = jax.value_and_grad(run, has_aux=True)
  (_, rows), gradient = program(table)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    compiled = jax.jit(program, out_shardings=(None, place)).lower(jax.device_put(table, place))
    (_, spread_rows), spread = compiled.compile()(jax.device_put(table, place))
  np.testing.assert_array_equal(spread_rows, rows)
  np.testing.assert_allclose(spread, gradient, rtol=1e-6, atol=1e-6)  # Another order of sums.
  assert "f32[40,16]" not in compiled.compile().as_text()
