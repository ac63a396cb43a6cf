# SPDX-License-Identifier: Apache-2.0
"""Compiles for described chips, in a process of its own: the compiler reads its settings once.

`python -m slowfast_jax.compile.worker FOLDER` reads FOLDER/request.json, says on its standard
output what it is doing, a line each, and writes FOLDER/result.json.
"""

import contextlib
import glob
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from slowfast_jax.compile.advice import advise
from slowfast_jax.compile.cost import cost_of
from slowfast_jax.compile.hlo import parse
from slowfast_jax.compile.programs import Program, Request, programs_of
from slowfast_jax.compile.topology import compiler_environment, parse_topology
from slowfast_jax.config import load_config
from slowfast_jax.errors import UserError

# What the compiler says where memory does not suffice: for all, or for temporaries alone.
_SIZE = r"([\d.]+)([KMGT])"
_OVER = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES_OVER = re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(folder: str) -> None:
  threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
  request = json.loads(Path(folder, "request.json").read_text())
  try:
    result = _run(request, folder)
  except UserError as error:
    result = {"error": str(error)}
  Path(folder, "result.json").write_text(json.dumps(result))


def _end_with(parent: int) -> None:
  """Leaves when the process that wants the result is gone, however it ended."""
  while os.getppid() == parent:
    time.sleep(1.0)
  os._exit(1)


def environment(folder: str) -> dict[str, str]:
  """Settings of the worker: no TPU is looked for, and what is compiled is written down."""
  dump = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*"
  settings = compiler_environment()
  flags = f"{settings['XLA_FLAGS']} {dump}".strip()
  return {**settings, "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_FLAGS": flags}


def _run(request: dict[str, Any], folder: str) -> dict[str, Any]:
  config = load_config(request["config"], request["overrides"])
  topology = parse_topology(request["topology"], request["slices"])
  options: dict[str, Any] = dict(topology.chip.options)
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
  found = []
  _say("tracing the model")
  generation = Request(**request["generation"])
  for program in programs_of(config, list(described.devices), request["what"], generation):
    _say(f"compiling {program.name}")
    with emptied(f"{folder}/dump"):
      found.append(_compile(program, f"{folder}/dump"))
    if over := found[-1].get("over"):
      missing = over["used"] - over["limit"]
      devices, what = list(described.devices), request["what"]
      found[-1]["advice"] = advise(config, devices, what, generation, missing)
      break
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"programs": found, "host_memory": memory}


def _compile(program: Program, dump: str) -> dict[str, Any]:
  began = time.monotonic()
  facts: dict[str, Any] = {
    "name": program.name,
    "mesh": dict(program.mesh.shape),
    "memory": program.memory,
    "inside": program.inside,
    "model_flops": program.model_flops,
    "frames": program.frames,
    "rows": program.rows,
  }
  try:
    compiled = program.compile()
  except jax.errors.JaxRuntimeError as error:
    over = _over(str(error), sum(program.memory.values()))
    if over is None:
      raise
    return facts | {"over": over, "seconds": time.monotonic() - began}
  facts["seconds"] = time.monotonic() - began
  _say(f"reading what became of {program.name}")
  sizes: Any = compiled.memory_analysis()
  facts["hbm"] = {
    "total": _total_memory(dump),
    "new results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
  }
  cost = cost_of(parse(dumped_text(dump)), facts["mesh"])
  facts["cost"] = {
    "flops": cost.flops,
    "cycles": cost.cycles,
    "cycles_by_part": cost.cycles_by_part,
    "kernel_flops": cost.kernel_flops,
    "collectives": [vars(one) for one in cost.collectives],
    "kernels": cost.kernels,
    "largest": cost.largest,
  }
  return facts


def _over(message: str, arguments: int) -> dict[str, Any] | None:
  """Bytes that a program needs and that there are, where the compiler says they are too few."""
  whole, part = _OVER.search(message), _TEMPORARIES_OVER.search(message)
  match = whole or part
  if match is None:
    return None
  used, limit = (float(match[i]) * _UNITS[match[i + 1]] for i in (1, 3))
  arrays = re.findall(r"Size: ([\d.]+[KMGT])\b[\s\S]*?Shape: ([a-z0-9]+\[[\d,]*\])", message)
  largest = [f"{shape} ({size})" for size, shape in arrays[:4]]
  return {"used": used if whole else used + arguments, "limit": limit, "largest": largest}


def _total_memory(dump: str) -> int:
  """Bytes that the program occupies, arguments included; temporaries may lie where those were."""
  files = glob.glob(f"{dump}/*memory-usage-report.txt")
  return total_memory(Path(max(files, key=os.path.getsize)).read_text())


def total_memory(report: str) -> int:
  """The same, from the compiler's report."""
  match = re.search(r"Memory Space: default .*\s+Total bytes: (\d+)", report)
  assert match is not None, report[:500]
  return int(match[1])


def dumped_text(dump: str) -> str:
  """The program after all passes: `Compiled.as_text` fails on some of a pod's instructions."""
  files = glob.glob(f"{dump}/*after_codegen.txt")
  return Path(max(files, key=os.path.getsize)).read_text()


@contextlib.contextmanager
def emptied(folder: str) -> Iterator[None]:
  """What is written into a folder meanwhile is gone afterwards: dumps are large."""
  try:
    yield
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
  print(f"now: {text}", flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
