# SPDX-License-Identifier: Apache-2.0
"""Stacks whose layers are arrays of their own, for a processor.

XLA for CPU copies a layer's kernels out of their stack before it multiplies, which takes three
times as long as the product with one new token. Taken apart nothing is copied, and as views of the
stacks the layers need no memory either.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array


@jax.tree_util.register_pytree_node_class
class Apart:
  """Stands for an array [layers, ...]: `stack[i]` is layer i, and no copy."""

  def __init__(self, layers: Sequence[Array]):
    self.layers = tuple(layers)

  def __getitem__(self, index: int) -> Array:
    return self.layers[index]

  def tree_flatten(self) -> tuple[tuple[Array, ...], None]:
    return self.layers, None

  @classmethod
  def tree_unflatten(cls, _: None, layers: Sequence[Array]) -> "Apart":
    return cls(layers)


def is_apart(x: Any) -> bool:
  """Whether a stack has its layers as arrays of their own."""
  return isinstance(x, Apart)


def views(tree: Any) -> Any:
  """Every array [layers, ...] of a tree as `Apart`, in the same memory: that of one processor."""

  def of(x: Array) -> Apart:
    whole = np.asarray(x)  # A view too, and so is what JAX makes of a part that is aligned.
    (device,) = x.devices()
    return Apart([jax.device_put(layer, device if x.committed else None) for layer in whole])

  return jax.tree.map(of, tree)
