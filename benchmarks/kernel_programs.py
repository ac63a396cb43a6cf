# SPDX-License-Identifier: Apache-2.0
"""Memory and traffic of slow cross-attention, forward and backward, from whole compiled programs.

Memory has to grow with the keys as their number does, and what devices exchange where the keys are
spread over them has to grow with the text alone.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernel_cache import remember
from slowfast_jax.compile.topology import compiler_environment

KEYS = (10_240, 20_480, 40_960, 81_920)
# Topology, keys, and queries: over twice as many keys or queries something has to stay or double.
ON_MESHES = (
  ("v5e:2x4", 98_304, 64),
  ("v5e:2x4", 196_608, 64),
  ("v5e:2x4", 98_304, 128),
  ("v5e:4x8", 1_048_576, 64),
  ("v5e:4x8", 2_097_152, 64),
  ("v5e:4x8", 1_048_576, 128),
)


@dataclasses.dataclass(frozen=True)
class MeshRow:
  """Forward and backward of one video whose slow tokens are spread over a topology.

  Attributes:
    topology, keys, queries: which.
    memory: bytes on a device.
    wire: bytes of the results of all collectives on a device.
    collectives: names of their operations.
  """

  topology: str
  keys: int
  queries: int
  memory: int
  wire: int
  collectives: tuple[str, ...]


def run_worker(module: str, *arguments: str) -> Any:
  """What a module of this folder prints last, JSON; libtpu reads its settings once a process.

  Raises:
    RuntimeError: it failed; the end of what it wrote.
  """
  # Compiled programs for a TPU have no place in the cache of the machine's own.
  env = {k: v for k, v in compiler_environment().items() if k != "JAX_COMPILATION_CACHE_DIR"}
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{module}", *arguments],
    env=env,
    cwd=Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return json.loads(done.stdout.splitlines()[-1])


def fit_exponent(sizes: tuple[int, ...], values: list[int]) -> float:
  """n of the fit value = a * size^n, by least squares of the logarithms."""
  xs, ys = ([math.log(x) for x in row] for row in (sizes, values))
  mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
  over = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys))
  return over / sum((x - mean_x) ** 2 for x in xs)


def compile_cases(topology: str, cases: list[Any]) -> list[dict[str, Any]]:
  """What benchmarks/kernel_compile.py finds of [what, sizes of a Shape, masks]."""
  return run_worker("kernel_compile", topology, json.dumps(cases))


def scores_in_memory(arrays: list[str], keys: int, rows: tuple[int, ...]) -> list[str]:
  """Arrays of a program, as "f32[64,5184]", that have the keys' axis and one of the rows."""
  found = []
  for array in arrays:
    sizes = [int(x) for x in array[array.index("[") + 1 : -1].split(",")]
    if keys in sizes and any(x in rows for x in sizes):
      found.append(array)
  return found


def memory(topology: str = "v5e:2x2", queries: int = 64) -> tuple[list[int], list[str]]:
  """Bytes of forward and backward at `KEYS` together, and arrays of scores found in any of them."""
  totals, scores = [], []
  for keys in KEYS:
    case = ["backward", {"queries": queries, "keys": keys}, []]
    (found,) = remember([topology, case], lambda case=case: compile_cases(topology, [case]))
    totals.append(sum(found["memory"].values()))
    scores += scores_in_memory(found["arrays"], keys, (queries, 7 * queries))
  return totals, scores


def on_meshes() -> list[MeshRow]:
  """Compiles `ON_MESHES`."""
  rows = []
  for topology, keys, queries in ON_MESHES:
    request = ("kernel_mesh", topology, json.dumps([{"queries": queries, "keys": keys}]))
    (found,) = remember(list(request), lambda request=request: run_worker(*request))
    wire = sum(size for _, size in found["collectives"])
    names = tuple(sorted({name for name, _ in found["collectives"]}))
    rows.append(MeshRow(topology, keys, queries, found["memory"], wire, names))
  return rows


def report() -> dict[str, Any]:
  """Prints both tables; returns them as JSON values."""
  print("\nMemory of forward and backward, one video, 64 queries, v5e:")
  totals, scores = memory()
  for keys, total in zip(KEYS, totals):
    print(f"{keys:>9,} keys {total / 2**20:>9.1f} MiB")
  exponent = fit_exponent(KEYS, totals)
  print(f"grows as keys^{exponent:.4f}; arrays of queries x keys: {', '.join(scores) or 'none'}")
  print("\nSlow tokens spread over all chips, forward and backward: a chip's memory and exchange")
  meshes = on_meshes()
  for row in meshes:
    print(
      f"{row.topology}  {row.keys:>9,} keys {row.queries:>4} queries {row.memory / 2**20:>9.1f} MiB"
      f" {row.wire / 1e6:>8.3f} MB by {', '.join(row.collectives)}",
      flush=True,
    )
  fit = {"keys": KEYS, "bytes": totals, "exponent": exponent, "scores": scores}
  return {"memory": fit, "meshes": [dataclasses.asdict(row) for row in meshes]}
