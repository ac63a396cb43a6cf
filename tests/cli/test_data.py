# SPDX-License-Identifier: Apache-2.0
"""`slowfast data`: what it prints, what it writes, exit codes."""

import json

import pytest

from slowfast_jax.cli.main import main
from tests.data.video_files import VideoSpec, write_video
from tests.train.tiny_run import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = write_data(tmp_path_factory.mktemp("data"))
  write_video(folder / "a.mp4", VideoSpec(num_frames=8))
  turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
  entries = [{"id": n, "video": f"{n}.mp4", "conversations": turns} for n in "ab"]
  (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  (folder / "mix.json").write_text(json.dumps([{"path": "records", "licence": "MIT"}]))
  return folder


def run(capsys, *words) -> tuple[int, str]:
  code = main(["data", *map(str, words)])
  captured = capsys.readouterr()
  return code, captured.out + captured.err


def test_validate_tells_lines_and_fails(data, tmp_path, capsys):
  file, report = data / "train.jsonl", tmp_path / "problems.jsonl"
  words = ["--annotations", file, "--videos", data, "--workers", 1, "--report", report]
  code, shown = run(capsys, "validate", *words)
  assert code == 1
  assert f"{file}:2: b.mp4: there is no such file" in shown
  assert f"{file}: 2 conversations, 2 files: 1 problems" in shown
  (line,) = report.read_text().splitlines()
  assert json.loads(line)["place"] == f"{file}:2"
  assert "and 1 more" in run(capsys, "validate", *words[:6], "--show", 0)[1]


def test_validate_lets_good_data_pass(data, capsys):
  code, shown = run(capsys, "validate", data / "train.jsonl")
  assert (code, shown) == (0, f"{data / 'train.jsonl'}: 2 conversations: no problems\n")
  code, shown = run(capsys, "validate", data / "records")
  assert code == 0
  assert "12 conversations, 12 records: no problems" in shown
  limit = ["--tokenizer", data / "tokenizer", "--max-tokens", 20]
  code, shown = run(capsys, "validate", data / "records", *limit)
  assert code == 1
  assert "more than 20: its end would be cut off" in shown


def test_stats_prints_and_draws(data, tmp_path, capsys):
  words = ["--tokenizer", data / "tokenizer", "--output", tmp_path / "out"]
  code, shown = run(capsys, "stats", data / "records", *words)
  assert code == 0
  assert "frames of a video: mean 4" in shown
  assert "text tokens of a conversation" in shown
  names = sorted(file.name for file in (tmp_path / "out").iterdir())
  assert names == ["duration.png", "frames.png", "stats.json", "tokens.png", "turns.png"]
  assert json.loads((tmp_path / "out/stats.json").read_text())["records"] == 12


def test_mix_prints_a_table_or_json(data, capsys):
  code, shown = run(capsys, "mix", data / "mix.json", "--samples", 24)
  assert code == 0
  assert shown.splitlines()[1].split()[:5] == ["records", "100.0%", "12", "24", "2.00"]
  words = ["--json", "--tokenizer", data / "tokenizer"]
  code, shown = run(capsys, "mix", data / "mix.json", *words)
  assert json.loads(shown)[0]["licence"] == "MIT"


@pytest.mark.parametrize(
  ("words", "code", "shown"),
  [
    ([], 2, "the following arguments are required"),
    (["validate"], 2, "give a records folder, or --annotations FILE"),
    (["validate", "a", "--annotations", "b"], 2, "give a records folder, or --annotations FILE"),
    (["validate", "a", "--max-tokens", "5"], 2, "--tokenizer and --max-tokens go together"),
    (["validate", "/nowhere"], 1, "/nowhere: there is no such folder"),
    (["stats", "/nowhere"], 1, "/nowhere: there is no such folder"),
    (["mix", "/nowhere.json"], 1, "/nowhere.json: cannot be read"),
    (["mix", "a", "--samples", "0"], 2, "--samples must be at least 1, got 0"),
  ],
)
def test_wrong_usage(capsys, words, code, shown):
  got, text = run(capsys, *words)
  assert got == code
  assert shown in text
