# SPDX-License-Identifier: Apache-2.0
"""An evaluation that is killed at any moments, three times over, loses and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.config import load_config
from slowfast_jax.eval.runner import evaluate
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

# A thread strikes at a random moment, so also within a write; the rest waits a little every time
# that it has answers, so that three kills do not outlast sixty questions.
KILLED = """
import os, random, signal, sys, threading, time
from slowfast_jax.config import load_config
from slowfast_jax.eval.runner import evaluate

started = []

def kill():
  time.sleep(random.Random(int(sys.argv[3])).uniform(0.1, 0.4))
  os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total, errors):
  started.append(done)
  if len(started) == 2:
    threading.Thread(target=kill).start()
  time.sleep(0.05)

evaluate(load_config("configs/eval_jsonl.py", sys.argv[4:]), sys.argv[1], sys.argv[2], progress)
"""


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path):
  (tmp_path / "videos").mkdir()
  for i in range(12):
    write_video(tmp_path / f"videos/{i}.mp4", VideoSpec(num_frames=8))
  docs = [
    {"video": f"{i % 12}.mp4", "question": f"Which is {i}?", "options": ["a", "b"], "answer": "A"}
    for i in range(60)
  ]
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  save_export(tmp_path / "export", make_export())
  overrides = [
    *(f"--config.questions={tmp_path / 'test.jsonl'}", f"--config.videos={tmp_path / 'videos'}"),
    *("--config.batch_size=2", "--config.max_new_tokens=4", "--config.mesh.tensor=-1"),
    "--config.mesh.data=1",
  ]
  config = load_config("configs/eval_jsonl.py", overrides)
  unbroken = evaluate(config, tmp_path / "export", tmp_path / "unbroken")

  script, run = tmp_path / "killed.py", tmp_path / "run"
  script.write_text(KILLED)
  # As many devices as here, so that it finds its programs in the cache.
  environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "8"}
  counts = [0]
  for _ in range(3):
    command = [sys.executable, script, tmp_path / "export", run, str(random.randrange(10**6))]
    killed = subprocess.run([*command, *overrides], env=os.environ | environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    counts.append((run / "predictions.jsonl").read_bytes().count(b"\n"))
    assert counts[-2] < counts[-1] < 60
  assert evaluate(config, tmp_path / "export", run) == unbroken
  content = (run / "predictions.jsonl").read_text()
  assert content == (tmp_path / "unbroken/predictions.jsonl").read_text()
  assert len({json.loads(line)["id"] for line in content.splitlines()}) == 60
