# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench data`: it runs, small, and its numbers fit each other."""

import json

import pytest

from slowfast_jax.cli.main import main


def test_it_measures_records_beside_mp4(tmp_path, capsys):
  small = [
    "--frames=8",
    "--size=64",
    "--seconds=1",
    "--records=4",
    "--memory-records=20",
    "--packed-samples=300",
  ]
  assert main(["bench", "data", *small, "--rate=50", f"--json={tmp_path / 'out.json'}"]) == 0
  shown = capsys.readouterr().out
  for words in ("frames/s/core", "decoding 720p mp4 each time", "stall of 50 samples/s"):
    assert words in shown
  numbers = json.loads((tmp_path / "out.json").read_text())
  assert numbers["advantage"] == pytest.approx(numbers["records_fps"] / numbers["mp4_fps"])
  assert numbers["advantage"] > 5
  assert 0 < numbers["alone"] < 0.92 <= numbers["packed"] <= 1
  assert 0 <= numbers["stall_seconds"] <= numbers["consumer_seconds"]


def test_wrong_numbers_are_named(capsys):
  assert main(["bench", "data", "--frames=0"]) == 2
  assert "--frames must be at least 1, got 0" in capsys.readouterr().err
