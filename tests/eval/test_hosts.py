# SPDX-License-Identifier: Apache-2.0
"""Two processes evaluate one task: as one would, also after one of them was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.cli.main import main
from slowfast_jax.errors import UserError
from slowfast_jax.eval import hosts
from slowfast_jax.eval.results import PredictionParts, PredictionsFile, merge_parts, read_all
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

KILLED = """
import os, signal, sys
from slowfast_jax.eval.runner import PredictionParts
from slowfast_jax.cli.main import main

append, seen = PredictionParts.append, []

def killed(self, lines):
  append(self, lines)
  seen.append(lines)
  if len(seen) == 2 and os.environ["JAX_PROCESS_ID"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)

PredictionParts.append = killed
main(["eval", *sys.argv[1:]])
"""


def line(name, reply, error=""):
  return {"id": name, "reply": reply, "error": error}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Four videos with four questions each, and an export."""
  folder = tmp_path_factory.mktemp("hosts")
  (folder / "videos").mkdir()
  for i in range(4):
    write_video(folder / f"videos/{i}.mp4", VideoSpec(num_frames=8))
  docs = [
    {"video": f"{i % 4}.mp4", "question": f"Which is {i}?", "options": ["a", "b"], "answer": "A"}
    for i in range(16)
  ]
  (folder / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  save_export(folder / "export", make_export())
  return folder


def arguments(files, workdir):
  return [
    *("--config=configs/eval_jsonl.py", f"--config.questions={files / 'test.jsonl'}"),
    *(f"--config.videos={files / 'videos'}", "--config.batch_size=2", "--config.max_new_tokens=4"),
    *(f"--checkpoint={files / 'export'}", f"--workdir={workdir}"),
  ]


def start(script, words):
  """Two processes of one device each that know of each other."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_NUM_PROCESSES": "2",
  }
  return [
    subprocess.Popen(
      [sys.executable, "-c", script, *words],
      env=environment | {"JAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]


@pytest.mark.slow
def test_two_processes_do_what_one_does_although_one_was_killed(files, tmp_path):
  assert main(["eval", *arguments(files, tmp_path / "one")]) == 0
  shared = tmp_path / "two"
  first, second = start(KILLED, arguments(files, shared))
  second.communicate(timeout=120)
  assert second.returncode == -signal.SIGKILL
  first.kill()  # As a scheduler does with the rest.
  first.communicate(timeout=60)
  before = read_all(shared)
  assert 4 <= len(before) < 16
  assert not (shared / "results.json").exists()

  again = start(
    "import sys; from slowfast_jax.cli.main import main; sys.exit(main(['eval', *sys.argv[1:]]))",
    arguments(files, shared),
  )
  outputs = [process.communicate(timeout=120) for process in again]
  assert [process.returncode for process in again] == [0, 0], outputs
  assert ["accuracy" in out for out, _ in outputs] == [True, False]
  for name in ("predictions.jsonl", "results.json", "run.json"):
    assert (shared / name).read_text() == (tmp_path / "one" / name).read_text()
  assert sorted(x.name for x in shared.iterdir()) == sorted(
    x.name for x in (tmp_path / "one").iterdir()
  )


def test_processes_append_to_files_of_their_own(tmp_path):
  run = {"task": "t"}
  with (
    PredictionParts(tmp_path, run, first=True) as a,
    PredictionParts(tmp_path, run, first=False) as b,
  ):
    a.append([line("2", "x")])
    b.append([line("1", "y"), line("3", "z")])
    a.append([line("4", "")])
    assert set(a.done) == {"2", "4"}
  # One process goes on where two were killed, and one of them within a write.
  (tmp_path / "predictions.parts/torn.partial").write_text('{"id": "5", "re')
  with PredictionsFile(tmp_path, run) as rest:
    assert set(rest.done) == {"1", "2", "3", "4"}
    rest.append([line("5", "last")])
  merge_parts(tmp_path, ["1", "2", "3", "4", "5"])
  text = (tmp_path / "predictions.jsonl").read_text()
  assert [json.loads(x)["reply"] for x in text.splitlines()] == ["y", "x", "z", "", "last"]
  assert sorted(x.name for x in tmp_path.iterdir()) == ["predictions.jsonl", "run.json"]
  merge_parts(tmp_path, [])  # Nothing to merge: nothing happens.
  assert (tmp_path / "predictions.jsonl").read_text() == text


def test_an_answer_outlives_errors_before_and_after_it(tmp_path):
  with PredictionParts(tmp_path, {}, first=True) as parts:
    parts.append([line("1", "", "no video"), line("2", "x")])
  with PredictionParts(tmp_path, {}, retry_errors=True, first=True) as parts:
    assert set(parts.done) == {"2"}
    parts.append([line("1", "y"), line("2", "", "no video")])
  found = read_all(tmp_path)
  assert (found["1"]["reply"], found["2"]["reply"]) == ("y", "x")


def test_parts_of_another_run_are_left_alone(tmp_path):
  with PredictionParts(tmp_path, {"task": "t"}, first=True) as parts:
    parts.append([line("1", "x")])
  for opening in (PredictionsFile, lambda *words: PredictionParts(*words, first=False)):
    with pytest.raises(UserError, match="task was 't' and is 'u'"):
      opening(tmp_path, {"task": "u"})


def test_a_mesh_over_all_hosts_is_refused(monkeypatch):
  monkeypatch.setattr(hosts.jax, "device_count", lambda: 16)
  monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"16 devices of all 2 processes.*--config.mesh.data=8 "):
    hosts.local_mesh({"data": 4, "fsdp": 4, "context": 1, "tensor": 1})
  assert hosts.local_mesh({"data": -1, "tensor": 2}).shape["data"] == 4


def test_a_process_that_waits_for_a_dead_one_says_so(monkeypatch):
  def fail(key, timeout_ms):
    raise hosts.jax.errors.JaxRuntimeError("ABORTED: task 1 died")

  monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts.multihost, "get_barrier_sync_fn", lambda: fail)
  with pytest.raises(UserError, match="Another process .* has stopped.*start all of them again"):
    hosts.wait_for_all(Path("runs/mine"), "read")
