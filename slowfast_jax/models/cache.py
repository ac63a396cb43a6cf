# SPDX-License-Identifier: Apache-2.0
"""Self-attention's keys and values of all positions so far, which a decode step adds to."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers; slot s holds position s of its row."""

  k: Float[Array, "L B T K H"]
  v: Float[Array, "L B T K H"]

  @property
  def num_slots(self) -> int:
    return self.k.shape[2]

  @property
  def dtype(self) -> jnp.dtype:
    return self.k.dtype

  def write(
    self,
    depth: int | Int[Array, ""],
    slots: Int[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
  ) -> "KVCache":
    """New keys and values of a layer. In place: the cache goes through a step as one array."""
    rows = jnp.arange(k.shape[0])[:, None]
    put = [
      old.at[depth, rows, slots].set(new.astype(old.dtype))
      for old, new in zip((self.k, self.v), (k, v))
    ]
    return KVCache(*put)

  def read(
    self, depth: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys and values of a layer."""
    return self.k[depth], self.v[depth]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatCache:
  """A `KVCache` for a processor, which writes one position of each row at a time.

  Each layer is an array that products take as it is. In any other form XLA for CPU copies all of
  it, for the write and for each product.

  Attributes:
    k, v: keys and values of each layer, [B, T, KH]; [T, KH] inside of a loop over one row.
    heads: [K, H].
    turned: whether a layer is [B, K, H, T], which products take of several rows.
  """

  k: tuple[Float[Array, "..."], ...]
  v: tuple[Float[Array, "..."], ...]
  heads: tuple[int, int] = dataclasses.field(metadata={"static": True})
  turned: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of(cls, cache: KVCache, *, turned: bool) -> "FlatCache":
    *axes, K, H = cache.k.shape
    if turned:
      k, v = (tuple(jnp.moveaxis(x, 2, 4)) for x in (cache.k, cache.v))
    else:
      k, v = (tuple(x.reshape(*axes, K * H)) for x in (cache.k, cache.v))
    return cls(k, v, (K, H), turned)

  def entering_loop(self) -> "FlatCache":
    return self._map(lambda x: x[0]) if len(self.k[0]) == 1 and not self.turned else self

  def leaving_loop(self) -> "FlatCache":
    """Undoes `entering_loop`."""
    return self._map(lambda x: x[None]) if self.k[0].ndim == 2 else self

  def _map(self, function: Callable[[Array], Array]) -> "FlatCache":
    k, v = (tuple(map(function, x)) for x in (self.k, self.v))
    return dataclasses.replace(self, k=k, v=v)

  @property
  def num_slots(self) -> int:
    return self.k[0].shape[-1 if self.turned else -2]

  @property
  def dtype(self) -> jnp.dtype:
    return self.k[0].dtype

  def write(
    self,
    depth: int | Int[Array, ""],
    slots: Int[Array, "B 1"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
  ) -> "FlatCache":
    """New keys and values of a layer, row by row: for a scatter all would be copied."""
    i = int(depth)

    def put(layers: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
      flat = layers[i]
      for row, line in enumerate(new.astype(self.dtype)):
        slot = slots[row, 0]
        start = (row, 0, 0, slot) if self.turned else (row, slot, 0)[-flat.ndim :]
        shape = (1, *self.heads, 1) if self.turned else (*[1] * (flat.ndim - 1), -1)
        flat = jax.lax.dynamic_update_slice(flat, line.reshape(shape), start)
      return (*layers[:i], flat, *layers[i + 1 :])

    return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

  def read(
    self, depth: int | Int[Array, ""]
  ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys and values of a layer."""
    k, v = self.k[int(depth)], self.v[int(depth)]
    if self.turned:
      return jnp.moveaxis(k, 3, 1), jnp.moveaxis(v, 3, 1)
    shape = (-1, self.num_slots, *self.heads)
    return k.reshape(shape), v.reshape(shape)


def cache_mask(positions: Int[Array, "B T"], num_slots: int) -> Bool[Array, "B 1 T L"]:
  """Each position sees the slots up to its own; later slots hold nothing yet."""
  return (jnp.arange(num_slots) <= positions[:, :, None])[:, None]
