# SPDX-License-Identifier: Apache-2.0
"""Evaluations survive kills and broken videos, and never mix with another run's predictions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.config import load_config
from slowfast_jax.errors import UserError
from slowfast_jax.eval import runner
from slowfast_jax.eval.runner import evaluate
from slowfast_jax.eval.tasks.jsonl import JsonlTask
from slowfast_jax.generate.engine import Engine
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

pytestmark = pytest.mark.usefixtures("one_device")

KILLED_AFTER = 4
# A random model says no letter: read one from whatever it says.
PARSE = "['A', 'B', ''][sum(map(ord, reply)) % 3]"
KILLED = """
import os, signal, sys
from slowfast_jax.eval.tasks.jsonl import JsonlTask
from slowfast_jax.config import load_config
from slowfast_jax.eval.runner import evaluate

def progress(done, total, errors):
  if done >= {after}:
    os.kill(os.getpid(), signal.SIGKILL)

JsonlTask.parse = lambda self, doc, reply: {parse}
evaluate(load_config("configs/eval_jsonl.py", sys.argv[3:]), sys.argv[1], sys.argv[2], progress)
"""


def doc(number, video):
  return {
    "id": f"q{number}",
    "video": video,
    "question": f"What was it {'really ' * (number % 3)}number {number}?",
    "options": ["a cup", "a book", "a cat"][: 2 + number % 2],
    "answer": "AB"[number % 2],
    "kind": f"kind{number % 2}",
  }


@pytest.fixture(scope="module", autouse=True)
def parse():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(JsonlTask, "parse", eval(f"lambda self, doc, reply: {PARSE}"))
    yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Three videos with three questions each, and an export."""
  folder = tmp_path_factory.mktemp("eval")
  (folder / "videos").mkdir()
  for i, name in enumerate(("a", "b", "c")):
    write_video(folder / "videos" / f"{name}.mp4", VideoSpec(num_frames=8 + i))
  docs = [doc(i, f"{'abc'[i % 3]}.mp4") for i in range(9)]
  (folder / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
  save_export(folder / "export", make_export())
  return folder


def overrides(folder, **changes):
  values = {
    "questions": folder / "test.jsonl",
    "videos": folder / "videos",
    "batch_size": 2,
    "max_new_tokens": 6,
    "mesh.data": 1,
    "mesh.tensor": -1,
    **changes,
  }
  return [f"--config.{name}={value}" for name, value in values.items()]


def settings(folder, **changes):
  return load_config("configs/eval_jsonl.py", overrides(folder, **changes))


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(files, one_device):
  results = evaluate(settings(files), files / "export", files / "unbroken")
  return results, lines_of(files / "unbroken")


def test_results_are_what_the_predictions_say(files, unbroken):
  results, lines = unbroken
  assert json.loads((files / "unbroken" / "results.json").read_text()) == results
  (metrics,) = results.values()
  assert list(results) == ["jsonl"]
  assert (metrics["n"], metrics["errors"], metrics["prompt_set"]) == (9, 0, "letter")
  assert metrics["unparsed"] == sum(not line["answer"] for line in lines)
  right = sum(line["answer"] == line["gold"] for line in lines)
  assert 0 < metrics["accuracy"] == right / 9
  assert 0 < metrics["unparsed"] < 9
  assert sorted(metrics["accuracy_by_kind"]) == ["kind0", "kind1"]
  assert sorted(line["id"] for line in lines) == [f"q{i}" for i in range(9)]


def test_a_killed_run_goes_on(files, unbroken, tmp_path):
  script = tmp_path / "killed.py"
  script.write_text(KILLED.format(after=KILLED_AFTER, parse=PARSE))
  command = [sys.executable, script, files / "export", tmp_path / "run", *overrides(files)]
  environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "1"}
  killed = subprocess.run(
    [str(word) for word in command], env=os.environ | environment, timeout=120
  )
  assert killed.returncode == -signal.SIGKILL
  file = tmp_path / "run" / "predictions.jsonl"
  before = file.read_bytes()
  assert len(before.splitlines()) == KILLED_AFTER
  assert not (tmp_path / "run" / "results.json").exists()
  file.write_bytes(before + b'{"id": "q8", "repl')  # As if killed within a line.
  told = []
  results = evaluate(
    settings(files), files / "export", tmp_path / "run", lambda *counts: told.append(counts)
  )
  assert file.read_bytes().startswith(before)
  assert lines_of(tmp_path / "run") == unbroken[1]
  assert results == unbroken[0]
  assert told[0] == (KILLED_AFTER, 9, 0)
  assert told[-1] == (9, 9, 0)


