# SPDX-License-Identifier: Apache-2.0
"""The demo as a process: what it writes, that its numbers are true, and that it goes on."""

import contextlib
import dataclasses
import hashlib
import html
import json
import re
import shlex

import pytest

from slowfast_jax.demo.run import FAST, FULL, STAGES, Demo
from slowfast_jax.errors import UserError

TIMES = {"seconds", "seconds_by_stage"}


def watch(title, unit):
  return contextlib.nullcontext(lambda *args, **kwargs: None)


@pytest.fixture(scope="module")
def done(demo_run):
  assert demo_run.outcome.returncode == 0, demo_run.outcome.stderr[-4000:]
  return demo_run


@pytest.fixture(scope="module")
def report(done):
  return json.loads((done.folder / "report.json").read_text())


def answers(folder):
  lines = (folder / "predictions.jsonl").read_text().splitlines()
  return {line["id"]: line for line in map(json.loads, lines)}


@pytest.mark.slow
def test_the_report_has_what_others_rely_on(report):
  expected = {"slow_fast_accuracy", "fast_only_accuracy", "chance", "seconds", "llm_tokens"}
  expected |= {"zeroed_slow_accuracy", "attention_hits", "questions_by_kind", "seconds_by_stage"}
  assert expected <= set(report)
  shares = ("slow_fast_accuracy", "fast_only_accuracy", "zeroed_slow_accuracy", "attention_hits")
  assert all(0 <= report[share] <= 1 for share in shares)
  assert report["num_train_videos"] == FAST.num_train
  assert report["num_questions"] == sum(report["questions_by_kind"].values()) == 3 * FAST.num_test
  assert set(report["questions_by_kind"]) == {"colour", "shape", "place", "first"}
  assert 0 < report["seconds"] == pytest.approx(sum(report["seconds_by_stage"].values()), abs=1)


@pytest.mark.slow
def test_both_models_have_the_same_fast_tokens(report):
  assert report["slow_fast_llm_tokens"] == report["fast_only_llm_tokens"] == report["llm_tokens"]
  assert report["fast_only_params"] < report["slow_fast_params"] < 1.5 * report["fast_only_params"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("field", "folder"),
  [
    ("slow_fast_accuracy", "slow_fast/eval"),
    ("fast_only_accuracy", "fast_only/eval"),
    ("zeroed_slow_accuracy", "slow_fast/eval_zero_slow"),
  ],
)
def test_accuracies_are_those_of_the_answers(done, report, field, folder):
  lines = answers(done.folder / folder)
  questions = [json.loads(line) for line in (done.folder / "test.jsonl").read_text().splitlines()]
  assert not any(line["error"] for line in lines.values())
  right = [lines[q["id"]]["answer"] == q["answer"] for q in questions]
  assert report[field] == pytest.approx(sum(right) / len(questions))
  assert report["chance"] == pytest.approx(
    sum(1 / len(q["options"]) for q in questions) / len(questions)
  )


@pytest.mark.slow
def test_records_and_exports_are_there(done):
  for stage in STAGES:
    config = json.loads((done.folder / stage / "export/config.json").read_text())
    assert (config["model"]["hybrid"] is not None) == stage.startswith("slow_fast")
    steps = FAST.stills_steps if stage.endswith("_stills") else FAST.steps
    assert (done.folder / stage / "checkpoints" / str(steps)).is_dir()
    assert (done.folder / stage / "metrics.jsonl").stat().st_size > 0
  assert len(list((done.folder / "videos").glob("*.mp4"))) == FAST.num_train + FAST.num_test


@pytest.mark.slow
def test_the_page_is_written_and_the_command_of_the_chat_is_whole(done):
  page = (done.folder / "report.html").read_text()
  said = done.outcome.stdout
  assert "runs/demo/report.html" in said
  command = re.search(r"^  (slowfast chat .*?--checkpoint=\S+)$", said, re.M | re.S)[1]
  assert command in html.unescape(re.sub("</?span>", "", page))
  program, verb, video, question, checkpoint = shlex.split(command)
  assert (program, verb) == ("slowfast", "chat")
  assert (done.shell.path / video).is_file()
  assert (done.shell.path / checkpoint.removeprefix("--checkpoint=")).is_dir()
  assert question.endswith("?")


def contents(folder):
  """Of all files but those that say how long it took."""
  changing = {"report.html", "report.json", "seconds.json"}
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in changing
  }


@pytest.mark.slow
def test_the_same_command_again_trains_and_asks_nothing(done, report):
  before = contents(done.folder)
  again = done.shell.slowfast(done.command)
  assert again.returncode == 0, again.stderr[-4000:]
  assert contents(done.folder) == before
  now = json.loads((done.folder / "report.json").read_text())
  assert {k: v for k, v in now.items() if k not in TIMES} == {
    k: v for k, v in report.items() if k not in TIMES
  }
  for stage in ["make videos", "align encoder", *(f"train {stage}" for stage in STAGES)]:
    assert now["seconds_by_stage"][stage] == report["seconds_by_stage"][stage]
  assert now["seconds"] - report["seconds"] < 0.5 * report["seconds"]
  assert (
    again.stdout[again.stdout.index("slow-fast ") :]
    == done.outcome.stdout[done.outcome.stdout.index("slow-fast ") :]
  )


@pytest.mark.slow
def test_another_seed_needs_another_folder(done):
  before = contents(done.folder)
  outcome = done.shell.slowfast(f"{done.command} --seed 1")
  assert outcome.returncode == 1
  assert "runs/demo holds another demo (seed: 0 -> 1); give another --workdir." in outcome.stderr
  assert "Traceback" not in outcome.stderr
  assert contents(done.folder) == before


def test_a_folder_holds_one_demo(tmp_path):
  Demo(tmp_path, FAST, 3, watch)
  Demo(tmp_path, FAST, 3, watch)
  with pytest.raises(UserError, match=r"\(seed: 3 -> 4\); give another --workdir"):
    Demo(tmp_path, FAST, 4, watch)
  with pytest.raises(UserError, match=r"num_test: 8 -> 84, .* steps: 12 -> "):
    Demo(tmp_path, FULL, 3, watch)
  Demo(tmp_path / "other", FULL, 4, watch)


@pytest.mark.parametrize("suffix", ["_stills", ""])
def test_both_models_learn_from_the_same_data_in_as_many_steps(tmp_path, suffix):
  """The only difference is the slow path."""
  demo = Demo(tmp_path, FULL, 3, watch)
  slow_fast, fast_only = (demo.config(f"{m}{suffix}").to_dict() for m in ("slow_fast", "fast_only"))
  assert (slow_fast["model"].pop("slow"), fast_only["model"].pop("slow")) == (True, False)
  starts = [config["train"].pop("init_from") for config in (slow_fast, fast_only)]
  if suffix:
    assert starts == [str(tmp_path / "encoder")] * 2
  else:
    assert starts == [str(tmp_path / f"{m}_stills/export") for m in ("slow_fast", "fast_only")]
  assert slow_fast == fast_only
  assert slow_fast["seed"] == 3
  assert slow_fast["train"]["steps"] == (FULL.stills_steps if suffix else FULL.steps)


def test_stills_come_before_videos(tmp_path):
  size = dataclasses.replace(FULL, stills_steps=7)
  config = Demo(tmp_path, size, 0, watch).config("slow_fast_stills")
  assert (config.data.num_frames, config.train.steps, config.model.slow) == (1, 7, True)
  assert config.data.records == str(tmp_path / "stills/records")
  assert config.train.init_from == str(tmp_path / "encoder")
