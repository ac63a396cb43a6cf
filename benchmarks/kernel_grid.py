# SPDX-License-Identifier: Apache-2.0
"""The slow cross-attention kernels compiled at every shape of a Qwen2-7B model, for every chip.

What the compiler says without its profiler, which is slow: the hot loop against the least cycles of
the matrix unit for a tile, bytes of HBM, VMEM and spilled registers.
"""

import dataclasses

from benchmarks.kernel_cache import cached_schedule
from benchmarks.kernel_cases import calls_on, tile_on
from benchmarks.tpu_schedule import CHIPS
from slowfast_jax.kernels.cross_attention.shapes import KEY_LENGTHS, Shape

BATCHES = (1, 4)
# Products of a tile.
PRODUCTS = {"ours": 2, "ours_backward": 5}
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class GridRow:
  """One kernel at one shape on one chip.

  Attributes:
    kernel, chip: which.
    shape: the call's.
    share: least cycles of the matrix unit for a tile over the bundles of the hot loop.
    bytes_ratio: bytes moved over the least.
    vmem_mib: VMEM a core in MiB, of which `spill_mib` are spilled registers.
    spill_mib: see there.
    problem: why there are no figures.
  """

  kernel: str
  chip: str
  shape: Shape
  share: float | None = None
  bytes_ratio: float | None = None
  vmem_mib: float | None = None
  spill_mib: float | None = None
  problem: str = ""


def cases(chips: list[str], queries: list[int]) -> list[tuple[str, str, Shape]]:
  """(kernel, chip, shape) of the grid; one query is decoding, which has no backward."""
  return [
    (kernel, chip, Shape(length, keys, batch))
    for chip in chips
    for length in queries
    for keys in KEY_LENGTHS
    for batch in BATCHES
    for kernel in (PRODUCTS if length > 1 else ("ours",))
  ]


def compute_row(kernel: str, chip: str, shape: Shape, timeout: float) -> GridRow:
  """Compiles one kernel."""
  sizes = {"queries": shape.queries, "keys": shape.keys, "batch": shape.batch}
  try:
    (found,) = cached_schedule(kernel, sizes, chip, False, timeout)
  except RuntimeError as error:
    return GridRow(kernel, chip, shape, problem=str(error).splitlines()[-1])
  tile = tile_on(chip, kernel, shape)
  # The forward kernel takes two tiles in one piece of code, where there are two.
  rows = shape.queries * shape.heads // shape.kv_heads
  tiles = 2 if kernel == "ours" and rows > tile["chunk"] else 1
  flops = 2 * tiles * PRODUCTS[kernel] * tile["key_block"] * tile["chunk"] * shape.head_dim
  share = flops / CHIPS[chip].flops_per_cycle / found.hot_bundles
  least = shape.min_bytes() if kernel == "ours" else shape.min_backward_bytes()
  moved = found.hbm_bytes and found.hbm_bytes * calls_on(chip, kernel, shape)
  ratio = moved / least if moved else None
  return GridRow(kernel, chip, shape, share, ratio, found.vmem / MIB, found.spill / MIB)


def line(row: GridRow) -> str:
  """One row of the table."""
  shape = row.shape
  what = "decode" if shape.queries == 1 else "forward"
  what = "backward" if row.kernel == "ours_backward" else what
  start = f"{row.chip:<5}{shape.queries:>5}{shape.keys:>8,}{shape.batch:>3}  {what:<9}"
  if row.problem:
    return start + row.problem[:60]
  ratio = "-" if row.bytes_ratio is None else f"{row.bytes_ratio:.2f}"
  return f"{start}{row.share:>8.3f}{ratio:>8}{row.vmem_mib:>7.1f}{row.spill_mib:>7.2f}"


TITLE = (
  f"{'chip':<5}{'T':>5}{'S':>8}{'B':>3}  {'pass':<9}{'share':>8}{'bytes':>8}{'VMEM':>7}{'spill':>7}"
)
LEGEND = """
This project's kernels at every shape (28 query heads on 4, of 128).
share:  least cycles of the matrix unit for its tiles over the bundles of the hot loop. Rows that
        fill the last 128 count as work here: with few queries less of it is useful. Too high, up
        to above 1, where the compiler cuts a tile into several basic blocks: the largest counts.
"""
