# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler's figures of a kernel, kept in a folder: nothing is compiled twice.

A sweep over many programs takes hours on a small machine; killed, it goes on where it was.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.tpu_schedule import Kernel, schedule
from slowfast_jax.files import replace_json
from slowfast_jax.kernels import cross_attention

# JAX's kernels do not depend on this project's.
SOURCES = (
  Path(benchmarks.__file__).with_name("kernel_cases.py"),
  Path(benchmarks.__file__).with_name("tpu_schedule.py"),
)
OURS = sorted(Path(cross_attention.__file__).parent.glob("*.py"))


def folder() -> Path:
  """Where figures lie."""
  root = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
  return Path(root) / "slowfast_jax" / "kernels"


def remember(key: list[Any], compute: Callable[[], Any]) -> Any:
  """A JSON value that depends on the key, JAX, libtpu and the kernels' source, or what was kept.

  Args:
    key: JSON values.
    compute: makes the value.
  """
  file = folder() / f"{_digest(key, (*SOURCES, *OURS))}.json"
  return _kept(file, compute)


def cached_schedule(
  kernel: str, options: dict[str, Any], chip: str, profile: bool, timeout: float
) -> list[Kernel]:
  """`schedule` of a case of `kernel_cases`, once; a failure is kept too.

  Raises:
    RuntimeError: it does not compile.
  """
  request = (f"benchmarks.kernel_cases:{kernel}", options, chip, profile, timeout)

  def compute() -> dict[str, Any]:
    try:
      return {"kernels": [dataclasses.asdict(x) for x in schedule(*request)]}
    except RuntimeError as error:
      return {"problem": str(error)}

  sources = (*SOURCES, *(OURS if kernel.startswith("ours") else ()))
  result = _kept(folder() / f"{_digest(list(request), sources)}.json", compute)
  if "problem" in result:
    raise RuntimeError(result["problem"])
  return [Kernel(**x) for x in result["kernels"]]


def _kept(file: Path, compute: Callable[[], Any]) -> Any:
  if file.is_file():
    return json.loads(file.read_text())
  value = compute()
  file.parent.mkdir(parents=True, exist_ok=True)
  replace_json(file, value)
  return value


def _digest(key: list[Any], sources: tuple[Path, ...]) -> str:
  versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
  digest = hashlib.sha256(json.dumps([key, versions], sort_keys=True).encode())
  for source in sources:
    digest.update(source.read_bytes())
  return digest.hexdigest()[:32]
