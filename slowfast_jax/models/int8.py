# SPDX-License-Identifier: Apache-2.0
"""Int8 weights for answering: what the decoder's products read is a quarter of float32.

Only weights are rounded, each output channel with a scale of its own. Activations, embeddings,
norms, gates and the vision encoder stay as they are. The quantised arrays are qwix's, an optional
package, so it is imported where it is used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from slowfast_jax.errors import UserError
from slowfast_jax.sharding import sharding_of

# The parts of the model whose kernels are rounded; they are nearly all that a new token reads.
_PARTS = ("decoder", "adapters.kv")


def check_int8() -> None:
  """
  Raises:
    UserError: qwix is not installed.
  """
  try:
    import qwix  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"int8 weights need a package that is not installed ({error.name}); "
      'pip install ".[int8]" in the checkout'
    ) from error


def is_int8(kernel: Any) -> bool:
  """Whether this is a quantised kernel."""
  return hasattr(kernel, "qvalue")


def has_int8_weights(params: nnx.State) -> bool:
  """Whether any kernel is quantised."""
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return any(is_int8(leaf.get_value()) for leaf in leaves)


def linear_int8(equation: str, x: Float[Array, "..."], kernel: Any, dtype: Any) -> Array:
  """The einsum of x and a quantised kernel, computed in the dtype of x.

  Args:
    equation, x: as in `layers.linear`.
    kernel: a qwix array.
    dtype: of the result.
  """
  import qwix

  # Behind a barrier with x, or the compiler turns weights into floating point once, before the
  # loop over new tokens, and keeps them all.
  x, kernel = jax.lax.optimization_barrier((x, kernel))
  letters = equation.replace("...", "pqrstu"[: x.ndim - _num_inputs(equation)])
  return qwix.einsum(letters, x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _num_inputs(equation: str) -> int:
  return len(equation.split(",")[0].removeprefix("..."))


def with_int8_weights(params: nnx.State) -> nnx.State:
  """The same parameters, the kernels of decoder and slow keys and values as int8.

  The floating point kernels are freed one by one; `params` cannot be used any more.

  Raises:
    UserError: qwix is not installed.
  """
  check_int8()

  def of(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
    name = ".".join(str(key.key) for key in path if hasattr(key, "key"))
    if not name.startswith(_PARTS) or "inputs" not in leaf.get_metadata():
      return leaf
    kernel, axes = leaf.get_value(), leaf.get_metadata()["axes"]
    quantised = _quantise(kernel, axes, leaf.get_metadata()["inputs"])
    jax.block_until_ready(quantised)
    kernel.delete()
    return leaf.replace(quantised)

  return jax.tree_util.tree_map_with_path(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _quantise(kernel: Float[Array, "..."], axes: tuple[str | None, ...], inputs: int) -> Any:
  """A qwix array on the devices of the kernel; axes that are contracted share a scale."""
  import qwix

  first = int(axes[0] == "layers")
  outputs = [i for i in range(kernel.ndim) if not first <= i < first + inputs]

  def quantise(kernel: Array) -> Any:
    return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)

  places: Any = kernel.sharding
  if isinstance(places, NamedSharding):
    at = functools.partial(_place, axes=axes, mesh=places.mesh)
    places = jax.tree.map(at, jax.eval_shape(quantise, kernel))
  return jax.jit(quantise, out_shardings=places)(kernel)


def _place(array: jax.ShapeDtypeStruct, axes: tuple[str | None, ...], mesh: Any) -> NamedSharding:
  return sharding_of(axes, array.shape, mesh)
