# SPDX-License-Identifier: Apache-2.0
"""The slow cross-attention kernel beside JAX's own, by the TPU compiler's schedule.

The figure to trust is the steady state: estimated cycles for each further key, from two lengths,
against the least that the matrix unit needs. It leaves out start and end of a call and waits for
HBM; what HBM must move is counted from the blocks. It is the compiler's estimate, never a measured
time.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_cases import ROWS
from benchmarks.tpu_schedule import CHIPS, Kernel, schedule
from slowfast_jax.errors import UserError
from slowfast_jax.kernels.cross_attention.shapes import Shape

FORWARD = ("ours", "splash", "splash_folded", "flash")
BACKWARD = ("ours_backward", "splash_folded_backward")
# Query heads of a KV head, as in Qwen2-7B; each core of a chip gets one KV head.
GROUP = 7
LENGTHS = (8_192, 12_288)
# The profiler does not come to an end on this project's kernel with more than two chunks of rows,
# so more queries are scaled from as many as fill two. That favours the others: what a step costs
# beside its chunks is divided by fewer.
PROFILED = 146


@dataclasses.dataclass(frozen=True)
class Row:
  """One kernel at one shape on one chip.

  Attributes:
    kernel, chip, queries: which.
    cycles: estimated cycles for 1,024 further keys of one KV head, or None.
    share: least cycles of the matrix unit over `cycles`.
    bytes_ratio: bytes moved over the least for that, at the longer length.
    vmem_mib: VMEM a core in MiB, of which `spill_mib` are spilled registers.
    spill_mib: see there.
    problem: why there are no figures.
  """

  kernel: str
  chip: str
  queries: int
  cycles: float | None = None
  share: float | None = None
  bytes_ratio: float | None = None
  vmem_mib: float | None = None
  spill_mib: float | None = None
  problem: str = ""


def rows(chips: list[str], queries: list[int], timeout: float) -> Iterator[Row]:
  """Compiles and yields one row after the other; each takes up to a few minutes."""
  for chip in chips:
    for length in queries:
      for kernel in (*FORWARD, *(BACKWARD if length > 1 else ())):
        yield _row(kernel, chip, length, timeout)


def _row(kernel: str, chip: str, queries: int, timeout: float) -> Row:
  target = f"benchmarks.kernel_cases:{kernel}"
  heads = {"heads": GROUP * CHIPS[chip].cores, "kv_heads": CHIPS[chip].cores}
  profiled = min(queries, PROFILED) if kernel.startswith("ours") else queries

  def compiled(queries: int, keys: int, profile: bool) -> Kernel:
    sizes = {"queries": queries, "keys": keys, **heads}
    kernels = schedule(target, sizes, chip, profile, timeout)
    # Of a program that runs both, the backward kernel.
    return max(kernels, key=lambda x: ("backward" in x.name or "dkv" in x.name, x.cycles or 0))

  try:
    found = [compiled(profiled, keys, True) for keys in LENGTHS]
    last = found[-1] if profiled == queries else compiled(queries, LENGTHS[-1], False)
  except RuntimeError as error:
    return Row(kernel, chip, queries, problem=str(error).splitlines()[-1])
  shape = Shape(queries, LENGTHS[-1], **heads)
  factor = 2.5 if kernel in BACKWARD else 1
  cycles = share = None
  if found[0].cycles and found[1].cycles:
    cycles = (found[1].cycles - found[0].cycles) / (LENGTHS[1] - LENGTHS[0]) * 1024
    cycles *= queries / profiled
    flops = factor * shape.flops / shape.keys * 1024 / shape.kv_heads
    share = flops / CHIPS[chip].flops_per_cycle / cycles
  moved = _splash_bytes(shape, kernel) if "splash" in kernel else last.hbm_bytes
  ratio = moved / _least_bytes(shape, kernel) if moved else None
  mib = 1 << 20
  return Row(kernel, chip, queries, cycles, share, ratio, last.vmem / mib, last.spill / mib)


def _least_bytes(shape: Shape, kernel: str) -> int:
  if kernel not in BACKWARD:
    return shape.min_bytes()
  # Forward's, and dk, dv, and as much as q and the output for their gradients.
  kv = 4 * shape.batch * shape.kv_heads * shape.keys * shape.head_dim
  return shape.min_bytes() + kv + 4 * shape.batch * shape.heads * shape.queries * shape.head_dim


def _splash_bytes(shape: Shape, kernel: str) -> int | None:
  """From its grid: its blocks are read through a table, which is not at hand here."""
  if kernel in BACKWARD:
    return None
  group = shape.heads // shape.kv_heads
  if kernel == "splash_folded":
    passes = -(-group * shape.queries // ROWS)
  else:
    passes = group * -(-shape.queries // ROWS)
  kv = 4 * shape.batch * shape.kv_heads * shape.keys * shape.head_dim
  return shape.min_bytes() + (passes - 1) * kv


def line(row: Row) -> str:
  """One row of the table."""
  if row.problem:
    return f"{row.chip:<5}{row.queries:>5}  {row.kernel:<24}{row.problem[:60]}"

  def number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)

  return (
    f"{row.chip:<5}{row.queries:>5}  {row.kernel:<24}{number(row.cycles, ',.0f'):>10}"
    f"{number(row.share, '.3f'):>8}{number(row.bytes_ratio, '.2f'):>8}"
    f"{number(row.vmem_mib, '.1f'):>7}{number(row.spill_mib, '.2f'):>7}"
  )


TITLE = (
  f"{'chip':<5}{'T':>5}  {'kernel':<24}{'cycles':>10}{'share':>8}{'bytes':>8}"
  f"{'VMEM':>7}{'spill':>7}"
)
LEGEND = """
By the TPU compiler's schedule (libtpu {libtpu}, no TPU): estimates, not measured times.
cycles: for 1,024 further keys of one KV head (group 7, head size 128), from {lengths} keys.
share:  of what the matrix unit can do at its peak. On v6e a product that is 128 deep fills half
        of a unit 256 deep, so that attention with this head size cannot reach 1.
bytes:  moved between HBM and VMEM over the least possible, at the longer length.
Our kernel with more than {profiled} queries is scaled from that many (see kernel_static.py).
VMEM, spill: MiB a core. A dash: the compiler's profiler failed or does not know the chip.
"""


def report(chips: list[str], queries: list[int], timeout: float, json_path: str | None) -> None:
  """Prints the table as it grows; writes it as JSON too."""
  lengths = " and ".join(f"{x:,}" for x in LENGTHS)
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise UserError("libtpu, the TPU compiler, is missing: pip install libtpu (Linux).") from None
  print(LEGEND.format(libtpu=libtpu, lengths=lengths, profiled=PROFILED))
  print(TITLE, flush=True)
  table: list[dict[str, Any]] = []
  for row in rows(chips, queries, timeout):
    print(line(row), flush=True)
    table.append(dataclasses.asdict(row))
    if json_path:
      with open(json_path, "w") as file:
        json.dump(table, file, indent=1)
