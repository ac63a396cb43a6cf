# SPDX-License-Identifier: Apache-2.0
"""What every verb of a launch file would run, as one text; run this file to write them anew.

  python tests/launch/golden_file.py             # after a change that was meant
  python tests/launch/golden_file.py --check     # do the real gcloud and xpk take these words?

`--check` needs the Google Cloud CLI, and xpk (`pip install xpk`), on PATH. It rents nothing: gcloud
only parses, and xpk's own dry run makes a manifest of the job.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from slowfast_jax.launch.main import VERBS, main  # noqa: E402

EXAMPLES = sorted((ROOT / "launch/examples").glob("*.toml"))


def golden(example: Path) -> Path:
  return Path(__file__).parent / "golden" / f"{example.stem}.txt"


def text_of(example: Path) -> str:
  """The dry run of every verb, from the root of the checkout."""
  out = io.StringIO()
  for verb in VERBS:
    out.write(f"== {verb}\n")
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
      assert main([verb, str(example.relative_to(ROOT)), "--dry-run"]) == 0
    out.write("\n")
  return out.getvalue()


def problem_of(line: str) -> str:
  """What the real program says against a command; empty if nothing."""
  words = shlex.split(line)
  if words[0] == "gcloud":
    # ssh and scp have a dry run, but ask the cloud for the address first: parsing has to do.
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
    shown = subprocess.run(lint, capture_output=True, text=True)
    (answer,) = json.loads(shown.stdout)
    return "" if answer["success"] else answer["error_message"]
  if words[0] == "xpk":
    # project-number: else it would be asked of the cloud.
    extra = ["--dry-run", "--skip-validation"]
    extra += ["--project-number=1"] if words[1:3] == ["workload", "create"] else []
    extra += ["--quiet"] if words[1:3] == ["cluster", "create"] else []  # It would ask.
    shown = subprocess.run([*words, *extra], capture_output=True, text=True)
    said = shown.stdout[-1500:] + shown.stderr[-1500:]
    # Attaching storage looks into the cluster even so, but only once its words are understood.
    return said if shown.returncode and "Invalid kube-config file" not in said else ""
  return ""


def check() -> int:
  files = [*map(golden, EXAMPLES), ROOT / "docs/pod.md"]
  lines = {
    line
    for file in files
    for line in file.read_text(encoding="utf-8").splitlines()
    if line.startswith(("gcloud ", "xpk "))
  }
  problems = {line: problem for line in sorted(lines) if (problem := problem_of(line))}
  for line, problem in problems.items():
    print(f"{line}\n  {problem}\n")
  print(f"{len(lines)} commands of gcloud and xpk, {len(problems)} with problems")
  return 1 if problems else 0


if __name__ == "__main__":
  if sys.argv[1:] == ["--check"]:
    sys.exit(check())
  os.chdir(ROOT)
  for example in EXAMPLES:
    golden(example).write_text(text_of(example), encoding="utf-8")