def test_a_finished_run_asks_nothing(files, unbroken, monkeypatch):
  monkeypatch.setattr(runner, "load_checkpoint", None)
  assert evaluate(settings(files), files / "export", files / "unbroken") == unbroken[0]


def test_a_video_is_encoded_once(files, unbroken, tmp_path, monkeypatch):
  encoded, encode = [], Engine.encode
  monkeypatch.setattr(Engine, "encode", lambda *a, **k: encoded.append(1) or encode(*a, **k))
  results = evaluate(settings(files), files / "export", tmp_path)
  assert len(encoded) == 3
  assert results == unbroken[0]


def test_hidden_slow_tokens_change_answers(files, unbroken, tmp_path):
  evaluate(settings(files, zero_slow=True), files / "export", tmp_path)
  pairs = zip(lines_of(tmp_path), unbroken[1])
  assert any(hidden["reply"] != seen["reply"] for hidden, seen in pairs)


def test_broken_videos_are_errors_until_they_are_mended(files, unbroken, tmp_path):
  videos = tmp_path / "videos"
  shutil.copytree(files / "videos", videos)
  (videos / "b.mp4").write_text("no video")
  (videos / "c.mp4").unlink()
  config = settings(files, videos=videos)
  metrics = evaluate(config, files / "export", tmp_path / "run")["jsonl"]
  assert (metrics["n"], metrics["errors"]) == (9, 6)
  lines = {line["id"]: line for line in lines_of(tmp_path / "run")}
  right = sum(line["answer"] == line["gold"] for line in unbroken[1] if line["video"] == "a.mp4")
  assert metrics["accuracy"] == right / 9
  assert "b.mp4: is not a video file" in lines["q1"]["error"]
  assert "c.mp4: there is no such file" in lines["q2"]["error"]
  assert lines["q1"]["reply"] == lines["q1"]["answer"] == ""

  shutil.copytree(files / "videos", videos, dirs_exist_ok=True)
  assert evaluate(config, files / "export", tmp_path / "run")["jsonl"] == metrics
  config = settings(files, videos=videos, retry_errors=True)
  assert evaluate(config, files / "export", tmp_path / "run") == unbroken[0]
  assert len(lines_of(tmp_path / "run")) == 9


def test_a_folder_without_any_video_is_an_error(files, tmp_path):
  (tmp_path / "videos").mkdir()
  config = settings(files, videos=tmp_path / "videos")
  with pytest.raises(UserError, match=r"None of the 9 questions .*a.mp4: there is no such file"):
    evaluate(config, files / "export", tmp_path / "run")
  with pytest.raises(UserError, match="videos = 'gone': there is no such folder"):
    evaluate(settings(files, videos="gone"), files / "export", tmp_path / "run2")


def test_another_run_needs_another_folder(files, unbroken, tmp_path):
  with pytest.raises(UserError, match="max_new_tokens was 6 and is 7.* another --workdir"):
    evaluate(settings(files, max_new_tokens=7), files / "export", files / "unbroken")
  save_export(tmp_path / "other", make_export())
  with pytest.raises(UserError, match="checkpoint was"):
    evaluate(settings(files), tmp_path / "other", files / "unbroken")
  shutil.copytree(files / "export", tmp_path / "copy")
  assert evaluate(settings(files), tmp_path / "copy", files / "unbroken") == unbroken[0]
  with pytest.raises(UserError, match="none: there is no such folder"):
    evaluate(settings(files), tmp_path / "none", files / "unbroken")


def test_a_damaged_predictions_file_is_named(files, unbroken, tmp_path):
  shutil.copytree(files / "unbroken", tmp_path / "run")
  file = tmp_path / "run" / "predictions.jsonl"
  file.write_bytes(b"nonsense\n" + file.read_bytes())
  with pytest.raises(UserError, match="predictions.jsonl:1: not a prediction"):
    evaluate(settings(files), files / "export", tmp_path / "run")
