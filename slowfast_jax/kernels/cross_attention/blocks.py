# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the TPU kernels, by chip generation and shape.

The figures in the table come from the compiler's own schedule (`slowfast bench kernel --static`),
not from measured times.
"""

import dataclasses

import jax

from slowfast_jax.kernels.cross_attention.tiling import LANES, Fold

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
  """Sizes of the forward kernel.

  Attributes:
    key_block: keys in a block, a multiple of 128.
    chunk: rows whose scores against a key block are one tile, a multiple of 128. If it is the only
      one, 64 more: these lie otherwise, see `pallas_rows`.
    row_block: rows that stay in VMEM while the keys pass; K and V leave HBM once per row block.
    strip: keys of a tile that are consumed and refilled at a time.
    vmem_limit: bytes that the compiler may use.
    cores: that share a call. Blocks of heads follow each other in one pipeline a core.
  """

  key_block: int
  chunk: int
  row_block: int
  strip: int
  vmem_limit: int
  cores: int


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
  """Sizes of the backward kernel.

  Attributes:
    key_block: keys in a block, a multiple of 128; their dk and dv are written once.
    chunk: rows whose scores against a key block are one tile, a multiple of 128.
    row_block: rows of a call; all stay in VMEM. More rows take several calls.
    strip: keys of a tile that are computed at a time.
    vmem_limit: bytes that the compiler may use.
    transposed: dk and dv are made as [W, keys]. A product that is W = 128 wide fills half of the
      matrix unit of v6e; this way W is what passes through it, and the unit is full.
  """

  key_block: int
  chunk: int
  row_block: int
  strip: int
  vmem_limit: int
  transposed: bool


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of both kernels."""

  forward: ForwardBlocks
  backward: BackwardBlocks


@dataclasses.dataclass(frozen=True)
class _Chip:
  """What the table says of a chip: the VMEM of a core to use, and the largest sizes.

  `many_key_block`: the forward kernel's from `MANY_KEYS` a core on. A step has a fixed cost, but
  the first and the last, which fill and drain the pipeline, grow with the block.
  `wide`: whether its matrix units are 256 wide instead of 128. `cores`: that one device is made of.
  """

  vmem: int
  key_block: int
  many_key_block: int
  chunk: int
  strip: int
  backward_key_block: int
  backward_chunk: int
  backward_strip: int
  wide: bool = False
  cores: int = 1


CHIPS = {
  "v4": _Chip(14 * MIB, 1024, 1024, 512, 512, 1024, 512, 512, cores=2),
  "v5e": _Chip(96 * MIB, 4096, 8192, 512, 512, 4096, 512, 512),
  "v5p": _Chip(60 * MIB, 4096, 4096, 512, 512, 4096, 512, 512, cores=2),
  "v6e": _Chip(120 * MIB, 4096, 8192, 512, 512, 4096, 512, 256, wide=True),
}
# A chip that the table does not know gets sizes that fit everywhere.
SMALLEST = CHIPS["v4"]
NAMES = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}
ROW_BLOCK = 4096
MANY_KEYS = 65_536  # Of all blocks of heads together.


def target_device_kind() -> str:
  """The kind of device that is compiled for: that of the mesh in force, else the default one.

  A mesh of a described topology makes this right where a program is compiled ahead of time.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else jax.devices()[0].device_kind


def target_platform() -> str:
  """The platform that is compiled for: "tpu", "gpu" or "cpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def round_up(x: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-x // step) * step


def choose(fold: Fold, itemsize: int) -> Blocks:
  """Sizes of the kernels on the chip that is compiled for; `itemsize`: bytes of an element of K."""
  chip = CHIPS.get(NAMES.get(target_device_kind(), ""), SMALLEST)
  return Blocks(_forward(chip, fold, itemsize), _backward(chip, fold, itemsize))


def _rows(rows: int, chunk: int, row_block: int) -> tuple[int, int]:
  """Chunk and row block: the largest chunk that divides the rows rounded up to 128."""
  rows = round_up(rows, 128)
  while rows % chunk:
    chunk -= 128
  blocks = -(-rows // row_block)
  return chunk, round_up(-(-rows // blocks), chunk)


def _keys(keys: int, largest: int) -> int:
  """Key block of at most `largest` keys such that little of the last one is left over."""
  return round_up(-(-keys // -(-keys // largest)), 128)


def _forward(chip: _Chip, fold: Fold, itemsize: int) -> ForwardBlocks:
  chunk, row_block = _rows(fold.rows, chip.chunk, ROW_BLOCK)
  exact = round_up(fold.rows, LANES // 2)
  if LANES < exact < chunk and not chip.wide:
    chunk = row_block = exact
  many = fold.keys * fold.blocks_of_heads >= MANY_KEYS * chip.cores
  largest = chip.many_key_block if many else chip.key_block
  sizes = fold.width, itemsize
  while largest > 256 and _forward_bytes(largest, row_block, *sizes) > chip.vmem * 0.85:
    if largest > 512 or row_block <= chunk:
      # 8192, 6144, 4096, 3072 and so on.
      largest = largest * 2 // 3 if largest % 3 == 0 else largest * 3 // 4
    else:
      row_block = round_up(row_block // 2, chunk)
  return ForwardBlocks(
    _keys(fold.keys, largest), chunk, row_block, chip.strip, chip.vmem, chip.cores
  )


def _forward_bytes(key_block, row_block, width, itemsize):
  streamed = 2 * width * itemsize * (2 * row_block + 2 * key_block)
  return streamed + 4 * row_block * (width + key_block + 32)


def _backward(chip: _Chip, fold: Fold, itemsize: int) -> BackwardBlocks:
  largest_rows = ROW_BLOCK
  sizes = fold.width, itemsize
  while _backward_bytes(chip.backward_key_block, largest_rows, *sizes) > chip.vmem * 0.6:
    largest_rows //= 2
  chunk, row_block = _rows(fold.rows, chip.backward_chunk, largest_rows)
  key_block = _keys(fold.keys, chip.backward_key_block)
  return BackwardBlocks(key_block, chunk, row_block, chip.backward_strip, chip.vmem, chip.wide)


def _backward_bytes(key_block, row_block, width, itemsize):
  streamed = 2 * width * (row_block * (2 * itemsize + 4) + 4 * key_block * itemsize)
  return streamed + 4 * width * (row_block + 2 * key_block)
