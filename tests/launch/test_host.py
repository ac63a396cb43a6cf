# SPDX-License-Identifier: Apache-2.0
"""On a host: doctor first, secrets in the environment alone, SIGTERM and exit codes passed on."""

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-hunter2"

# Stands for `slowfast`, which would import JAX: writes down what it was given.
SLOWFAST = """
  import json, os, sys, time
  from pathlib import Path
  here = Path(os.environ["NOTES"])
  notes = {"words": sys.argv[1:], "key": os.environ.get("WANDB_API_KEY"),
           "title": os.environ.get("TITLE"), "platforms": os.environ["JAX_PLATFORMS"]}
  (here / sys.argv[1]).write_text(json.dumps(notes))
  code = json.loads(os.environ["CODES"])[sys.argv[1]]
  if code == "waits":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    print("waiting", flush=True)
    time.sleep(60)
  if code == "dies":
    os.kill(os.getpid(), 9)
  sys.exit(code)
"""


class Google(http.server.BaseHTTPRequestHandler):
  """The metadata server and Secret Manager."""

  asked: ClassVar[list[tuple[str, str]]] = []

  def do_GET(self):
    self.asked.append((self.path, self.headers.get("Authorization", "")))
    data = base64.b64encode(f"{SECRET}\n".encode()).decode()
    answer = {"access_token": "a-token"}
    if "/secrets/" in self.path:
      answer = {"payload": {"data": data}}
    allowed = "/secrets/none" not in self.path
    self.send_response(200 if allowed else 403)
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())

  def log_message(self, *args):
    pass


@pytest.fixture(scope="module")
def google():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Google)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()


@pytest.fixture
def start(tmp_path, google):
  """Starts the host's program with exit codes of `slowfast doctor` and `slowfast train`."""
  (tmp_path / "slowfast.py").write_text(textwrap.dedent(SLOWFAST))
  program = (
    "import sys; from slowfast_jax.launch import host; "
    f"host.SLOWFAST = (sys.executable, '-IS', {str(tmp_path / 'slowfast.py')!r}); "
    f"host.METADATA = host.SECRETS = {google!r}; sys.exit(host.main())"
  )

  def run(doctor, train, *words):
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "NOTES": str(tmp_path),
      "CODES": json.dumps({"doctor": doctor, "train": train}),
      "JAX_PLATFORMS": "",
    }
    del environment["JAX_PLATFORMS"]
    command = [sys.executable, "-c", program, f"--state={tmp_path}", *words]
    command += ["--workdir=gs://b/r", "--", "train", "--config=my own.py"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)

  return run


def ended(process, tmp_path):
  """Its exit code, which the state folder has too, and what it said."""
  out, err = process.communicate(timeout=60)
  assert (tmp_path / "exit").read_text() == f"{process.returncode}\n"
  return process.returncode, out + err


def notes(tmp_path, verb):
  file = tmp_path / verb
  return json.loads(file.read_text()) if file.exists() else None


def test_doctor_and_then_the_job_with_its_environment(start, tmp_path):
  secret = "--secret=WANDB_API_KEY=projects/p/secrets/wandb-key"
  process = start(0, 0, secret, "--env=TITLE=It's a = b")
  assert ended(process, tmp_path) == (0, "")
  assert notes(tmp_path, "doctor")["words"] == ["doctor", "--workdir=gs://b/r"]
  job = notes(tmp_path, "train")
  assert job["words"] == ["train", "--config=my own.py", "--workdir=gs://b/r"]
  assert (job["key"], job["title"]) == (SECRET, "It's a = b")
  assert job["platforms"] == "tpu,cpu"
  assert SECRET not in " ".join(process.args)
  version = "/v1/projects/p/secrets/wandb-key/versions/latest:access"
  assert (version, "Bearer a-token") in Google.asked


def test_secret_that_cannot_be_read_is_named_and_nothing_starts(start, tmp_path):
  code, said = ended(start(0, 0, "--secret=A=projects/p/secrets/none"), tmp_path)
  assert code == 1
  assert "secret projects/p/secrets/none: cannot be read (HTTP 403)" in said
  assert "roles/secretmanager.secretAccessor" in said
  assert notes(tmp_path, "doctor") is None


def test_job_does_not_start_where_the_doctor_finds_fault(start, tmp_path):
  code, said = ended(start(1, 0), tmp_path)
  assert (code, "the job was not started" in said) == (1, True)
  assert notes(tmp_path, "train") is None


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (42, 42), ("dies", 128 + signal.SIGKILL)])
def test_exit_code_is_the_jobs(start, tmp_path, code, expected):
  assert ended(start(0, code), tmp_path)[0] == expected


@pytest.mark.parametrize("codes", [(0, "waits"), ("waits", 0)])
def test_sigterm_reaches_what_runs(start, tmp_path, codes):
  process = start(*codes)
  assert process.stdout.readline() == "waiting\n"
  process.send_signal(signal.SIGTERM)
  assert ended(process, tmp_path)[0] == 42
  assert (notes(tmp_path, "train") is None) == (codes[0] == "waits")
