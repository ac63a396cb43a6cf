# SPDX-License-Identifier: Apache-2.0
"""A cloud in a folder: gcloud, xpk, kubectl and what hosts need, as real programs on PATH.

Each is this file under another name. `cloud.json` says what happens: the states that machines go
through after each `create`, the exit codes of the job on each host at each start, the calls that
fail. ssh runs its command in the folder of each host, scp copies there; so the scripts of
launch/host run for real. Every call is a line of calls.jsonl.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("gcloud", "xpk", "kubectl", "python3")
NUM_HOSTS = 2


class Cloud:
  """What a test sets up and looks at."""

  def __init__(self, folder: Path, **facts):
    self.folder = folder
    (folder / "bin").mkdir(parents=True)
    defaults = {"lives": [], "exits": [], "failing": {}, "calls": 0, "starts": 0, "jobsets": []}
    self._write({**defaults, **facts})
    for name in PROGRAMS:
      program = folder / "bin" / name
      source = Path(__file__).read_text(encoding="utf-8")
      program.write_text(f"#!{sys.executable} -IS\n{source}", encoding="utf-8")
      program.chmod(0o755)

  def _write(self, facts: dict) -> None:
    (self.folder / "cloud.json").write_text(json.dumps(facts), encoding="utf-8")

  @property
  def calls(self) -> list[list[str]]:
    lines = (self.folder / "calls.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  def verbs(self, *kinds: str) -> list[str]:
    """The calls of these kinds, in order."""
    found = []
    for call in self.calls:
      found += [word for word in call[1:5] if word in kinds][:1]
    return found

  def jobs(self) -> list[list[str]]:
    """The words with which each host was asked to run the job, in order."""
    lines = (self.folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def act(name: str, words: list[str], cloud: Path) -> int:
  if name in ("python", "python3"):
    return python(words, cloud)
  facts = json.loads((cloud / "cloud.json").read_text())
  with (cloud / "calls.jsonl").open("a") as log:
    print(json.dumps([name, *words]), file=log)
  facts["calls"] += 1
  problem = facts["failing"].get(str(facts["calls"]))
  code = 1
  if problem:
    print(f"ERROR: (gcloud) {problem}", file=sys.stderr)
  else:
    code = {"gcloud": gcloud, "xpk": xpk, "kubectl": kubectl}[name](words, facts, cloud)
  (cloud / "cloud.json").write_text(json.dumps(facts))
  return code


def gcloud(words: list[str], facts: dict, cloud: Path) -> int:
  verb = next((word for word in words if word in VERBS), "")
  if verb in ("ssh", "scp") and facts.get("states", [""])[0] not in ("ACTIVE", "READY"):
    print("ssh: connect to host 10.0.0.1 port 22: Connection refused", file=sys.stderr)
    return 255
  return VERBS[verb](words, facts, cloud) if verb else 0


def create(words: list[str], facts: dict, cloud: Path) -> int:
  if facts.get("states"):
    return fail("ALREADY_EXISTS: Resource already exists")
  facts["states"] = facts["lives"].pop(0)
  return 0


def describe(words: list[str], facts: dict, cloud: Path) -> int:
  states = facts.get("states")
  if not states:
    return fail("NOT_FOUND: Resource was not found")
  print(states[0])
  if len(states) > 1 and words[2] == "queued-resources":
    states.pop(0)
  if states[0] not in ("ACTIVE", "READY"):
    wipe(cloud)
  return 0


def delete(words: list[str], facts: dict, cloud: Path) -> int:
  if not facts.get("states"):
    return fail("NOT_FOUND: Resource was not found")
  facts["states"] = []
  wipe(cloud)
  return 0


def ssh(words: list[str], facts: dict, cloud: Path) -> int:
  (command,) = [word.partition("=")[2] for word in words if word.startswith("--command=")]
  if "/start.sh " in command:
    (cloud / "exit_codes").write_text(json.dumps(facts["exits"][facts["starts"]]))
    facts["starts"] += 1
  code = 0
  for host in hosts(words, cloud):
    environment = {**os.environ, "HOME": str(host), "FAKE_HOST": host.name}
    code |= subprocess.run(["bash", "-c", command], cwd=host, env=environment).returncode
  return code


def scp(words: list[str], facts: dict, cloud: Path) -> int:
  source, target = [word for word in words[4:] if not word.startswith("--")]
  for host in hosts(words, cloud):
    shutil.copytree(source, host / target.partition(":")[2])
  return 0


VERBS = {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}


def hosts(words: list[str], cloud: Path) -> list[Path]:
  found = [cloud / "hosts" / str(i) for i in range(NUM_HOSTS)]
  for host in found:
    host.mkdir(parents=True, exist_ok=True)
  return found if "--worker=all" in words else found[:1]


def wipe(cloud: Path) -> None:
  """The machines are gone, and what ran on them."""
  for pid in (cloud / "hosts").glob("*/*/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(pid.read_text()), signal.SIGKILL)
  shutil.rmtree(cloud / "hosts", ignore_errors=True)


def fail(text: str) -> int:
  print(f"ERROR: (gcloud) {text}", file=sys.stderr)
  return 1


def xpk(words: list[str], facts: dict, cloud: Path) -> int:
  if words[:2] == ["workload", "create"]:
    facts["submitted"] = True
  return 0


def kubectl(words: list[str], facts: dict, cloud: Path) -> int:
  if not facts.get("submitted"):
    print('Error from server (NotFound): jobsets.jobset.x-k8s.io "x" not found', file=sys.stderr)
    return 1
  status = facts["jobsets"].pop(0) if len(facts["jobsets"]) > 1 else facts["jobsets"][0]
  print(json.dumps({"status": status}))
  return 0


def python(words: list[str], cloud: Path) -> int:
  """pip and uv on the desk and on hosts; `uv venv` makes an environment whose python runs jobs."""
  if words[:3] == ["-m", "pip", "wheel"]:
    folder = Path(words[words.index("--wheel-dir") + 1])
    (folder / "slowfast_jax-0.1.0-py3-none-any.whl").write_text("")
  elif words[:3] == ["-m", "uv", "venv"]:
    program = Path(words[-1]) / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(cloud / "bin" / "python3")
  elif words[:2] == ["-m", "slowfast_jax.launch.host"]:
    job(words[2:], cloud)
  return 0


def job(words: list[str], cloud: Path) -> None:
  """Stands for slowfast_jax.launch.host: ends at once with its code, or never ("hangs")."""
  with (cloud / "jobs.jsonl").open("a") as log:
    print(json.dumps(words), file=log)
  print("a line of the job's log", flush=True)
  code = json.loads((cloud / "exit_codes").read_text())[int(os.environ["FAKE_HOST"])]
  if code == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
  (state,) = [word.partition("=")[2] for word in words if word.startswith("--state=")]
  (Path(state) / "exit").write_text(f"{code}\n")


if __name__ == "__main__":
  sys.exit(act(Path(sys.argv[0]).name, sys.argv[1:], Path(os.environ["FAKE_CLOUD"])))
