# SPDX-License-Identifier: Apache-2.0
"""Finds the block sizes of the slow cross-attention kernels by the TPU compiler's schedule.

What is compared is the hot loop: the least cycles that the matrix unit needs for a tile, over the
bundles that it takes. The best of each chip belong in kernels/cross_attention/blocks.py.
"""

import itertools
from collections.abc import Iterator

from benchmarks.tpu_schedule import CHIPS, schedule

# Rows of the block: two chunks of the largest size.
SIZES = {"queries": 146, "keys": 24_576, "heads": 7, "kv_heads": 1}
CANDIDATES = {
  "key_block": (1024, 2048, 4096),
  "chunk": (256, 512),
  "strip": (256, 512, 1024),
}
PRODUCTS = {"ours": 2, "ours_backward": 5}


def candidates(chip: str, timeout: float) -> Iterator[tuple[str, dict[str, int], float, int, str]]:
  """Yields kernel, sizes, share of the matrix unit's peak, spilled bytes, and any problem."""
  for kernel, products in PRODUCTS.items():
    for values in itertools.product(*CANDIDATES.values()):
      blocks = dict(zip(CANDIDATES, values))
      options = {**SIZES, "blocks": {**blocks, "row_block": 1024}}
      try:
        (found,) = schedule(f"benchmarks.kernel_cases:{kernel}", options, chip, False, timeout)
      except RuntimeError as error:
        yield kernel, blocks, 0.0, 0, str(error).splitlines()[-1]
        continue
      flops = 2 * products * blocks["key_block"] * blocks["chunk"] * 128
      share = flops / CHIPS[chip].flops_per_cycle / found.hot_bundles
      yield kernel, blocks, share, found.spill, ""


def report(chips: list[str], timeout: float) -> None:
  """Prints every candidate and the best of each kernel and chip."""
  for chip in chips:
    best: dict[str, tuple[float, dict[str, int]]] = {}
    for kernel, blocks, share, spill, problem in candidates(chip, timeout):
      sizes = "  ".join(f"{name} {value:>4}" for name, value in blocks.items())
      figures = problem[:60] or f"share {share:.3f}  spill {spill / 2**20:.2f} MiB"
      print(f"{chip:<4} {kernel:<14} {sizes}  {figures}", flush=True)
      best[kernel] = max(best.get(kernel, (0.0, blocks)), (share, blocks), key=lambda x: x[0])
    for kernel, (share, blocks) in best.items():
      print(f"{chip:<4} {kernel:<14} best: {blocks}, share {share:.3f}", flush=True)
