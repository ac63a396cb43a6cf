# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution of frames: each channel has a square kernel, and the grid keeps its size.

On TPU a kernel of its own, forward and backward: a frame's channels, a block at a time, lie in VMEM
while all taps pass over them. It runs about as fast as XLA's convolution, which the compiler needs
half a minute for in each stage of an encoder. Elsewhere, and for sizes that fill no blocks, it is
XLA's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from slowfast_jax.kernels.cross_attention.blocks import (
  round_up,
  target_device_kind,
  target_platform,
)
from slowfast_jax.sharding import axes_that_divide, mesh_in_force

LANES, SUBLANES = 128, 8
# A block of 144 x 144 positions: two of input, two of output, and one in float32 take 36 MiB.
LARGEST_SIDE = 144
VMEM_LIMIT = 56 * 2**20


def depthwise(x: Float[Array, "B y x E"], kernel: Float[Array, "k k E"]) -> Float[Array, "B y x E"]:
  """The convolution in the dtype of x, with zeros around the grid; sums are in float32.

  Args:
    x: frames.
    kernel: as many taps each way, an odd number.
  """
  small = max(x.shape[1:3]) <= LARGEST_SIDE and target_device_kind() != "TPU v4"
  if target_platform() == "tpu" and small and x.shape[-1] % LANES == 0:
    return depthwise_on_tpu(x, kernel)
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype)[:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def depthwise_on_tpu(
  x: Float[Array, "B y x E"], kernel: Float[Array, "k k E"], *, interpret: bool = False
) -> Float[Array, "B y x E"]:
  """The kernel, on each device for its frames.

  Args:
    x, kernel: as in `depthwise`; channels in multiples of LANES.
    interpret: run Pallas's interpreter; for tests.
  """
  mesh = mesh_in_force()
  if mesh is None:
    return _convolution(interpret, x, kernel)
  frames = PartitionSpec(axes_that_divide("frames", x.shape[0], mesh) or None)
  # Unchecked: what a kernel writes does not say over which axes it varies.
  return jax.shard_map(
    functools.partial(_convolution, interpret),
    mesh=mesh,
    in_specs=(frames, PartitionSpec()),
    out_specs=frames,
    check_vma=False,
  )(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(interpret: bool, x: Array, kernel: Array) -> Array:
  return _forward(x, kernel.astype(x.dtype), interpret)


def _convolution_forward(interpret: bool, x: Array, kernel: Array) -> tuple[Array, Any]:
  return _convolution(interpret, x, kernel), (x, kernel)


def _convolution_backward(interpret: bool, kept: Any, dy: Array) -> tuple[Array, Array]:
  x, kernel = kept
  dx = _forward(dy, kernel[::-1, ::-1].astype(x.dtype), interpret)
  return dx, _kernel_gradient(x, dy, kernel.shape[0], interpret).astype(kernel.dtype)


_convolution.defvjp(_convolution_forward, _convolution_backward)


def _forward(x: Array, kernel: Array, interpret: bool) -> Float[Array, "B y x E"]:
  B, rows, columns, E = x.shape
  taps = kernel.shape[0]
  frame = pl.BlockSpec((1, rows, columns, LANES), lambda b, c: (b, 0, 0, c))
  return pl.pallas_call(
    _forward_block,
    name="depthwise_forward",
    grid=(B, E // LANES),
    in_specs=[frame, pl.BlockSpec((taps, taps, LANES), lambda b, c: (0, 0, c))],
    out_specs=frame,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[_wide(rows, columns, taps)],
    compiler_params=_parameters("parallel", "parallel"),
    cost_estimate=_cost(x, taps),
    interpret=interpret,
  )(x, kernel.astype(jnp.float32))


def _forward_block(x_ref, kernel_ref, out_ref, wide_ref):
  """All taps over one frame's block of channels."""
  taps, columns, width = kernel_ref.shape[0], out_ref.shape[2], wide_ref.shape[1]
  _widen(x_ref, wide_ref, taps)

  def row(y, carry):
    total = jnp.zeros((width, LANES), jnp.float32)
    for j in range(taps):
      # Shifted once for a column of taps, not for each of them.
      column = [wide_ref[y + i] * kernel_ref[i, j : j + 1] for i in range(taps)]
      total += pltpu.roll(functools.reduce(jnp.add, column), (taps // 2 - j) % width, 0)
    out_ref[0, y] = total[:columns].astype(out_ref.dtype)
    return carry

  jax.lax.fori_loop(0, out_ref.shape[1], row, 0)


def _kernel_gradient(x: Array, dy: Array, taps: int, interpret: bool) -> Float[Array, "k k E"]:
  B, rows, columns, E = x.shape
  frame = pl.BlockSpec((1, rows, columns, LANES), lambda c, b: (b, 0, 0, c))
  wide = _wide(rows, columns, taps)
  sums = pl.pallas_call(
    _gradient_block,
    name="depthwise_kernel_gradient",
    grid=(E // LANES, B),
    in_specs=[frame, frame],
    out_specs=pl.BlockSpec((taps, taps, SUBLANES, LANES), lambda c, b: (0, 0, 0, c)),
    out_shape=jax.ShapeDtypeStruct((taps, taps, SUBLANES, E), jnp.float32),
    scratch_shapes=[wide, pltpu.VMEM(wide.shape[1:], jnp.float32)],
    compiler_params=_parameters("parallel", "arbitrary"),
    cost_estimate=_cost(x, taps),
    interpret=interpret,
  )(x, dy)
  return sums.sum(2)


def _gradient_block(x_ref, dy_ref, sums_ref, wide_ref, row_ref):
  """What one frame's block of channels adds to every tap."""
  taps, columns, width = sums_ref.shape[0], dy_ref.shape[2], wide_ref.shape[1]

  @pl.when(pl.program_id(1) == 0)
  def _():
    sums_ref[...] = jnp.zeros_like(sums_ref)

  _widen(x_ref, wide_ref, taps)
  row_ref[...] = jnp.zeros_like(row_ref)

  def row(y, carry):
    row_ref[:columns] = dy_ref[0, y].astype(jnp.float32)
    given = row_ref[...]
    for j in range(taps):
      shifted = pltpu.roll(given, (j - taps // 2) % width, 0)
      for i in range(taps):
        products = (wide_ref[y + i] * shifted).reshape(width // SUBLANES, SUBLANES, LANES)
        sums_ref[i, j] += products.sum(0)
    return carry

  jax.lax.fori_loop(0, dy_ref.shape[1], row, 0)


def _wide(rows: int, columns: int, taps: int) -> Any:
  """Room for a block with zeros around it. Those on its right are on its left too: rows roll."""
  width = round_up(columns + taps // 2, SUBLANES)
  return pltpu.VMEM((rows + taps - 1, width, LANES), jnp.float32)


def _widen(x_ref, wide_ref, taps):
  """Copies a block into such a room."""
  rows, columns = x_ref.shape[1:3]
  wide_ref[...] = jnp.zeros_like(wide_ref)

  def row(y, carry):
    wide_ref[y + taps // 2, :columns] = x_ref[0, y].astype(jnp.float32)
    return carry

  jax.lax.fori_loop(0, rows, row, 0)


def _parameters(*semantics: Any) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _cost(x: Array, taps: int) -> pl.CostEstimate:
  return pl.CostEstimate(flops=2 * taps**2 * x.size, transcendentals=0, bytes_accessed=2 * x.nbytes)
