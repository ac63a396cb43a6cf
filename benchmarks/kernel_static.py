# SPDX-License-Identifier: Apache-2.0
"""The slow cross-attention kernel beside JAX's own, by the TPU compiler's schedule.

The figure to trust is the steady state: estimated cycles for each further key, from two lengths,
against the least that the matrix unit needs. It leaves out start and end of a call and waits for
HBM; what HBM must move is counted from the blocks. It is the compiler's estimate, never a measured
time.
"""

import dataclasses

from benchmarks.kernel_cache import cached_schedule
from benchmarks.kernel_cases import ROWS, tile_on
from benchmarks.tpu_schedule import CHIPS, Kernel
from slowfast_jax.kernels.cross_attention.shapes import KEY_LENGTHS, Shape

FORWARD = ("ours", "splash", "splash_folded", "flash")
BACKWARD = ("ours_backward", "splash_folded_backward")
# Query heads of a KV head, as in Qwen2-7B; each core of a chip gets one KV head.
GROUP = 7
# Of JAX's kernels. This project's are given the key block that they have on the longest video, and
# two and three of those.
LENGTHS = (8_192, 12_288)
# Of this project's kernel one chunk of rows is profiled: with more, the profiler takes gigabytes or
# does not end. More queries are scaled from it, which favours the others: what a step
# costs beside its chunks counts for each chunk. The table of all shapes has the loop alone.
PROFILED = 73
MIB = 1 << 20


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


def cases(chips: list[str], queries: list[int]) -> list[tuple[str, str, int]]:
  """(kernel, chip, queries) of the table; one query is decoding, which has no backward."""
  return [
    (kernel, chip, length)
    for chip in chips
    for length in queries
    for kernel in (*FORWARD, *(BACKWARD if length > 1 else ()))
  ]


def compute_row(kernel: str, chip: str, queries: int, timeout: float) -> Row:
  """Compiles a row's programs; takes up to a few minutes."""
  own = kernel.startswith("ours")
  heads = {"heads": GROUP * CHIPS[chip].cores, "kv_heads": CHIPS[chip].cores}
  profiled = min(queries, PROFILED) if own else queries
  lengths, options = LENGTHS, {}
  if own:
    sizes = tile_on(chip, kernel, Shape(queries, KEY_LENGTHS[-1], **heads))
    lengths, options = (2 * sizes["key_block"], 3 * sizes["key_block"]), {"blocks": sizes}

  def compiled(queries: int, keys: int, profile: bool) -> Kernel:
    sizes = {"queries": queries, "keys": keys, **heads, **options}
    kernels = cached_schedule(kernel, sizes, chip, profile, timeout)
    # Of a program that runs both, the backward kernel.
    return max(kernels, key=lambda x: ("backward" in x.name or "dkv" in x.name, x.cycles or 0))

  try:
    found = [compiled(profiled, keys, True) for keys in lengths]
    last = found[-1] if profiled == queries else compiled(queries, lengths[-1], False)
  except RuntimeError as error:
    return Row(kernel, chip, queries, problem=str(error).splitlines()[-1])
  shape = Shape(queries, lengths[-1], **heads)
  cycles = share = None
  if found[0].cycles and found[1].cycles:
    cycles = (found[1].cycles - found[0].cycles) / (lengths[1] - lengths[0]) * 1024
    cycles *= queries / profiled
    flops = (2.5 if kernel in BACKWARD else 1) * shape.flops / shape.keys * 1024 / shape.kv_heads
    share = flops / CHIPS[chip].flops_per_cycle / cycles
  moved = _splash_bytes(shape, kernel) if "splash" in kernel else last.hbm_bytes
  ratio = moved / _least_bytes(shape, kernel) if moved else None
  return Row(kernel, chip, queries, cycles, share, ratio, last.vmem / MIB, last.spill / MIB)


def _least_bytes(shape: Shape, kernel: str) -> int:
  return shape.min_backward_bytes() if kernel in BACKWARD else shape.min_bytes()


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
LEGEND = f"""
By the TPU compiler's schedule (no TPU): estimates, not measured times.
cycles: for 1,024 further keys of one KV head (group {GROUP}, head size 128).
share:  of what the matrix unit can do at its peak. On v6e a product that is 128 deep fills half
        of a unit 256 deep, so that attention with this head size cannot reach 1.
bytes:  moved between HBM and VMEM over the least possible, at {LENGTHS[-1]:,} keys or three blocks.
Our kernel with more than {PROFILED} queries is scaled from that many (see kernel_static.py).
VMEM, spill: MiB a core. A dash: the compiler's profiler failed or does not know the chip.
"""
