# SPDX-License-Identifier: Apache-2.0
"""Slow tokens spread over devices: one device's results, and bytes on the wire that are the text's.

The same programs are compiled for the smallest TPU topology.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernel_mesh import collectives, compile_on
from benchmarks.kernel_programs import run_worker
from slowfast_jax.kernels.cross_attention import cross_attention
from slowfast_jax.kernels.cross_attention.context_parallel import Layout, cross_attention_on_mesh
from slowfast_jax.kernels.cross_attention.shapes import Shape
from slowfast_jax.sharding import make_mesh
from tests.kernels import oracle


def layout_of(**sizes):
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]
  return Layout(make_mesh(sizes, devices), "context", ("data", "fsdp"), "tensor")


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def run(arrays, dlse, masks, layout=None, implementation="xla"):
  """Output, log-sum-exp, dq, dk, dv; on one device without a layout."""

  def attention(q, k, v):
    if layout is None:
      return cross_attention(q, k, v, **masks, implementation=implementation)
    return cross_attention_on_mesh(q, k, v, **masks, layout=layout, implementation=implementation)

  q, k, v, do = arrays
  primal, transpose = jax.vjp(attention, q, k, v)
  return *primal, *transpose((do, dlse))


def check(sizes, mask_kind, layout, implementation="xla", tolerance=1e-5, dtype="float32"):
  rng = np.random.default_rng(5)
  *arrays, dlse = oracle.draw(rng, *sizes)
  arrays, dlse = [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(dlse, jnp.float32)
  masks = oracle.draw_masks(rng, mask_kind, *sizes[:3])
  found = run(arrays, dlse, masks, layout, implementation)
  expected = run(arrays, dlse, masks)
  for name, got, one in zip(("out", "lse", "dq", "dk", "dv"), found, expected):
    assert got.dtype == one.dtype
    got, one = (np.asarray(x, np.float64) for x in (got, one))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(one))
    got, one = (np.where(np.isneginf(x), 0, x) for x in (got, one))
    assert np.max(np.abs(got - one)) <= tolerance * np.max(np.abs(one), initial=1e-30), name


# (B, T, S, K, G, H)
@pytest.mark.parametrize(
  ("sizes", "mask_kind", "mesh"),
  [
    ((2, 5, 64, 2, 7, 16), "all", {"context": 8}),
    ((2, 5, 64, 2, 7, 16), "both", {"context": 8}),
    ((3, 5, 61, 1, 2, 16), "all", {"context": 8}),
    ((3, 5, 61, 1, 2, 16), "lengths", {"context": 8}),
    ((2, 9, 61, 2, 2, 16), "scattered", {"context": 4, "data": 2}),
    ((2, 1, 3, 2, 2, 16), "segments", {"context": 8}),
    ((4, 5, 64, 2, 2, 16), "both", {"data": 2, "context": 2, "tensor": 2}),
    ((3, 5, 64, 3, 2, 16), "both", {"fsdp": 2, "context": 2, "tensor": 2}),
    ((4, 5, 61, 2, 2, 16), "both", {"data": 2, "fsdp": 2, "tensor": 2}),
  ],
)
def test_a_mesh_changes_nothing(sizes, mask_kind, mesh):
  check(sizes, mask_kind, layout_of(**mesh))


def test_parts_by_the_tpu_kernel():
  layout = layout_of(context=2)
  check((2, 3, 300, 2, 2, 64), "both", layout, implementation="pallas_tpu_interpret")


def test_half_precision():
  check((2, 5, 64, 2, 2, 16), "both", layout_of(context=8), tolerance=1e-2, dtype="bfloat16")


def test_results_without_log_sum_exps_and_errors_are_those_of_one_device():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in oracle.draw(rng, 2, 3, 16, 1, 2, 8)[:3])
  layout = layout_of(context=8)
  out = cross_attention_on_mesh(q, k, v, layout=layout, scale=0.5, return_lse=False)
  expected = cross_attention(q, k, v, scale=0.5, return_lse=False)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="Unknown implementation 'cuda'"):
    cross_attention_on_mesh(q, k, v, layout=layout, implementation="cuda")
  with pytest.raises(ValueError, match="given together"):
    cross_attention_on_mesh(q, k, v, kv_segments=jnp.ones((2, 16), int), layout=layout)


# --- What travels ---


def wire(layout, queries, keys):
  """Collectives of forward and backward, and their bytes together."""
  shape = Shape(queries, keys, 2, heads=4, kv_heads=2, head_dim=16)
  found = collectives(compile_on(layout, shape, jnp.float32))
  return [name for name, _ in found], sum(size for _, size in found)


@pytest.mark.parametrize("mesh", [{"context": 8}, {"data": 2, "context": 2, "tensor": 2}])
def test_bytes_on_the_wire_are_proportional_to_the_text(mesh):
  layout = layout_of(**mesh)
  operations, bytes_ = wire(layout, 32, 1024)
  assert set(operations) == {"all-reduce"}
  assert wire(layout, 32, 4096) == (operations, bytes_)
  assert wire(layout, 64, 1024) == (operations, 2 * bytes_)
  # Output, its share, the highest score, and dq, of this device's rows and heads.
  heads = 2 * 4 // (layout.size(("data", "tensor")))
  assert bytes_ == 4 * 32 * heads * (16 + 1 + 1 + 16)


def test_nothing_travels_where_the_slow_tokens_lie_together():
  assert wire(layout_of(data=2, tensor=2), 32, 1024) == ([], 0)


# --- TPU ---


@pytest.mark.slow
def test_a_tpu_topology_compiles_and_holds_its_part_alone():
  """The kernels run on each device's part; memory is that of the part and of the text.

  Larger topologies and a million keys: `slowfast bench kernel --static`.
  """
  sizes = [{"queries": 16, "keys": keys} for keys in (8_192, 16_384)]
  small, large = run_worker("kernel_mesh", "v5e:2x2", json.dumps(sizes))
  kernels = ["slow_cross_attention_backward", "slow_cross_attention_forward"]
  assert small["kernels"] == large["kernels"] == kernels
  assert small["collectives"] == large["collectives"]
  # K, V, dK and dV in bfloat16, a quarter of them on a device.
  growth = 4 * (16_384 - 8_192) * 4 * 128 * 2 / 4
  assert large["memory"] - small["memory"] == pytest.approx(growth, rel=0.05)
