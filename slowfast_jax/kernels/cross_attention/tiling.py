# SPDX-License-Identifier: Apache-2.0
"""How the TPU kernels see a call: heads folded into rows, keys cut into blocks, tiles sorted.

A tile is one chunk of rows against one block of keys. What every tile needs is known before the
kernel starts, so the kernel does no mask arithmetic where all rows see all keys of the tile, and
nothing at all where no row sees any.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LANES = 128
# What a tile needs. INTERIOR is 0 because the compiler's static profiler reads memory as zeros.
INTERIOR, MASKED, TAIL, HIDDEN = range(4)


@dataclasses.dataclass(frozen=True)
class Fold:
  """Shapes of one call, and how its heads lie in rows and lanes.

  K and V stay as the projection writes them, viewed as [B, S, K * H]. A block of lanes must be a
  multiple of 128 wide, so narrower heads share a block: the rows of each hold zeros in the other
  heads' lanes. That costs the matrix unit nothing, which is 128 lanes deep anyway. Only a head
  size that neither fills nor divides 128 (72, 80) is padded in memory.

  Attributes:
    batch, queries, keys, kv_heads, group, head_dim: the call's sizes; group = query heads of a
      KV head.
    lane_dim: head_dim, or what it is padded to.
    shared: KV heads in one block of lanes.
  """

  batch: int
  queries: int
  keys: int
  kv_heads: int
  group: int
  head_dim: int
  lane_dim: int
  shared: int

  @classmethod
  def of(cls, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> "Fold":
    """The fold of a call with q [B, T, N, H] and k [B, S, K, H]."""
    B, T, N, H = q_shape
    S, K = k_shape[1:3]
    lane_dim, shared = H, 1
    if H % LANES:
      if LANES % H == 0 and K % (LANES // H) == 0:
        shared = LANES // H
      elif K * H <= LANES:
        shared = K
      else:
        lane_dim = -(-H // LANES) * LANES
    return cls(B, T, S, K, N // K, H, lane_dim, shared)

  @property
  def width(self) -> int:
    """Lanes of one block of heads."""
    return self.shared * self.lane_dim

  @property
  def blocks_of_heads(self) -> int:
    """Blocks of heads that K and V hold."""
    return self.kv_heads // self.shared

  @property
  def rows(self) -> int:
    """Rows of queries that read one block of heads."""
    return self.queries * self.shared * self.group

  def keys_view(self, x: Float[Array, "B S K H"]) -> Float[Array, "B S L"]:
    """K or V as the kernels read them: a view, unless the head size must be padded."""
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, self.lane_dim - self.head_dim),))
    return x.reshape(self.batch, self.keys, -1)

  def keys_unview(self, x: Float[Array, "B S L"]) -> Float[Array, "B S K H"]:
    """Undoes `keys_view`."""
    x = x.reshape(self.batch, self.keys, self.kv_heads, self.lane_dim)
    return x[..., : self.head_dim]

  def fold(self, x: Float[Array, "B T N H"], rows: int) -> Float[Array, "B KB R W"]:
    """Queries as rows (query, head), padded to `rows`; zeros in the lanes of other heads."""
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, self.lane_dim - self.head_dim),))
    x = einops.rearrange(x, "B T (KB c G) H -> B KB T c G H", c=self.shared, G=self.group)
    if self.shared > 1:
      own = jnp.eye(self.shared, dtype=bool)[:, None, :, None]
      x = jnp.where(own, x[..., None, :], 0)
      x = x.reshape(*x.shape[:-2], self.width)
    return self._pad_rows(einops.rearrange(x, "B KB T c G W -> B KB (T c G) W"), rows, 0)

  def unfold(self, x: Float[Array, "B KB R W"]) -> Float[Array, "B T N H"]:
    """Undoes `fold`: each row's own lanes."""
    x = einops.rearrange(
      x[:, :, : self.rows],
      "B KB (T c G) (d H) -> B KB T c G d H",
      T=self.queries,
      c=self.shared,
      d=self.shared,
    )
    x = jnp.stack([x[:, :, :, c, :, c] for c in range(self.shared)], axis=3)
    x = einops.rearrange(x, "B KB T c G H -> B T (KB c G) H")
    return x[..., : self.head_dim]

  def fold_scalars(
    self, x: Float[Array, "B T N"], rows: int, fill: float
  ) -> Float[Array, "B KB 1 R"]:
    """One number a query head as a line of rows."""
    x = einops.rearrange(x, "B T (KB c G) -> B KB (T c G) 1", c=self.shared, G=self.group)
    return self._pad_rows(x, rows, fill).swapaxes(2, 3)

  def unfold_scalars(self, x: Float[Array, "B KB 1 R"]) -> Float[Array, "B T N"]:
    """Undoes `fold_scalars`."""
    x = x[:, :, 0, : self.rows]
    return einops.rearrange(
      x, "B KB (T c G) -> B T (KB c G)", T=self.queries, c=self.shared, G=self.group
    )

  def fold_segments(self, q_segments: Int[Array, "B T"], rows: int) -> Int[Array, "B 1 R"]:
    """The segment of each row, -1 (no key's) for padding."""
    segments = jnp.where(q_segments > 0, q_segments, -1)
    segments = jnp.repeat(segments, self.shared * self.group, axis=1)
    return self._pad_rows(segments[:, None, :, None], rows, -1)[..., 0]

  def _pad_rows(self, x: Array, rows: int, fill: float) -> Array:
    padding = ((0, 0), (0, 0), (0, rows - self.rows), (0, 0))
    return jnp.pad(x, padding, constant_values=fill)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
  """The plan that a kernel prefetches as scalars.

  Attributes:
    kinds: what each tile needs, INTERIOR to HIDDEN, flat in the order (batch, chunk, block).
    lengths: valid keys of each batch row.
    front: key blocks that no query sees before the first that one does.
    back: the same after the last. Blocks outside are not read from HBM.
  """

  kinds: Int[Array, " n"]
  lengths: Int[Array, " B"]
  front: Int[Array, " B"]
  back: Int[Array, " B"]

  def scalars(self) -> tuple[Array, ...]:
    """The fields in order, for scalar prefetch."""
    return self.kinds, self.lengths, self.front, self.back


