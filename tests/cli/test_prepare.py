# SPDX-License-Identifier: Apache-2.0
"""`slowfast prepare`: flags, what it says, exit codes; and the progress of long work."""

import dataclasses
import io
import json
import sys

import pytest

from slowfast_jax.cli import prepare as verb
from slowfast_jax.cli import progress as progress_module
from slowfast_jax.cli.main import main
from slowfast_jax.cli.progress import Progress
from slowfast_jax.data.prepare_config import PrepareConfig
from tests.data.video_files import VideoSpec, write_video


@pytest.fixture
def clips(tmp_path):
  """Two clips, one of them broken, and the arguments that prepare them."""
  write_video(tmp_path / "a.mp4", VideoSpec(num_frames=8))
  (tmp_path / "b.mp4").write_text("no video")
  turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
  entries = [{"id": n, "video": f"{n}.mp4", "conversations": turns} for n in "ab"]
  (tmp_path / "train.json").write_text(json.dumps(entries, indent=1))
  paths = {"videos": tmp_path, "annotations": tmp_path / "train.json", "output": tmp_path / "out"}
  arguments = [f"--{name}={path}" for name, path in paths.items()]
  return tmp_path, ["prepare", *arguments, "--frames=2", "--size=16", "--workers=1"]


def test_it_prepares_and_says_what_it_did(clips, capsys):
  folder, arguments = clips
  assert main([*arguments, "--report", str(folder / "deep" / "report.json")]) == 0
  shown = capsys.readouterr().out
  assert "Preparing: 2/2 videos" in shown
  assert "1 error\n" in shown
  assert f"{folder}/out: 1 records, 1 conversations, 2 frames" in shown
  assert f"1 left out: see {folder}/out/errors.jsonl" in shown
  report = json.loads((folder / "deep" / "report.json").read_text())
  assert report == json.loads((folder / "out" / "report.json").read_text())
  assert (report["records"], report["errors"]) == (1, 1)
  assert main(arguments) == 0
  assert "1 shards were already done." in capsys.readouterr().out


def test_a_plan_writes_nothing(clips, capsys):
  folder, arguments = clips
  assert main([*arguments, "--plan"]) == 0
  shown = capsys.readouterr().out
  assert "2 videos, 0 images, 0 texts; 2 conversations" in shown
  assert "1 of 2 items that were tried cannot be prepared" in shown
  assert not (folder / "out").exists()


def test_errors_have_no_traceback(clips, capsys):
  folder, arguments = clips
  assert main([*arguments, "--on-error=fail"]) == 1
  assert capsys.readouterr().err.startswith(
    f"slowfast prepare: {folder}/train.json:16: b.mp4: is not a video file"
  )
  assert main([*arguments, "--quality=0"]) == 1
  assert "quality must lie between 1 and 100, got 0" in capsys.readouterr().err
  assert main([*arguments, "--sampler=random"]) == 2
  assert "invalid choice: 'random'" in capsys.readouterr().err
  assert main(["prepare"]) == 2


def test_every_setting_has_its_flag(clips, monkeypatch):
  _, arguments = clips
  changed = PrepareConfig(7, "fps", 3.5, 48, "clip", 70, 5, 3, "budget=2%", 9.0, True, True)
  seen = []

  def record(videos, annotations, output, config, *_):
    seen.append(config)
    raise KeyboardInterrupt

  monkeypatch.setattr(verb, "prepare", record)
  values = dataclasses.asdict(changed)
  values["frames"] = values.pop("num_frames")
  names = {name: f"--{name.replace('_', '-')}" for name in values}
  flags = [names[n] if value is True else f"{names[n]}={value}" for n, value in values.items()]
  main([*arguments[:4], *flags])
  main(arguments[:4])
  assert seen == [changed, PrepareConfig()]


# Progress.


class Clock:
  def __init__(self):
    self.now = 100.0

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress_module, "time", clock)
  return clock


def test_a_log_gets_a_line_now_and_then(clock, capsys):
  with Progress("Preparing", "videos") as progress:
    progress(1000, 2000)  # Done by an earlier run.
    for i in range(1, 61):
      clock.now += 0.5
      progress(1000 + i, 2000, errors=i // 30)
  assert capsys.readouterr().out.splitlines() == [
    "Preparing: 1020/2000 videos, 2 a second, 8:10 left",
    "Preparing: 1040/2000 videos, 2 a second, 8:00 left, 1 error",
    "Preparing: 1060/2000 videos, 2 a second, 7:50 left, 2 errors",
    "Preparing: 1060/2000 videos, 2 a second, 7:50 left, 2 errors",
  ]


def test_only_the_first_process_speaks(clock, capsys):
  with Progress("Training", "steps", enabled=False) as progress:
    progress(0, 100)
    clock.now += 100
    progress(50, 100)
  assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(clock, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  with Progress("Preparing", "videos") as progress:
    progress(0, 30)
    clock.now += 4000
    progress(10, 30, errors=3)
  shown = terminal.getvalue()
  for words in ("Preparing", "━", "10/30", "videos, 0.0025 a second, 2:13:20 left, 3 errors"):
    assert words in shown
