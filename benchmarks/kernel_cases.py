# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention as this project computes it, and as JAX's own TPU kernels do.

Each function returns a program and its inputs' shapes, for `benchmarks.tpu_schedule`.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp

from benchmarks.tpu_schedule import CHIPS
from slowfast_jax.kernels.cross_attention.blocks import NAMES, choose, round_up
from slowfast_jax.kernels.cross_attention.pallas_backward import backward
from slowfast_jax.kernels.cross_attention.pallas_forward import forward
from slowfast_jax.kernels.cross_attention.shapes import Shape
from slowfast_jax.kernels.cross_attention.tiling import Fold, Tiles, plan_tiles

# Of the library kernels: rows, and keys fetched and computed at a time.
ROWS, FETCHED, COMPUTED = 512, 2048, 512


def ours(blocks=None, **sizes):
  """This project's kernel on queries that are folded, as the library kernels are given theirs.

  `blocks` replaces fields of the block sizes that the table gives.
  """
  shape = Shape(**sizes)
  fold, table = _ours(shape)
  blocks = dataclasses.replace(table.forward, **(blocks or {}))
  q, k, tiles = _ours_inputs(shape, fold, blocks, round_up(fold.rows, blocks.row_block))

  def program(q, k, v, *tiles):
    return forward(q, k, v, Tiles(*tiles), None, fold=fold, blocks=blocks)

  return program, (q, k, k, *tiles)


def ours_backward(blocks=None, **sizes):
  """One call of this project's backward kernel, likewise; more rows than fit take several."""
  shape = Shape(**sizes)
  fold, table = _ours(shape)
  blocks = dataclasses.replace(table.backward, **(blocks or {}))
  q, k, tiles = _ours_inputs(shape, fold, blocks, blocks.row_block)
  line = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)

  def program(q, do, lse, delta, k, v, *tiles):
    options = {"fold": fold, "blocks": blocks, "out_dtype": k.dtype}
    return backward(q, do, lse, delta, k, v, Tiles(*tiles), None, **options)

  return program, (q, q, line, line, k, k, *tiles)


def _ours(shape):
  q, k, _ = shape.arrays()
  fold = Fold.of(q.shape, k.shape)
  return fold, choose(fold, k.dtype.itemsize)


def _ours_inputs(shape, fold, sizes, rows):
  """Folded queries, keys, and the plan as inputs: the profiler cannot follow computed scalars."""
  q = (shape.batch, fold.blocks_of_heads, rows, fold.width)
  k = (shape.batch, fold.keys, fold.blocks_of_heads * fold.width)
  plan = plan_tiles(fold, None, None, None, rows // sizes.chunk, sizes.key_block)
  tiles = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in plan.scalars()]
  return *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, k)), tiles


def tile_on(chip: str, kernel: str, shape: Shape) -> dict[str, int]:
  """Key block and chunk that the table of block sizes gives this project's kernel on a chip."""
  _, table = _ours_on(chip, shape)
  sizes = table.backward if kernel == "ours_backward" else table.forward
  return {"key_block": sizes.key_block, "chunk": sizes.chunk}


def calls_on(chip: str, kernel: str, shape: Shape) -> int:
  """Calls of this project's kernel that a shape takes on a chip."""
  fold, table = _ours_on(chip, shape)
  return -(-fold.rows // table.backward.row_block) if kernel == "ours_backward" else 1


def _ours_on(chip, shape):
  kind = next(kind for kind, name in NAMES.items() if name == chip)
  device = jax.sharding.AbstractDevice(kind, CHIPS[chip].cores, "tpu")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    return _ours(shape)


def flash(**sizes):
  """JAX's flash_attention: K and V repeated to every query head."""
  from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

  shape = Shape(**sizes)
  q = _heads_first(shape, shape.heads, shape.queries)
  k = _heads_first(shape, shape.heads, shape.keys)
  rows = min(ROWS, shape.queries)
  blocks = BlockSizes(block_q=rows, block_k_major=FETCHED, block_k=COMPUTED, block_b=1)
  return lambda *x: flash_attention(*x, sm_scale=1.0, block_sizes=blocks), (q, k, k)


def splash(**sizes):
  """JAX's splash attention in its own grouped form."""
  kernel, q, k = _grouped(Shape(**sizes))
  return kernel, (q, k, k)


def splash_backward(**sizes):
  """Forward and fused backward of the same."""
  kernel, q, k = _grouped(Shape(**sizes))
  return _backward_of(kernel), (q, k, k, q)


def splash_folded(**sizes):
  """Splash attention with the group folded into its rows by hand."""
  kernel, q, k = _folded(Shape(**sizes))
  return jax.vmap(kernel), (q, k, k)


def splash_folded_backward(**sizes):
  """Forward and fused backward of the same."""
  kernel, q, k = _folded(Shape(**sizes))
  return _backward_of(jax.vmap(kernel)), (q, k, k, q)


def _backward_of(kernel):
  def program(q, k, v, do):
    _, transpose = jax.vjp(kernel, q, k, v)
    return transpose(do)

  return program


def _grouped(shape):
  kernels, masks = _splash()
  group = shape.heads // shape.kv_heads
  mask = masks.MultiHeadMask([masks.FullMask((shape.queries, shape.keys))] * group)
  blocks = _splash_blocks(kernels, shape.queries)
  kernel = jax.vmap(kernels.make_splash_mqa_single_device(mask, block_sizes=blocks))
  q = (shape.batch, shape.kv_heads, group, shape.queries, shape.head_dim)
  k = _heads_first(shape, shape.kv_heads, shape.keys)
  return jax.vmap(kernel), jax.ShapeDtypeStruct(q, k.dtype), k


def _folded(shape):
  kernels, masks = _splash()
  rows = shape.queries * shape.heads // shape.kv_heads
  mask = masks.MultiHeadMask([masks.FullMask((rows, shape.keys))] * shape.kv_heads)
  kernel = kernels.make_splash_mha_single_device(mask, block_sizes=_splash_blocks(kernels, rows))
  q = _heads_first(shape, shape.kv_heads, rows)
  return kernel, q, _heads_first(shape, shape.kv_heads, shape.keys)


def _splash_blocks(kernels, rows):
  rows = min(ROWS, rows)
  return kernels.BlockSizes(
    block_q=rows,
    block_kv=FETCHED,
    block_kv_compute=COMPUTED,
    block_q_dkv=rows,
    block_kv_dkv=FETCHED,
    block_kv_dkv_compute=COMPUTED,
    use_fused_bwd_kernel=True,
  )


def _heads_first(shape, heads, length):
  return jax.ShapeDtypeStruct((shape.batch, heads, length, shape.head_dim), jnp.bfloat16)


def _splash():
  """Splash attention, made to compute on the profiler's memory of zeros.

  Its table of blocks reads as zeros there, which mean "skip"; here they mean "compute". The work
  of a block is what it is on a TPU.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  module = splash_attention_kernel
  source = inspect.getsource(module._next_nonzero)
  exec(source.replace("> 0", ">= 0"), module.__dict__)
  return module, splash_attention_mask
