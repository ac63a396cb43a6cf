# SPDX-License-Identifier: Apache-2.0
"""Self-attention of the decoder and of the encoder: the library kernel of the platform.

On TPU that is JAX's splash attention, which keeps no array of positions by positions and skips
blocks that a causal mask hides; elsewhere `jax.nn.dot_product_attention`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import einops
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from slowfast_jax.kernels import one_query
from slowfast_jax.kernels.cross_attention.blocks import (
  round_up,
  target_device_kind,
  target_platform,
)
from slowfast_jax.sharding import axes_that_divide, mesh_in_force

LANES = 128
# What a remat policy may call the result. The backward pass of splash attention needs it, and the
# sums of its rows, which have the same name: who keeps them does not run the kernel again.
RESULT = "attention"
CAUSAL = "causal"
# Queries and keys of a block, whose scores are 4 MiB; v4 has 16 MiB of VMEM.
LARGEST_BLOCK = 1024
LARGEST_BLOCK_OF_V4 = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal:
  """A mask told by its rule: a position sees itself and earlier ones of its own segment, 0 = none.

  Attributes:
    segments: packing ids.
  """

  segments: Int[Array, "B T"]

  def dense(self) -> Bool[Array, "B 1 T T"]:
    """The mask as an array."""
    order = jnp.arange(self.segments.shape[1])
    causal = order[:, None] >= order[None, :]
    same = self.segments[:, :, None] == self.segments[:, None, :]
    return (causal & same & (self.segments > 0)[:, :, None])[:, None]


def self_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B L K H"],
  v: Float[Array, "B L K W"],
  mask: Causal | Bool[Array, "B 1 T L"] | None = None,
  *,
  rows: str = "batch",
  valid: int | None = None,
) -> Float[Array, "B T N W"]:
  """Attention with grouped heads, logits scaled by 1 / sqrt(H).

  Args:
    q, k, v: queries, keys and values; on TPU heads of values may be padded, see `padded_head`.
    mask: which key each query sees; None: all. An array is taken where keys are a cache.
    rows: the logical name of the first axis.
    valid: without a mask, keys that count: the first so many; None: all.

  Returns:
    In q's shape and dtype with heads of v's size, marked as RESULT. What a query that sees no key
    gets means nothing.
  """
  if isinstance(mask, jax.Array) or target_platform() != "tpu":
    dense = mask.dense() if isinstance(mask, Causal) else mask
    if mask is None and valid is not None:
      dense = (jnp.arange(k.shape[1]) < valid)[None, None, None]
    if target_platform() == "cpu" and dense is not None and one_query.applies(q.shape, k.shape):
      return one_query.attention(q, k, v, dense)
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=dense), RESULT)
  return attention_on_tpu(q, k, v, mask, rows=rows, valid=valid)


def padded_length(length: int) -> int:
  """Positions to which a sequence is best padded once, so that no attention has to: TPU's lanes."""
  return round_up(length, LANES) if target_platform() == "tpu" else length


def padded_head(size: int) -> int:
  """Elements to which an encoder's projections best pad the heads of its values.

  Then nothing is copied around attention: neither values nor what is read of them fill too few
  lanes. On v6e the copies take longer than the products with zeros; elsewhere they do not.
  """
  return round_up(size, LANES) if target_device_kind().startswith("TPU v6") else size


def attention_on_tpu(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K W"],
  mask: Causal | None,
  *,
  rows: str = "batch",
  valid: int | None = None,
  interpret: bool = False,
) -> Float[Array, "B T N W"]:
  """Splash attention, on each device for its rows and heads.

  Args:
    q, k, v, mask, rows, valid: as in `self_attention`.
    interpret: run Pallas's interpreter; for tests.
  """
  causal = mask is not None
  if mask is None:
    seen = jnp.arange(q.shape[1]) < (q.shape[1] if valid is None else valid)
    segments = jnp.broadcast_to(seen.astype(jnp.int32), q.shape[:2])
  else:
    segments = mask.segments

  def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
    # The name of the mask is in the compiled program, where the mask itself is not to be seen.
    with jax.named_scope(CAUSAL if causal else "full"):
      return _splash(q, k, v, segments, causal, interpret)

  mesh = mesh_in_force()
  if mesh is None:
    return attend(q, k, v, segments)
  spec = _place(rows, q.shape[0], k.shape[2], mesh)
  inputs = (spec, spec, spec, PartitionSpec(spec[0]))
  # Unchecked: what a kernel writes does not say over which axes it varies.
  return jax.shard_map(attend, mesh=mesh, in_specs=inputs, out_specs=spec, check_vma=False)(
    q, k, v, segments
  )


def _place(rows: str, count: int, kv_heads: int, mesh: AbstractMesh) -> PartitionSpec:
  """Rows over as many of their mesh axes as divide them, heads over what is left of theirs."""
  axes = axes_that_divide(rows, count, mesh)
  heads = tuple(axis for axis in axes_that_divide("heads", kv_heads, mesh) if axis not in axes)
  return PartitionSpec(axes or None, None, heads or None)


def _splash(
  q: Array, k: Array, v: Array, segments: Array, causal: bool, interpret: bool
) -> Float[Array, "B T N W"]:
  """Splash attention of the arrays of one device."""
  T, N = q.shape[1:3]
  block = _block(T)
  padded = round_up(T, block)
  # Padding is a segment of its own: no query of it is without a key.
  segments = jnp.pad(segments, ((0, 0), (0, padded - T)))

  def by_head(x: Array) -> Float[Array, "B N T H"]:
    return jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))).swapaxes(1, 2)

  scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  arrays = [by_head(x) for x in (scaled, k, v)]
  widths = [x.shape[-1] for x in arrays]
  if causal:
    one_row = _kernel(N, padded, block, widths, causal, interpret)
    out = jax.vmap(one_row)(*arrays, splash.SegmentIds(segments, segments))
  else:
    # All rows have the same mask, so their heads may be those of one row.
    flat = [einops.rearrange(x, "B N T H -> (B N) T H") for x in arrays]
    all_rows = _kernel(len(flat[0]), padded, block, widths, causal, interpret)
    out = all_rows(*flat, splash.SegmentIds(segments[0], segments[0]))
    out = einops.rearrange(out, "(B N) T H -> B N T H", N=N)
  return out.swapaxes(1, 2)[:, :T]


def _block(length: int) -> int:
  """Positions of a block: the size that leaves the least padding, the largest of those."""
  old = target_device_kind() == "TPU v4"
  largest = LARGEST_BLOCK_OF_V4 if old else LARGEST_BLOCK
  if length <= largest:
    return round_up(length, LANES)
  return min(range(largest, largest // 2 - 1, -LANES), key=lambda size: round_up(length, size))


def _kernel(
  heads: int, length: int, block: int, widths: Sequence[int], causal: bool, interpret: bool
) -> Callable[..., Array]:
  shape = (length, length)
  one = masks.CausalMask(shape) if causal else masks.FullMask(shape)
  # An encoder's heads of 72 fill no 128 lanes, but its positions do, and its projections write them
  # innermost as readily; those of values may be padded.
  layouts = [
    splash.QKVLayout.HEAD_DIM_MINOR if causal or width % LANES == 0 else splash.QKVLayout.SEQ_MINOR
    for width in widths
  ]
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    use_fused_bwd_kernel=True,
    q_layout=layouts[0],
    k_layout=layouts[1],
    v_layout=layouts[2],
  )
  return splash.make_splash_mha(
    masks.MultiHeadMask([one] * heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=RESULT,
    interpret=interpret,
  )
