# SPDX-License-Identifier: Apache-2.0
"""The doctor tries things for real, and says what is missing, what to do, and exits 1."""

import argparse
import http.server
import json
import re
import threading
import time
import tomllib
import urllib.parse
from pathlib import Path
from typing import ClassVar

import av
import jax
import pytest

from slowfast_jax.cli import doctor
from slowfast_jax.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("work") / "not" / "there" / "yet"
  checks = list(doctor.examine(str(workdir), timeout=5.0))
  assert not workdir.parents[1].exists()  # Nothing is left behind.
  return {check.name: check for check in checks}


def test_everything_works_here(report):
  assert [check for check in report.values() if not check.ok] == []
  assert report["devices"].found.startswith("8 x cpu")
  assert report["mesh"].found == "data=1 fsdp=8 context=1 tensor=1"


def test_every_runtime_dependency_is_imported():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  names = {re.split("[>[]", dependency)[0] for dependency in project["dependencies"]}
  assert set(doctor.PACKAGES) == names


def test_json_report(tmp_path, capsys):
  assert main(["doctor", "--json", f"--workdir={tmp_path}"]) == 0
  shown = json.loads(capsys.readouterr().out)
  assert shown["ok"]
  assert {check["status"] for check in shown["checks"]} == {"ok"}
  assert "h264 video" in {check["name"] for check in shown["checks"]}


def test_folder_that_cannot_be_written_is_missing_and_exit_1(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert main(["doctor", f"--workdir={tmp_path}/file/runs"]) == 1
  shown = capsys.readouterr().out
  assert "missing  storage" in shown
  assert "-> choose another --workdir" in shown
  assert shown.endswith("Does not work: storage.\n")


def test_broken_package_names_its_remedy():
  check = doctor._package("no-such-package", "no_such_package")
  assert (check.status, check.remedy) == ("missing", "pip install --upgrade no-such-package")
  assert "No module named" in check.found


@pytest.mark.parametrize(("name", "status"), [("h264", "missing"), ("av1", "optional")])
def test_codec_that_does_not_decode(monkeypatch, name, status):
  monkeypatch.setitem(doctor.FRAMES, name, (doctor.FRAMES[name][0], "0" * 40))
  assert doctor._codec(name).status == status


def test_without_pyav_there_is_no_second_error(monkeypatch):
  real = doctor._package
  broken = doctor.Check("av", False, "ImportError: libavcodec", "pip install --upgrade av")
  monkeypatch.setattr(doctor, "_package", lambda n, m: broken if n == "av" else real(n, m))
  monkeypatch.setattr(doctor, "_devices", list)
  names = [check.name for check in doctor.examine(".", 1.0) if not check.ok]
  assert names == ["av"]


def test_devices_that_do_not_answer_are_reported_in_time(monkeypatch):
  monkeypatch.setattr(doctor, "_devices", lambda: time.sleep(60))
  (check,) = doctor._in_time(doctor._devices, 0.2)
  assert check.status == "missing"
  assert "no answer" in check.found


def test_wrong_numbers_are_found(monkeypatch):
  monkeypatch.setattr(doctor, "_matmul_error", lambda sizes: 0.5)
  assert doctor._mesh(jax.devices())[-1].status == "missing"


def test_accelerator_that_jax_does_not_use(monkeypatch):
  monkeypatch.setattr(doctor, "_plugged_in", lambda: "tpu")
  monkeypatch.delenv("JAX_PLATFORMS")
  check = doctor._accelerator("cpu")
  assert check.status == "missing"
  assert 'pip install ".[tpu]"' in check.remedy
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert doctor._accelerator("cpu").ok  # The user asked for it.


def test_mesh_of_several_slices_copies_parameters_once_a_slice():
  devices = [argparse.Namespace(slice_index=i // 4) for i in range(8)]
  assert doctor.propose_mesh(devices) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


class Bucket(http.server.BaseHTTPRequestHandler):
  """As much of the Cloud Storage API as a small file needs."""

  objects: ClassVar[dict[str, bytes]] = {}
  methods: ClassVar[list[str]] = []

  def answer(self):
    url = urllib.parse.urlsplit(self.path)
    query = urllib.parse.parse_qs(url.query)
    name = query["name"][0] if "name" in query else urllib.parse.unquote(url.path.split("/")[-1])
    self.methods.append(self.command)
    if self.command == "POST":
      self.objects[name] = self.rfile.read(int(self.headers["content-length"]))
      body = json.dumps({"name": name, "bucket": "bucket", "generation": "1"}).encode()
    else:
      body = self.objects.pop(name) if self.command == "DELETE" else self.objects[name]
    self.send_response(200)
    self.send_header("content-length", str(len(body)))
    self.send_header("x-goog-generation", "1")
    self.end_headers()
    self.wfile.write(body)

  do_GET = do_POST = do_DELETE = answer  # noqa: N815, the names that the base class calls

  def log_message(self, *args):
    pass


@pytest.fixture
def bucket(monkeypatch):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
  yield Bucket
  server.shutdown()


def test_bucket_is_written_read_and_left_clean(bucket, monkeypatch):
  monkeypatch.setattr("etils.epath.Path", Path)  # Its own client is the extra `tpu`.
  assert doctor._storage("gs://bucket/runs", timeout=20.0).ok
  assert bucket.methods == ["POST", "GET", "DELETE"]
  assert bucket.objects == {}


def test_bucket_without_its_client_names_the_extra(monkeypatch):
  def absent(self):
    raise ImportError("Please install gcsfs to access Google Storage")

  monkeypatch.setattr("etils.epath.Path.exists", absent)
  check = doctor._storage("gs://bucket/runs", timeout=5.0)
  assert "gcsfs" in check.found
  assert ".[tpu]" in check.remedy


def test_remote_storage_that_does_not_answer_is_reported_in_time(monkeypatch):
  monkeypatch.setattr(doctor, "_probe_remote", lambda workdir, timeout: time.sleep(60))
  start = time.monotonic()
  check = doctor._storage("gs://bucket/runs", timeout=-4.8)
  assert time.monotonic() - start < 5
  assert check.status == "missing"
  assert "gcloud auth" in check.remedy


def test_frames_are_what_the_containers_say():
  for name in doctor.FRAMES:
    assert doctor._codec(name).ok
  assert {"h264", "hevc", "vp9", "libdav1d"} <= av.codecs_available