def plan_tiles(
  fold: Fold,
  lengths: Int[Array, " B"] | None,
  row_segments: Int[Array, "B 1 R"] | None,
  kv_segments: Int[Array, "B S"] | None,
  num_chunks: int,
  key_block: int,
) -> Tiles:
  """Sorts the tiles of a call.

  Args:
    fold: the call's shapes.
    lengths: valid prefix of the keys, or None for all.
    row_segments: from `Fold.fold_segments`, or None.
    kv_segments: segments of the keys, together with `row_segments`.
    num_chunks: chunks into which the rows are cut.
    key_block: keys in a block.

  Returns:
    The plan.
  """
  B, S = fold.batch, fold.keys
  num_blocks = -(-S // key_block)
  # Without masks the plan is a constant of the program: NumPy.
  xp = np if lengths is None and row_segments is None else jnp
  valid = xp.full((B,), S, np.int32) if lengths is None else jnp.clip(lengths, 0, S)
  left = valid[:, None] - xp.arange(num_blocks) * key_block
  kinds = xp.where(left >= key_block, INTERIOR, xp.where(left > 0, TAIL, HIDDEN))
  kinds = xp.broadcast_to(kinds[:, None], (B, num_chunks, num_blocks))
  if row_segments is not None and kv_segments is not None:
    kinds = _with_segments(kinds, row_segments, kv_segments, valid, key_block)
  seen = (kinds != HIDDEN).any(axis=1)
  blocks = xp.arange(num_blocks)
  front = xp.where(seen, blocks, num_blocks - 1).min(axis=1)
  last = xp.where(seen, blocks, 0).max(axis=1)
  plan = (kinds.reshape(-1), valid, xp.minimum(front, last), num_blocks - 1 - last)
  return Tiles(*(jnp.asarray(x, jnp.int32) for x in plan))


def _with_segments(kinds, row_segments, kv_segments, valid, key_block):
  """Tiles whose ranges of segments do not meet are hidden; those of one segment stay as is."""
  B, num_chunks, num_blocks = kinds.shape
  S = kv_segments.shape[1]
  segments = jnp.where(jnp.arange(S) < valid[:, None], kv_segments, 0)
  segments = jnp.pad(segments, ((0, 0), (0, num_blocks * key_block - S)))
  key_low, key_high, key_whole = _range(segments.reshape(B, 1, num_blocks, key_block))
  row_low, row_high, row_whole = _range(row_segments.reshape(B, num_chunks, 1, -1))
  apart = (key_low > row_high) | (row_low > key_high)
  one = key_whole & row_whole & (key_low == row_low)
  kinds = jnp.where((kinds == INTERIOR) & ~one, MASKED, kinds)
  return jnp.where(apart, HIDDEN, kinds)


def _range(segments):
  """Smallest and largest real segment along the last axis, and whether it holds only one."""
  highest = np.iinfo(np.int32).max
  low = jnp.where(segments > 0, segments, highest).min(axis=-1)
  high = jnp.maximum(segments, 0).max(axis=-1)
  return low, high, (segments == low[..., None]).all(axis=-1) & (low < highest)
