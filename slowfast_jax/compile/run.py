# SPDX-License-Identifier: Apache-2.0
"""Runs the worker that compiles, and tells how far it is."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slowfast_jax.compile.topology import Topology
from slowfast_jax.errors import UserError

# say(what is being done, seconds since the beginning).
Say = Callable[[str, float], Any]


@dataclasses.dataclass(frozen=True)
class Job:
  """One compilation.

  Attributes:
    config: a config file, as `load_config` takes it.
    overrides: changes of its fields.
    topology: what is compiled for.
    what: a kind of program: train, prefill or decode.
    generation: fields of `programs.Request`.
  """

  config: str
  overrides: tuple[str, ...]
  topology: Topology
  what: str
  generation: dict[str, int]


def compile_job(job: Job, say: Say) -> dict[str, Any]:
  """Compiles in a process of its own; returns what the worker found, see worker.py.

  Raises:
    UserError: the config is wrong, or libtpu is missing.
    RuntimeError: the compiler failed; with its last words.
  """
  # Imported late: the worker imports JAX, and this process need not.
  from slowfast_jax.compile.worker import environment

  with tempfile.TemporaryDirectory(prefix="slowfast_compile_") as folder:
    request = {
      "config": str(job.config),
      "overrides": list(job.overrides),
      "topology": job.topology.name,
      "slices": job.topology.slices,
      "what": job.what,
      "generation": job.generation,
    }
    Path(folder, "request.json").write_text(json.dumps(request))
    log = _run(folder, environment(folder), say)
    file = Path(folder, "result.json")
    if not file.is_file():
      raise _failure(log)
    result = json.loads(file.read_text())
  if "error" in result:
    raise UserError(result["error"])
  return result


def _run(folder: str, environment: dict[str, str], say: Say) -> str:
  """Runs the worker to its end; returns what it printed besides its progress."""
  began, now, lines = time.monotonic(), "starting", []
  command = [sys.executable, "-m", "slowfast_jax.compile.worker", folder]
  with subprocess.Popen(
    command,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    start_new_session=True,
  ) as worker:
    done = threading.Event()

    def tick() -> None:
      while not done.wait(1.0):
        say(now, time.monotonic() - began)

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
      assert worker.stdout is not None
      for line in worker.stdout:
        if line.startswith("now: "):
          now = line.removeprefix("now: ").strip()
          say(now, time.monotonic() - began)
        else:
          lines.append(line)
    except BaseException:  # Ctrl-C does not reach a session of its own.
      os.killpg(worker.pid, signal.SIGKILL)
      raise
    finally:
      done.set()
      clock.join()
  return "".join(lines)


def _failure(log: str) -> Exception:
  """The worker's last exception, without the compiler's chatter."""
  if "No module named 'libtpu'" in log or ("libtpu.so" in log and "cannot open" in log):
    return UserError('compiling for TPU needs libtpu: pip install ".[tpu]" in the checkout.')
  lines = [line for line in log.splitlines() if line.strip()]
  errors = [i for i, line in enumerate(lines) if "Error" in line.split(":")[0]]
  words = lines[errors[-1] :][:12] if errors else lines[-12:]
  return RuntimeError("the compiler failed:\n" + "\n".join(word[:500] for word in words))
