# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler says of a program, on a machine without a TPU.

libtpu compiles for a described chip and writes down the final instruction bundles of each kernel,
the units that they occupy, its use of VMEM, and (except for v4) an estimate of its cycles. The
estimate walks the compiled control flow, one cycle a bundle plus waits for DMA, on a memory that
reads as zeros. No figure here is a measured time, and DMAs do not contend for HBM in it.

A case is made in a process of its own, because libtpu reads its settings once.
"""

import argparse
import dataclasses
import glob
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slowfast_jax.compile.topology import compiler_environment


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation: a topology of it, cores a chip, and operations a core does in a cycle."""

  topology: str
  cores: int
  flops_per_cycle: int


# Four 128 x 128 matrix units a core; v6e has two of 256 x 256.
CHIPS = {
  "v4": Chip("v4:2x2x1", 2, 131_072),
  "v5e": Chip("v5e:2x2", 1, 131_072),
  "v5p": Chip("v5p:2x2x1", 2, 131_072),
  "v6e": Chip("v6e:2x2", 1, 524_288),
}


@dataclasses.dataclass
class Kernel:
  """The compiler's figures of one kernel.

  Attributes:
    name: the kernel's.
    cycles: estimate, or None where the profiler does not know the chip or failed.
    hot_bundles: bundles of the basic block that occupies the matrix unit most.
    vmem: bytes of VMEM, of which `spill` for registers that did not fit.
    spill: see there.
    hbm_bytes: bytes that its blocks move between HBM and VMEM.
  """

  name: str
  cycles: int | None
  hot_bundles: int
  vmem: int
  spill: int
  hbm_bytes: int | None = None


def schedule(
  target: str, options: dict[str, Any], chip: str, profile: bool = True, timeout: float = 300
) -> list[Kernel]:
  """Compiles `module:function(**options)`, which returns (function, arguments), for a chip.

  Returns:
    The program's Pallas kernels, in the order of their names.

  Raises:
    RuntimeError: it does not compile; the message ends with the compiler's.
  """
  with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as folder:
    request = json.dumps([target, options, CHIPS[chip].topology])
    failure = _compile(request, folder, profile and chip != "v4", timeout)
    if failure and profile and chip != "v4":
      failure = _compile(request, folder, False, timeout)
    if failure:
      raise RuntimeError(f"{target} {options} does not compile for {chip}: {failure}")
    moved = json.loads(Path(folder, "bytes.json").read_text())
    kernels = _read_dumps(folder)
  for kernel in kernels:
    kernel.hbm_bytes = next((n for name, n in moved.items() if name in kernel.name), None)
  return kernels


def _compile(request, folder, profile, timeout) -> str:
  """Runs the worker; returns what went wrong."""
  flags = [
    f"--xla_jf_dump_to={folder}/dump",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=.*final.*",
  ]
  if profile:
    flags += [
      f"--xla_jf_dump_static_llo_profile_to={folder}/profile",
      # The profiler knows no DMA of a computed scalar from VMEM.
      "--xla_vf_vmem_memory_space_assignment=false",
    ]
  for name in ("dump", "profile"):
    Path(folder, name).mkdir(exist_ok=True)
    for old in Path(folder, name).iterdir():
      old.unlink()
  command = [sys.executable, "-m", "benchmarks.tpu_schedule", request, folder]
  root = Path(__file__).parent.parent
  env = {**compiler_environment(), "LIBTPU_INIT_ARGS": " ".join(flags)}
  with subprocess.Popen(
    command,
    env=env,
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  ) as worker:
    try:
      log, _ = worker.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      # libtpu's own children would keep the pipe open.
      os.killpg(worker.pid, signal.SIGKILL)
      return f"no answer within {timeout:.0f} s"
    except BaseException:  # Ctrl-C does not reach a session of its own.
      os.killpg(worker.pid, signal.SIGKILL)
      raise
  lines = [line for line in log.splitlines() if re.search(r"Error|RESOURCE_EXHAUSTED", line)]
  return "" if worker.returncode == 0 else "\n".join(lines[-1:] or log.splitlines()[-3:])[:600]


# --- In the worker ---


def _work(request: str, folder: str) -> None:
  import jax
  from jax.experimental import topologies

  target, options, topology = json.loads(request)
  module, function = target.split(":")
  device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  abstract = jax.sharding.AbstractDevice(device.device_kind, device.num_cores, "tpu")
  # Kernels choose their block sizes by the device of the mesh in force.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
    program, inputs = getattr(importlib.import_module(module), function)(**options)
    here = jax.sharding.SingleDeviceSharding(device)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in inputs]
    traced = jax.jit(program).trace(*inputs)
    traced.lower(lowering_platforms=("tpu",)).compile()
  moved = dict(_bytes_moved(traced.jaxpr.jaxpr))
  Path(folder, "bytes.json").write_text(json.dumps(moved))


