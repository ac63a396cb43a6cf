# SPDX-License-Identifier: Apache-2.0
"""Models that are read a piece at a time, from wherever they are, and put on a mesh.

Every kind of checkpoint is opened as a `Source`; what writes one, or puts it on devices, takes any.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.checkpoints.parts import Cut, Locate, Piece, cuts
from slowfast_jax.checkpoints.tables import official_slots, split_axis
from slowfast_jax.checkpoints.trees import axes_of, flatten, unflatten, with_shardings
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import SlowFastConfig, abstract_params
from slowfast_jax.sharding import make_mesh, sharding_of

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Source:
  """A model whose parameters are still where they are stored.

  Attributes:
    export: the model without its parameters.
    dtypes: of every parameter, by name: its dtype, or that of each of its pieces or layers.
    pieces: reads all parameters, each whole or in pieces; the argument says where on a mesh they
      will go, which a source may heed.
    num_bytes: of all parameters as they are stored.
  """

  export: Export
  dtypes: Mapping[str, tuple[np.dtype, ...]]
  pieces: Callable[[Locate | None], Iterator[Piece]]
  num_bytes: int


def parameter_shapes(model: SlowFastConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter of this model, by its dotted path."""
  return {name: tuple(leaf.shape) for name, leaf in flatten(abstract_params(model)).items()}


def parameter_cuts(model: SlowFastConfig) -> Callable[[str, int], list[Cut]]:
  """How the parameters of this model are cut: (name, bytes of a number) -> its pieces."""
  shapes, axes = parameter_shapes(model), axes_of(abstract_params(model))
  along = {
    slot.param: split_axis(slot.pattern)
    for slot in official_slots(model, shapes)
    if slot.layer is None
  }
  return lambda name, itemsize: cuts(
    shapes[name], itemsize, axes[name][0] == "layers", along.get(name)
  )


def check_dtype(dtype: str | None) -> np.dtype | None:
  """
  Raises:
    UserError: parameters cannot have this dtype.
  """
  if dtype is None:
    return None
  if dtype not in DTYPES:
    raise UserError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
  return np.dtype(jnp.dtype(dtype))


def source_of(export: Export) -> Source:
  """A model that is on the devices."""
  params = flatten(export.params)
  cuts_of = parameter_cuts(export.model)

  def pieces(locate: Locate | None) -> Iterator[Piece]:
    for name, array in params.items():
      for cut in cuts_of(name, array.dtype.itemsize):
        whole = cut.axis is None
        piece = array if whole else _take(array, cut.start, cut.size, cut.axis)
        yield Piece(name, piece, cut.axis, cut.start)

  return Source(
    dataclasses.replace(export, params=nnx.State({})),
    {name: (np.dtype(array.dtype),) for name, array in params.items()},
    pieces,
    sum(array.nbytes for array in params.values()),
  )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _take(array: Float[Array, "..."], start: Int[Array, ""] | int, size: int, axis: int):
  return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def place(source: Source, mesh: Mesh | None = None, dtype: str | None = None) -> Export:
  """Reads a model straight onto its devices; there is never a second copy of it.

  Args:
    source: the model.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters; None: as they are stored.

  Raises:
    UserError: another dtype, or what reading the source raises.
  """
  wanted = check_dtype(dtype)
  mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
  model = source.export.model
  abstract = with_shardings(abstract_params(model), mesh)
  axes = axes_of(abstract_params(model))

  def locate(name: str, shape: tuple[int, ...], axis: int | None) -> jax.sharding.Sharding:
    # A piece is small: whole along the axis that it is written into.
    names = tuple(None if i == axis else logical for i, logical in enumerate(axes[name]))
    return sharding_of(names, shape, mesh)

  def stored(name: str) -> np.dtype:
    return np.dtype(functools.reduce(jnp.promote_types, source.dtypes[name]))

  targets = {
    name: jax.ShapeDtypeStruct(leaf.shape, wanted or stored(name), sharding=leaf.sharding)
    for name, leaf in flatten(abstract).items()
  }
  arrays: dict[str, jax.Array] = {}
  for piece in source.pieces(locate):
    target = targets[piece.name]
    array = _on_devices(piece, target.dtype, locate)
    if piece.axis is None:
      arrays[piece.name] = array
      continue
    if piece.name not in arrays:
      arrays[piece.name] = jnp.zeros(target.shape, target.dtype, device=target.sharding)
    cut_mesh = target.sharding.shard_shape(target.shape)[piece.axis] != target.shape[piece.axis]
    write = _write_masked if cut_mesh else _write
    # Awaited, or many pieces would wait in memory.
    arrays[piece.name] = jax.block_until_ready(
      write(arrays[piece.name], array, piece.start, piece.axis)
    )
  return dataclasses.replace(source.export, params=unflatten(abstract, arrays))


def _on_devices(piece: Piece, dtype: np.dtype, locate: Locate) -> jax.Array:
  array = piece.array
  if isinstance(array, jax.Array):
    return array.astype(dtype)
  sharding = locate(piece.name, array.shape, piece.axis)
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: np.asarray(array[index], dtype, order="C")
  )


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(whole: Float[Array, "..."], piece: Float[Array, "..."], start, axis: int):
  return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write_masked(whole: Float[Array, "..."], piece: Float[Array, "..."], start, axis: int):
  """Along an axis that is spread over devices: each takes what falls into its own part."""
  place = jnp.arange(whole.shape[axis]) - start
  inside = (place >= 0) & (place < piece.shape[axis])
  moved = jnp.take(piece, jnp.clip(place, 0, piece.shape[axis] - 1), axis=axis)
  shape = [1] * whole.ndim
  shape[axis] = -1
  return jnp.where(inside.reshape(shape), moved, whole)


def as_numpy(array: jax.Array | np.ndarray) -> np.ndarray:
  """
  Raises:
    UserError: other processes hold parts of it.
  """
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    raise UserError(
      "The parameters are spread over several processes; save them as Orbax and run "
      "`slowfast convert` on the folder."
    )
  return np.asarray(array)
