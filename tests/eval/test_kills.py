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
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

# A thread strikes at a random moment, so also within a write; the rest waits a little every time
# that it has answers, so that three kills do not outlast sixty questions. Seed 0 is left alone.
EVALUATION = """
import os, random, signal, sys, threading, time
from slowfast_jax.config import load_config
from slowfast_jax.eval.runner import evaluate

seed, started = int(sys.argv[3]), []

def kill():
  time.sleep(random.Random(seed).uniform(0.1, 0.4))
  os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total, errors):
  if not seed:
    return
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
    *("--config.batch_size=2", "--config.max_new_tokens=4"),
  ]

  def run(workdir: Path, seed: int) -> int:
    command = [sys.executable, "-c", EVALUATION, tmp_path / "export", workdir, str(seed)]
    # One device: on eight, two cores spend their time on waiting for each other.
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run([*command, *overrides], env=os.environ | environment).returncode

  unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
  assert run(unbroken, 0) == 0
  counts = [0]
  for _ in range(3):
    assert run(killed, random.randrange(1, 10**6)) == -signal.SIGKILL
    counts.append((killed / "predictions.jsonl").read_bytes().count(b"\n"))
    assert counts[-2] < counts[-1] < 60
  assert run(killed, 0) == 0
  for name in ("predictions.jsonl", "results.json"):
    assert (killed / name).read_text() == (unbroken / name).read_text()
  lines = (killed / "predictions.jsonl").read_text().splitlines()
  assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 60
