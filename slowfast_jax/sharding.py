# SPDX-License-Identifier: Apache-2.0
"""The mesh, and the one table that says which mesh axis each logical axis lands on.

Model code names axes ("embed", "heads", "batch"); nothing there knows the mesh.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from slowfast_jax.errors import UserError

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. A name that is absent is replicated.
RULES: Mapping[str, str | tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  # Frames are encoded each for itself, whatever the language model does with the mesh.
  "frames": MESH_AXES,
  # Slow tokens of a video: attention to them merges over devices, see kernels.
  "slow": "context",
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
  """A mesh over all devices; one axis may be -1 and takes what is left.

  Devices of several TPU slices are joined by the data centre's network, which is slow: only the
  axis `data` reaches from slice to slice.

  Raises:
    UserError: an unknown axis, or sizes that do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  unknown = set(sizes) - set(MESH_AXES)
  if unknown:
    raise UserError(f"mesh: unknown axes {sorted(unknown)}; choose from {MESH_AXES}.")
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  known = math.prod(size for size in shape if size != -1)
  if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if min(shape) < 1 or math.prod(shape) != len(devices):
    raise UserError(
      f"mesh: {dict(zip(MESH_AXES, shape))} does not multiply to {len(devices)} devices; "
      f"for instance {_proposal(shape, len(devices))} with every other axis 1 does."
    )
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    # Of a slice of 16 x 16, 32 chips are two rows: its links are shared out between two axes.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=auto)
  if shape[0] % slices:
    raise UserError(
      f"mesh: data must be a multiple of the {slices} slices, got {shape[0]}; "
      f"for instance mesh.data={slices} and mesh.fsdp=-1."
    )
  within = (shape[0] // slices, *shape[1:])
  grid = mesh_utils.create_hybrid_device_mesh(
    within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, MESH_AXES, axis_types=auto)


def _proposal(asked: list[int], count: int) -> str:
  """The mesh of so many devices that is nearest to the one that was asked for."""
  sizes: dict[str, int] = {}
  for axis, size in reversed(list(zip(MESH_AXES[1:], asked[1:]))):
    sizes[axis] = math.gcd(max(size, 1), count)
    count //= sizes[axis]
  sizes = {"data": count, **sizes}
  return ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)


def spec_of(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Logical axis names as a partition spec."""
  return PartitionSpec(*(None if name is None else RULES.get(name) for name in axes))


def _fits(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Drops mesh axes that do not divide their array axis: those stay replicated."""

  def size(entry: Any) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)

  return PartitionSpec(*(e if n % size(e) == 0 else None for e, n in zip(spec, shape)))


def mesh_in_force() -> AbstractMesh | None:
  """The mesh of the surrounding `jax.set_mesh`; None where there is one device or no mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def axes_that_divide(name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes of a logical one, less the last of them if they do not divide its size."""
  rule = () if name is None else RULES.get(name, ())
  names = (rule,) if isinstance(rule, str) else rule
  while size % math.prod(mesh.shape[axis] for axis in names):
    names = names[:-1]
  return names


def constrain(x: Array, *axes: str | None) -> Array:
  """Lays an array out on the mesh in force, by the logical names of its first axes.

  Where that leaves a choice the compiler makes it: for axes without a name, and for the last mesh
  axes of a name if all of them together do not divide.
  """
  mesh = mesh_in_force()
  if mesh is None:
    return x
  entries: list[Any] = [
    axes_that_divide(name, size, mesh) or PartitionSpec.UNCONSTRAINED
    for name, size in zip(axes, x.shape)
  ]
  entries += [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(entries))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def constrain_state(state: T) -> T:
  """Lays gradients out as their parameters are, so that none is ever whole on a device."""
  mesh = mesh_in_force()
  if mesh is None:
    return state

  def of(leaf: Any) -> Any:
    value = leaf.get_value()
    spec = _fits(spec_of(leaf.get_metadata()["axes"]), value.shape, mesh)
    return leaf.replace(jax.lax.with_sharding_constraint(value, spec))

  return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def state_specs(state: Any, mesh: Mesh | AbstractMesh, over: Collection[str]) -> Any:
  """How the leaves of a state lie over some mesh axes, for `jax.shard_map`."""

  def of(leaf: Any) -> Any:
    axes = leaf.get_metadata().get("axes", ()) if isinstance(leaf, nnx.Variable) else ()
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    named = axes if len(axes) == value.ndim else (None,) * value.ndim
    spec = _fits(spec_of(named), value.shape, mesh)
    kept = PartitionSpec(*(entry if entry in over else None for entry in spec))
    return leaf.replace(kept) if isinstance(leaf, nnx.Variable) else kept

  return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gather(state: T, specs: Any) -> T:
  """Whole arrays of a state of which each device has its part, inside of `jax.shard_map`.

  The gradient of what is gathered is added up over devices as each gets its part of it.
  """

  def of(array: Array, spec: PartitionSpec) -> Array:
    for axis, name in enumerate(spec):
      if name is not None:
        array = jax.lax.all_gather(array, name, axis=axis, tiled=True)
    return array

  return jax.tree.map(of, state, specs)


def sharding_of(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Where an array whose axes have these names lives."""
  return NamedSharding(mesh, _fits(spec_of(axes), shape, mesh))


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Where each leaf of a state lives: parameters by their logical axes, all else replicated.

  Shapes are enough, as of `jax.eval_shape`. Optimiser moments have the same Variables as the
  parameters and so land beside them.
  """

  def of(leaf: Any) -> Any:
    if not isinstance(leaf, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    axes = leaf.get_metadata().get("axes", ())

    def place(array: Any) -> NamedSharding:
      # Some optimisers keep sums over an axis: too small to be worth spreading.
      return sharding_of(axes if len(axes) == array.ndim else (), array.shape, mesh)

    # Several arrays where the parameter is quantised.
    return leaf.replace(jax.tree.map(place, leaf.get_value()))

  return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def sharded_init(
  init: Callable[..., T], mesh: Mesh, *args: Any, compiler_options: dict[str, Any] | None = None
) -> T:
  """Runs `init(*args)` with every leaf created directly on its own devices."""
  shardings = state_shardings(jax.eval_shape(init, *args), mesh)
  return jax.jit(init, out_shardings=shardings, compiler_options=compiler_options)(*args)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over the data and fsdp axes."""
  return NamedSharding(mesh, spec_of(("batch",)))
