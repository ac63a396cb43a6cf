# SPDX-License-Identifier: Apache-2.0
"""What runs on every TPU host: secrets into the environment, `slowfast doctor`, then the job.

  python -m slowfast_jax.launch.host [--state=DIR] [--env=NAME=VALUE]
    [--secret=NAME=projects/P/secrets/S] --workdir=gs://... -- train --config=...

It passes SIGTERM on to the job, which saves and exits with 42, and ends with the job's exit code.
"""

import argparse
import base64
import json
import os
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from slowfast_jax.errors import UserError
from slowfast_jax.files import replace_text

METADATA = "http://metadata.google.internal"
SECRETS = "https://secretmanager.googleapis.com"
OPEN_FILES = 100_000
# A host whose TPU is not to be had must fail, not train on its CPU: JAX falls back silently.
DEFAULTS = {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1"}
SLOWFAST = (sys.executable, "-m", "slowfast_jax.cli.main")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the job. Returns its exit code; 128 + n where signal n ended it."""
  args = _parser().parse_args(argv)
  code = 1
  try:
    code = _run(args)
  except UserError as error:
    print(f"slowfast-host: {error}", file=sys.stderr)
  finally:
    if args.state:
      replace_text(Path(args.state) / "exit", f"{code}\n")
  return code


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="slowfast_jax.launch.host", allow_abbrev=False)
  parser.add_argument("--state", default="", help="folder that gets the exit code")
  parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
  parser.add_argument("--secret", action="append", default=[], metavar="NAME=SECRET")
  parser.add_argument("--workdir", required=True)
  parser.add_argument("command", nargs="+", help="words after `slowfast`")
  return parser


def _run(args: argparse.Namespace) -> int:
  environment = {**DEFAULTS, **os.environ, **_pairs(args.env)}
  for name, secret in _pairs(args.secret).items():
    environment[name] = read_secret(secret, METADATA, SECRETS)
  _open_many_files()
  workdir = f"--workdir={args.workdir}"
  child = Child()
  # On all hosts at once: the devices of a slice answer when all of its hosts ask.
  code = child.run([*SLOWFAST, "doctor", workdir], environment)
  if code or child.stopped:
    print("slowfast-host: the job was not started", file=sys.stderr)
    return code or 128 + signal.SIGTERM
  return child.run([*SLOWFAST, *args.command, workdir], environment)


def _pairs(words: Sequence[str]) -> dict[str, str]:
  return dict(word.split("=", 1) for word in words)


def _open_many_files() -> None:
  """Many shards, mounted and read in parallel, exceed the usual 1,024."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY:
    return
  wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def read_secret(name: str, metadata: str, service: str) -> str:
  """The newest version of a secret, as the machine's service account.

  Args:
    name: projects/P/secrets/S.
    metadata: address of the machine's metadata server, which gives out tokens.
    service: address of Secret Manager.

  Raises:
    UserError: with what to change; the secret itself is in no message.
  """
  account = f"{metadata}/computeMetadata/v1/instance/service-accounts/default/token"
  try:
    token = _get_json(account, {"Metadata-Flavor": "Google"})["access_token"]
    version = f"{service}/v1/{name}/versions/latest:access"
    answer = _get_json(version, {"Authorization": f"Bearer {token}"})
    return base64.b64decode(answer["payload"]["data"]).decode().strip()
  except (urllib.error.URLError, TimeoutError, KeyError, ValueError) as error:
    kind = (
      f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
    )
    raise UserError(
      f"secret {name}: cannot be read ({kind}). It needs a version in Secret Manager, and the "
      "machine's service account the role roles/secretmanager.secretAccessor."
    ) from error


def _get_json(address: str, headers: dict[str, str]) -> dict:
  request = urllib.request.Request(address, headers=headers)
  with urllib.request.urlopen(request, timeout=30) as answer:
    return json.load(answer)


class Child:
  """One program after the other, with SIGTERM passed on to the one that runs."""

  def __init__(self) -> None:
    self.stopped = False
    self._process: subprocess.Popen | None = None
    signal.signal(signal.SIGTERM, self._stop)

  def run(self, argv: Sequence[str], environment: dict[str, str]) -> int:
    if self.stopped:
      return 128 + signal.SIGTERM
    self._process = subprocess.Popen(argv, env=environment)
    if self.stopped:  # Between the question above and the start.
      self._process.terminate()
    code = self._process.wait()
    return 128 - code if code < 0 else code

  def _stop(self, signum: int, frame: FrameType | None) -> None:
    del signum, frame
    self.stopped = True
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()


if __name__ == "__main__":
  sys.exit(main())
