# SPDX-License-Identifier: Apache-2.0
"""The few layers that everything is made of: projections, norms, embeddings, stacks of layers.

Every parameter carries the logical names of its axes (`axes`); which mesh axis they land on is
decided in `sharding.py`. Parameters are float32 by default; compute happens in the dtype of the
input.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slowfast_jax.models.apart import is_apart
from slowfast_jax.models.int8 import is_int8, linear_int8
from slowfast_jax.models.remat import PRODUCT, keep
from slowfast_jax.sharding import axes_that_divide, mesh_in_force

# Standard deviation of fresh token embeddings, of words and of pictures alike. Much smaller, and
# what the first layers add would drown which token it is.
TOKEN_SCALE = 0.3

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")


class Keys:
  """The keys that `nnx.Rngs(key)` gives, counted by Python: a model is traced four times faster."""

  def __init__(self, key: Array):
    self._key, self._count = key, 0

  def params(self) -> Array:
    """The next key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count - 1)


Rngs = nnx.Rngs | Keys


def make_param(
  init: Callable,
  rngs: Rngs,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  **metadata: Any,
) -> nnx.Param:
  """A float32 parameter whose axes have logical names, e.g. ("embed", "heads", None)."""
  if len(shape) != len(axes):
    raise ValueError(f"A parameter of shape {shape} needs {len(shape)} axis names, got {axes}.")
  return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, **metadata)


def linear(
  equation: str, x: Float[Array, "..."], kernel: Any, dtype: Any = None
) -> Float[Array, "..."]:
  """The einsum of x and a float32 kernel, computed in the dtype of x.

  Its derivative is its own for one reason: the kernel's gradient is summed in float32, on a device
  and over devices. Left to itself, JAX rounds every device's part of it to the dtype of x.

  Args:
    equation: e.g. "...D,DNH->...NH".
    x: activations.
    kernel: a parameter; or one that `int8` has rounded, for answering.
    dtype: of the result; None: that of x.
  """
  if is_int8(kernel):
    return linear_int8(equation, x, kernel, dtype or x.dtype)
  with jax.named_scope(equation):  # For readers of profiles.
    return keep(_linear(_in_order(equation), x.dtype, dtype or x.dtype, x, kernel), PRODUCT)


