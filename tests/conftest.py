# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices before JAX starts, a compilation cache, and annotations that are checked.

And one run of `slowfast demo`, which takes a minute, for all tests that need what it writes.
"""

import dataclasses
import gc
import getpass
import json
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Through the environment, so that the commands which tests start compile into the same cache. Not
# in the checkout: compiled code must not travel to a machine with another processor.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(Path(tempfile.gettempdir()) / f"slowfast-jax-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests compile for longer than they compute. XLA's older way to make loops of fused operations, and
# one thread for each program, take half of the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

# A hundred processes are started here: each would compile all modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import filelock
import jax
import jaxtyping
import pytest

# Sharded tests always run; a program for one device is not slower for it (measured: under 5%).
jax.config.update("jax_num_cpu_devices", 8)

# What thousands of tests have traced stays, so garbage is looked for less often. In one pair of
# runs that was 45 seconds less of 23 minutes of computing.
gc.set_threshold(200_000, 100, 1000)

# `Batch` itself stays unchecked: JAX builds it of shapes, shardings and specs too.
import slowfast_jax.shapes  # noqa: E402, F401

jaxtyping.install_import_hook("slowfast_jax", "type_checker.check")


def pytest_sessionfinish():
  """Five more times garbage is looked for then, which is 20 seconds with all that was traced."""
  gc.freeze()


def pytest_configure(config):
  config.addinivalue_line("markers", "slow: takes more than about ten seconds")
  config.addinivalue_line("markers", "torch: compares with PyTorch, from the extra `parity`")


# Files that keep a core busy for a minute or more. They go first: the last tests of a run should be
# short, or one core ends it alone.
LONGEST = ("demo/test_trained.py", "test_readme.py", "eval/test_kills.py", "train/test_crashes.py")


def pytest_collection_modifyitems(items):
  def place(item) -> int:
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)

  items.sort(key=place)  # Stable: within a file, and among the others, nothing moves.


@dataclasses.dataclass(frozen=True)
class Shell:
  """A folder, and real processes of this checkout in it.

  `optimised` is for those that compute for long: what they compile is as fast as users have it,
  large arrays lie in huge pages, and one thread does all, since two would wait for each other on
  cores that other tests keep busy. A training so took 120 seconds of computing instead of 230.
  """

  path: Path
  optimised: bool = False

  def python(self, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if self.optimised:
      del environment["JAX_DISABLE_MOST_OPTIMIZATIONS"], environment["XLA_FLAGS"]
      environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "NPROC": "1"}
    return subprocess.run(
      [sys.executable, *words], cwd=self.path, env=environment, capture_output=True, text=True
    )

  def slowfast(self, command: str) -> subprocess.CompletedProcess:
    """Runs a line that begins with `slowfast`."""
    return self.python("-m", "slowfast_jax.cli.main", *shlex.split(command)[1:])

  def json(self, name: str) -> Any:
    return json.loads((self.path / name).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class DemoRun:
  """A folder in which `command` has run, and how that ended."""

  shell: Shell
  command: str
  outcome: subprocess.CompletedProcess

  @property
  def folder(self) -> Path:
    return self.shell.path / "runs/demo"


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
  """One for all workers. Tests may write beside its folder, but not into it."""
  own = tmp_path_factory.getbasetemp()
  folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo"
  folder.mkdir(exist_ok=True)
  shell, ended = Shell(folder), folder / "ended.pickle"
  command = "slowfast demo --workdir runs/demo --fast"
  with filelock.FileLock(folder / "lock"):
    if not ended.exists():
      ended.write_bytes(pickle.dumps(shell.slowfast(command)))
  return DemoRun(shell, command, pickle.loads(ended.read_bytes()))


@pytest.fixture(scope="module")
def one_device():
  """Training, evaluation and chat on one device, for tests of anything but the mesh.

  Eight devices on two cores spend their time on waiting for one another.
  """
  from slowfast_jax.cli import chat
  from slowfast_jax.eval import hosts
  from slowfast_jax.sharding import make_mesh
  from slowfast_jax.train import plan

  with pytest.MonkeyPatch.context() as patch:
    for module in (plan, hosts, chat):
      patch.setattr(module, "make_mesh", lambda sizes, *_: make_mesh(sizes, jax.devices()[:1]))
    yield
