# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile's steps; run this file to carry them out in a fresh environment, without Docker.

  python tests/launch/dockerfile.py FOLDER

Each stage is a virtual environment of this Python; /wheels and /src lie in FOLDER. Its base image,
and what a container adds, are not tried.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHERE = re.compile(r"(?<![\w.])/(?=(wheels|src|work)\b)")


def steps() -> list[tuple[str, str]]:
  """(instruction, the rest of its line), with continued lines joined and comments left out."""
  text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
  lines = [line for line in text.splitlines() if line and not line.startswith("#")]
  joined = "\n".join(lines).replace("\\\n", " ").splitlines()
  return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def carry_out(folder: Path) -> None:
  """Raises CalledProcessError where a step fails."""
  here, environment = folder, dict(os.environ)
  for number, (word, rest) in enumerate(steps()):
    print(f"== {word} {rest}", flush=True)
    rest = WHERE.sub(lambda _: f"{folder}/", rest)
    if word == "FROM":
      place = folder / f"stage-{number}"
      venv.create(place, with_pip=True)
      environment["PATH"] = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    elif word == "WORKDIR":
      here = Path(rest)
      here.mkdir(parents=True, exist_ok=True)
    elif word == "COPY" and not rest.startswith("--from"):  # Stages share the folder.
      *sources, target = rest.split()
      for source in sources:
        copy(ROOT / source, here / target if target.startswith(".") else Path(here, target))
    elif word == "RUN":
      subprocess.run(["sh", "-c", rest], cwd=here, env=environment, check=True)
    elif word == "CMD":
      command = [part.strip(' "') for part in rest.strip("[]").split(",")]
      subprocess.run(command, cwd=here, env=environment, check=True)


def copy(source: Path, target: Path) -> None:
  if source.is_dir():
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
  else:
    shutil.copy(source, target)


if __name__ == "__main__":
  carry_out(Path(sys.argv[1]).absolute())