@functools.cache
def _in_order(equation: str) -> str:
  """The equation with a, b, c ... for the kernel's axes.

  `jnp.einsum` sums axes in the order of their names. In another order than that of the memory, XLA
  for CPU transposes the kernel first.
  """
  axes = equation.split("->")[0].split(",")[1]
  return equation.translate(str.maketrans(axes, "abcdefgh"[: len(axes)]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(equation: str, inner: Any, outer: Any, x: Array, kernel: Array) -> Array:
  return jnp.einsum(equation, x, kernel.astype(inner), preferred_element_type=outer)


def _linear_forward(equation: str, inner: Any, outer: Any, x: Any, kernel: Any):
  # Kept only for a gradient that is asked for: a frozen kernel's costs no memory.
  kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
  return _linear(equation, inner, outer, x.value, kernel.value), kept


def _linear_backward(equation: str, inner: Any, outer: Any, kept: tuple, dy: Any):
  x, kernel = kept
  if isinstance(dy, jax.custom_derivatives.SymbolicZero):
    return None, None
  operands, out = equation.replace("...", "pqrstu"[: dy.ndim - _num_outputs(equation)]).split("->")
  given, letters = operands.split(",")
  dy = dy.astype(inner)
  dx = None if kernel is None else jnp.einsum(f"{out},{letters}->{given}", dy, kernel.astype(inner))
  if x is None:
    return dx, None
  sums = jnp.einsum(f"{given},{out}->{letters}", x, dy, preferred_element_type=jnp.float32)
  return dx, sums


def _num_outputs(equation: str) -> int:
  return len(equation.split("->")[1].removeprefix("..."))


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


@jax.custom_vjp
def written(x: T) -> T:
  """The same arrays, written to memory: what follows does not compute them again.

  Unlike `optimization_barrier` it leaves their gradients alone: these may be computed where the
  product is that they come from.
  """
  return jax.lax.optimization_barrier(x)


written.defvjp(lambda x: (written(x), None), lambda _, dx: (dx,))


@jax.custom_vjp
def gradient_written(x: T) -> T:
  """The same arrays, whose gradients are written to memory; see `written`."""
  return x


gradient_written.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


def add_param(x: Float[Array, "..."], param: nnx.Param | Array) -> Float[Array, "..."]:
  """x plus a parameter, whose gradient is then a sum in float32."""
  return (x.astype(jnp.float32) + param[...]).astype(x.dtype)


class Projection(nnx.Module):
  """A linear map written as an einsum, e.g. "...D,DNH->...NH", with an optional bias.

  Axes of the kernel that the equation contracts are inputs; the others are outputs and carry the
  bias. Kernels start at a standard deviation of gain / sqrt(fan-in), biases at a constant.
  """

  def __init__(
    self,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    bias: bool = False,
    gain: float = 1.0,
    bias_start: float = 0.0,
    rngs: Rngs,
  ):
    self.equation = equation
    operands, out = equation.split("->")
    letters = operands.split(",")[1]
    outputs = tuple(i for i, letter in enumerate(letters) if letter in out)
    inputs = tuple(i for i in range(len(letters)) if i not in outputs)
    init = nnx.initializers.variance_scaling(
      gain**2, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs
    )
    # How many of its axes are inputs (they come first), for optimisers that look at matrices.
    self.kernel = make_param(init, rngs, shape, axes, inputs=len(inputs))
    self.bias = (
      make_param(
        nnx.initializers.constant(bias_start),
        rngs,
        tuple(shape[i] for i in outputs),
        tuple(axes[i] for i in outputs),
      )
      if bias
      else None
    )

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = linear(self.equation, x, self.kernel[...])
    return y if self.bias is None else add_param(y, self.bias)


class RMSNorm(nnx.Module):
  """`w * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in float32."""

  def __init__(self, size: int, *, eps: float, axis: str | None = "norm", rngs: Rngs):
    self.eps = eps
    self.scale = make_param(nnx.initializers.ones, rngs, (size,), (axis,))

  def __call__(self, x: Float[Array, "*L D"]) -> Float[Array, "*L D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm with scale and bias over the last axis, statistics in float32."""

  def __init__(self, size: int, *, eps: float, rngs: Rngs):
    self.eps = eps
    self.scale = make_param(nnx.initializers.ones, rngs, (size,), ("norm",))
    self.bias = make_param(nnx.initializers.zeros, rngs, (size,), ("norm",))

  def __call__(self, x: Float[Array, "*L E"]) -> Float[Array, "*L E"]:
    y = x.astype(jnp.float32)
    centred = y - jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + self.eps)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def look_up(
  table: Float[Array, "V D"], ids: Int[Array, "*L"], dtype: jnp.dtype
) -> Float[Array, "*L D"]:
  """Rows of a table of embeddings.

  Where the table is spread, each device looks all ids of its group up in its own columns, and rows
  travel: neither the table nor its gradient is ever whole on a device.
  """
  mesh = mesh_in_force()
  spread = 1 if mesh is None else mesh.shape["fsdp"]
  rows = () if mesh is None or ids.ndim < 2 else axes_that_divide("batch", ids.shape[0], mesh)
  # Rounded behind the look-up: gradients of one word at many places are then summed in float32.
  if spread == 1 or "fsdp" not in rows or table.shape[1] % spread:
    return table[ids].astype(dtype)

  def local(table: Array, ids: Array) -> Array:
    ids = jax.lax.all_gather(ids, "fsdp", tiled=True)
    found = table[ids].astype(dtype)
    return jax.lax.all_to_all(found, "fsdp", 0, found.ndim - 1, tiled=True)

  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(None, "fsdp"), PartitionSpec(rows)),
    out_specs=PartitionSpec(rows),
    axis_names=set(rows),
  )(table, ids)


class Embedding(nnx.Module):
  """Token ids to vectors; `attend` is the tied output projection."""

  def __init__(self, num_embeddings: int, size: int, *, rngs: Rngs):
    init = nnx.initializers.normal(TOKEN_SCALE)
    self.embedding = make_param(init, rngs, (num_embeddings, size), ("vocab", "embed"))

  def __call__(self, ids: Int[Array, "*L"], dtype: jnp.dtype) -> Float[Array, "*L D"]:
    return look_up(self.embedding[...], ids, dtype)

  def attend(self, x: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
    """Float32 scores of all embeddings."""
    return linear("...D,VD->...V", x, self.embedding[...], jnp.float32)


def stack(make_layer: Callable[[Rngs], M], count: int, *, rngs: Rngs) -> M:
  """`count` layers as one module whose parameters have a leading "layers" axis."""
  structures: list[nnx.GraphDef] = []

  def one(key: Array) -> nnx.State:
    graphdef, state = nnx.split(make_layer(Keys(key)))
    structures.append(graphdef)
    return state

  stacked = jax.vmap(one)(jax.random.split(rngs.params(), count))
  named = jax.tree.map(
    lambda p: p.replace(axes=("layers", *p.get_metadata()["axes"])),
    stacked,
    is_leaf=lambda p: isinstance(p, nnx.Variable),
  )
  return nnx.merge(structures[0], named)


def unstack(layers: M, start: int, stop: int) -> tuple[nnx.GraphDef[M], nnx.State]:
  """Layers start..stop of a stack, as (graphdef, state) for `jax.lax.scan` or `nnx.merge`."""
  graphdef, state = nnx.split(layers)
  return graphdef, jax.tree.map(lambda p: p[start:stop], state)


def layer_of(layers: M, index: int) -> M:
  """One layer of a stack."""
  graphdef, state = nnx.split(layers)
  return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], state, is_leaf=is_apart))
