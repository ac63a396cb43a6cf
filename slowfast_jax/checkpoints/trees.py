# SPDX-License-Identifier: Apache-2.0
"""States as flat dictionaries, by the names that checkpoints know their arrays under.

Arrays are stored by their dotted path ("decoder.layers.mlp.up.kernel") and are read straight onto
their devices, whatever number of devices wrote them.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from slowfast_jax.errors import UserError
from slowfast_jax.sharding import state_shardings

T = TypeVar("T")


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves of a state by their dotted paths."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_dotted(path): leaf for path, leaf in leaves}


def unflatten(like: T, leaves: Mapping[str, Any]) -> T:
  """The inverse of `flatten`, for a tree of the structure of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flatten(like)])


def with_shardings(shapes: T, mesh: Mesh) -> T:
  """Shapes, as of `jax.eval_shape`, with the places of their arrays on the mesh."""
  shardings = state_shardings(shapes, mesh)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def axes_of(state: Any) -> dict[str, tuple[str | None, ...]]:
  """The logical axes of every parameter, by its dotted path."""
  leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return {_dotted(path): leaf.get_metadata()["axes"] for path, leaf in leaves}


def _dotted(path: tuple) -> str:
  keys = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
  # The step into an nnx.Variable says nothing.
  return ".".join(keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys)


def read_arrays(
  folder: epath.Path, expected: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads all arrays of a folder, each straight onto its devices.

  Raises:
    UserError: the folder has other arrays than were expected.
    Exception: it cannot be read.
  """
  handler = ocp.StandardCheckpointHandler()
  with contextlib.closing(handler):
    stored = stored_arrays(handler, folder)
    check_names(folder, {name: tuple(x.shape) for name, x in stored.items()}, expected)
    return handler.restore(folder, args=ocp.args.StandardRestore(expected))


def stored_arrays(handler: ocp.StandardCheckpointHandler, folder: epath.Path) -> dict[str, Any]:
  """Shapes and dtypes of what a folder holds.

  Raises:
    Exception: it cannot be read.
  """
  stored = handler.metadata(folder)
  if stored is None:
    raise ValueError("the description of its arrays is missing")
  return dict(stored.tree)


def first_line(error: Exception) -> str:
  """Orbax appends pages of details."""
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def check_names(
  folder: epath.Path, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any]
) -> None:
  """
  Raises:
    UserError: with some of the names that are missing, not expected, or of another shape.
  """
  missing = [name for name in expected if name not in stored]
  extra = [name for name in stored if name not in expected]
  shapes = [
    f"{name} (expected {expected[name].shape}, got {stored[name]})"
    for name in expected
    if name in stored and stored[name] != tuple(expected[name].shape)
  ]
  groups = {"missing": missing, "not of this model": extra, "of another shape": shapes}
  wrong = [
    f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in groups.items() if names
  ]
  if wrong:
    raise UserError(
      f"{folder}: the arrays do not fit the model ({'; '.join(wrong)}); the config is another one, "
      "or another version of slowfast_jax wrote them."
    )
