# SPDX-License-Identifier: Apache-2.0
"""A long run of tiny steps, killed and resumed twice: memory stays, and no line is missing.

python -m tests.train.soak --steps 3000
"""

import argparse
import tempfile
from pathlib import Path

from etils import epath

from slowfast_jax.train.lines import read_lines
from tests.train.crash_matrix import Runs, wait
from tests.train.tiny_run import write_data

SETTLED = 200  # Steps after which memory should stay.
GROWTH = 0.02


def soak(folder: Path, steps: int) -> list[float]:
  """Runs, kills at a third and at two thirds, resumes. Returns the growth of memory of each life.

  Raises:
    AssertionError: lines are missing, or memory grows.
  """
  write_data(folder)
  runs, workdir = Runs(folder, 1, steps=steps, checkpoint_every=50), folder / "run"
  telemetry, growths = epath.Path(workdir / "telemetry.jsonl"), []
  for life, until in enumerate((steps // 3, 2 * steps // 3, steps)):
    (process,) = runs.start(workdir)
    while not wait([process], 1.0):
      if until < steps and max((x["step"] for x in read_lines(telemetry)), default=0) >= until:
        process.kill()
    assert process.returncode == (0 if until == steps else -9), f"life {life}"
    lines = read_lines(telemetry)
    born = max(i for i, line in enumerate(lines) if line.get("event") == "start")
    host = [line["host_gib"] for line in lines[born + 1 :]]
    growths.append(max(host[SETTLED:]) / host[SETTLED] - 1)
    print(
      f"life {life}: {len(host)} steps, {host[SETTLED]:.4f} GiB, {growths[-1]:+.2%}", flush=True
    )
  found = [line["step"] for line in read_lines(epath.Path(workdir / "metrics.jsonl"))]
  assert found == list(range(1, steps + 1)), "metrics.jsonl is not complete"
  assert max(growths) < GROWTH, f"memory grows by {max(growths):.2%}"
  return growths


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=3000)
  with tempfile.TemporaryDirectory() as folder:
    soak(Path(folder), parser.parse_args().steps)
  print("every step has its line")


if __name__ == "__main__":
  main()