def _bytes_moved(jaxpr):
  """Yields the name of each Pallas kernel and the bytes that its blocks move."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      info = equation.params
      name = info.get("name") or str(info.get("name_and_src_info", "")).split(" ")[0]
      yield name, _block_bytes(equation)
      continue
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _bytes_moved(inner)


def _block_bytes(equation) -> int:
  """A block is moved when its index differs from that of the grid step before.

  Prefetched scalars are taken as zeros, as the profiler does.
  """
  import jax
  import numpy as np

  mapping = equation.params["grid_mapping"]
  steps = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32)
  first = mapping.num_dynamic_grid_bounds
  scalars = [v.aval for v in equation.invars[first : first + mapping.num_index_operands]]
  scalars = [np.zeros(aval.shape, aval.dtype) for aval in scalars]
  total = 0
  with jax.default_device(jax.devices("cpu")[0]):
    for block in mapping.block_mappings:
      shape = [getattr(size, "block_size", 1) or 1 for size in block.block_shape]
      item = np.dtype(block.array_aval.dtype).itemsize

      def start(step, block=block):
        found = block.compute_start_indices_interpret(tuple(step), *scalars)
        return jax.numpy.stack([jax.numpy.asarray(x, jax.numpy.int32) for x in found])

      starts = np.asarray(jax.jit(jax.vmap(start))(steps))
      total += (1 + int((starts[1:] != starts[:-1]).any(1).sum())) * int(np.prod(shape)) * item
  return total


# --- What libtpu wrote ---

_BUNDLE = re.compile(r"^\s*0x([0-9a-f]+)\s+([A-Z]+)?\s*:\s*((?:>\s*)*)")


def _read_dumps(folder: str) -> list[Kernel]:
  estimates = {}
  for path in glob.glob(f"{folder}/profile/*_static_llo_profile.textproto"):
    text = Path(path).read_text()
    of = re.search(r'hlo_op_name: "([^"]+)"', text)
    cycles = re.search(r"estimated_cycles: (\d+)", text)
    copies = re.search(r"num_equivalent_hlos: (\d+)", text)
    if of and cycles:
      estimates[of[1]] = int(cycles[1]) * (int(copies[1]) if copies else 1)
  vmem = {}
  for path in glob.glob(f"{folder}/dump/*vmem_report.html"):
    vmem.update(_vmem(Path(path).read_text(errors="replace")))
  kernels = []
  for path in sorted(glob.glob(f"{folder}/dump/*-final_bundles.txt")):
    found = re.match(r"(\d+-(.*?)-)\d+-final_bundles\.txt$", os.path.basename(path))
    if found is None or found[2] == "TLP":  # The program around the kernels.
      continue
    stem, name = glob.escape(f"{folder}/dump/{found[1]}"), found[2]
    source = glob.glob(stem + "*-schedule-analysis_final_bundles.txt")
    units = glob.glob(stem + "*-final_hlo-static-per-bundle-utilization.txt")
    if not (source and units and "tpu_custom_call" in Path(source[0]).read_text(errors="replace")):
      continue
    hot = _hot_block(path, min(units, key=len))
    kernels.append(Kernel(name, estimates.get(name), hot, *vmem.get(name, (0, 0))))
  return kernels


def _hot_block(bundles_path: str, units_path: str) -> int:
  """Length of the basic block that occupies the matrix unit most; of near equals, the shortest.

  A tile with a mask takes the same products as one without, and more bundles.
  """
  names, rows, section = [], [], ""
  for line in Path(units_path).read_text().splitlines():
    if line.startswith("=="):
      section = line
    elif "CAPAC" in section and "," in line:
      names = [x.strip() for x in line.split(",")]
    elif "UTIL" in section and line.strip():
      rows.append([int(x) for x in line.split()])
  unit = next(i for i, name in enumerate(names) if name.startswith(("MATMUL", "MXU")))
  busy = {ends: sum(row[unit] for row in rows[slice(*ends)]) for ends in _blocks(bundles_path)}
  most = max(busy.values())
  return min(last - first for (first, last), n in busy.items() if n >= 0.98 * most)


def _blocks(path: str) -> list[tuple[int, int]]:
  """Basic blocks: they end at labels, changes of loop depth, and branches."""
  blocks, start, depth, end = [], 0, 0, 0
  with open(path, errors="replace") as lines:
    for line in lines:
      found = _BUNDLE.match(line)
      if not found:
        continue
      address, deep = int(found[1], 16), found[3].count(">")
      if (found[2] or deep != depth) and address > start:
        blocks.append((start, address))
        start = address
      depth, end = deep, address + 1
      if " sbr.rel" in line:
        blocks.append((start, end))
        start = end
  return [*blocks, (start, end)] if end > start else blocks


def _vmem(text: str) -> dict[str, tuple[int, int]]:
  """Bytes of VMEM and of spilled registers, by kernel."""
  at = text.find("const DATA")
  if at < 0:
    return {}
  data, _ = json.JSONDecoder().raw_decode(text[text.index("{", at) :])
  found = {}
  for name, entry in data.get("hlo_breakdowns", {}).items():
    allocations = [a for block in entry["blocks"] for a in block.get("allocations", [])]
    spill = sum(a["size"] for a in allocations if a.get("tag") == "SPILL")
    found[name] = (entry["total_size"], spill)
  return found


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="The worker of `schedule`.")
  parser.add_argument("request")
  parser.add_argument("folder")
  arguments = parser.parse_args()
  _work(arguments.request, arguments.folder)
