# SPDX-License-Identifier: Apache-2.0
"""What a run tells besides its metrics, evaluations inside of it, and its best checkpoint."""

import json
import shutil
import sys
import time
import types

import jax
import pytest
from etils import epath

from slowfast_jax.checkpoints.store import Checkpoints, load_export
from slowfast_jax.errors import UserError
from slowfast_jax.train import loop
from slowfast_jax.train.lines import EVALUATED, read_lines
from slowfast_jax.train.report import write_report
from slowfast_jax.train.telemetry import Telemetry
from slowfast_jax.train.trackers import numbers_of, open_trackers
from slowfast_jax.train.watch import Watch
from tests.train.tiny_run import tiny_config, write_data

pytestmark = pytest.mark.usefixtures("one_device")

FIELDS = (
  "train.steps=4", "eval.every=2", "train.keep_best=accuracy", "train.profile=(2,1)",
  "train.trackers=tensorboard", "data.read_threads=0",
  "model.decoder.num_layers=2", "model.hybrid.max_depth=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return tiny_config(write_data(tmp_path_factory.mktemp("data")), *FIELDS)


class Evaluation:
  """Finds step 2 to be better than step 4; may be cut off."""

  def __init__(self, fails=0):
    self.fails, self.seen = fails, []

  def __call__(self, export, folder):
    assert load_export(export).system
    self.seen.append(folder.name)
    if self.fails:
      self.fails -= 1
      raise UserError("cut off")
    return {"accuracy": 0.9 if folder.name == "2" else 0.1, "n": 3}


@pytest.fixture(scope="module")
def finished(config, one_device, tmp_path_factory):
  workdir, said = tmp_path_factory.mktemp("run"), []
  assert loop.train(config, str(workdir), None, said.append, Evaluation()) == 0
  return workdir, said


def test_evaluations_stand_among_the_metrics_and_the_best_checkpoint_stays(finished):
  workdir, said = finished
  lines = read_lines(epath.Path(workdir / "metrics.jsonl"))
  assert [(line["step"], EVALUATED in line) for line in lines] == [
    (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)
  ]  # fmt: skip
  assert [line["accuracy"] for line in lines if EVALUATED in line] == [0.9, 0.1]
  assert "step 2: accuracy 0.9, n 3" in said
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
  assert json.loads((workdir / "best.json").read_text())["best"] == 2


def test_an_evaluation_that_was_cut_off_is_done_when_the_run_goes_on(config, finished, tmp_path):
  evaluation = Evaluation(fails=1)
  with pytest.raises(UserError, match="cut off"):
    loop.train(config, str(tmp_path), evaluate=evaluation)
  assert loop.train(config, str(tmp_path), evaluate=evaluation) == 0
  assert evaluation.seen == ["2", "2", "4"]
  assert (tmp_path / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()


def test_any_checkpoint_can_be_exported_without_training(config, finished):
  workdir, said = str(finished[0]), []
  for which in ("best", "4", "latest"):
    loop.export(config, workdir, which, said.append)
  assert [line for line in said if "resumed" in line] == [
    "resumed after step 2", "resumed after step 4", "resumed after step 4"
  ]  # fmt: skip
  with pytest.raises(UserError, match="has no such checkpoint; choose from 2, 4, latest, best"):
    loop.export(config, workdir, "3", said.append)


def test_a_torn_checkpoint_is_not_exported_and_a_run_that_saves_is_not_disturbed(
  config, finished, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  checkpoints, before = workdir / "checkpoints", (workdir / "export/config.json").stat()
  (checkpoints / "4/state/_METADATA").unlink()
  shutil.copytree(checkpoints / "2", checkpoints / "6.orbax-checkpoint-tmp")
  with pytest.raises(UserError, match=r"checkpoints/4: it cannot be read: .* there is also 2"):
    loop.export(config, str(workdir), "4", lambda line: None)
  assert (workdir / "export/config.json").stat() == before
  assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "4", "6.orbax-checkpoint-tmp"]


def test_an_export_of_no_run_is_explained_and_makes_no_folder(config, tmp_path):
  with pytest.raises(UserError, match="choose from none: it is empty"):
    loop.export(config, str(tmp_path), "latest", lambda line: None)
  assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_a_profile_a_sign_of_life_and_events(finished):
  workdir, said = finished
  assert json.loads((workdir / "hosts" / "0.json").read_text())["doing"] == "left"
  assert list((workdir / "profile" / "step-2").rglob("*.xplane.pb"))
  assert any(line.startswith("profiled") for line in said)
  assert list((workdir / "tensorboard").iterdir())


def test_a_step_that_hangs_writes_down_where_it_is_once(tmp_path):
  said = []
  with Watch(epath.Path(tmp_path), 0.02, (0, 0), lambda: None, said.append) as watch:
    watch.rest()
    time.sleep(0.2)
    assert said == [], "what is no step may take its time"
    watch.before(1)
    while not said:
      time.sleep(0.01)
    time.sleep(0.2)
  assert len(said) == 1
  stacks = (tmp_path / "hosts" / "0.stacks.txt").read_text()
  assert "Thread MainThread" in stacks
  assert "test_telling.py" in stacks


def test_the_report_is_one_file_with_every_curve(finished):
  page = (finished[0] / "report.html").read_text()
  for words in ("Loss", "Evaluation", "Gates of the slow path", "Memory", "4 of 4", "projector"):
    assert words in page
  assert page.count("<svg class") >= 9
  assert "<script" not in page
  assert "http" not in page.replace("http-equiv", "")


def test_a_report_of_nothing_or_of_strange_names_is_a_page_too(tmp_path):
  folder = epath.Path(tmp_path / "<b>")
  folder.mkdir()
  write_report(folder, 5)
  page = (folder / "report.html").read_text()
  assert "No step was logged" in page
  assert "<b>" not in page


def test_telemetry_counts_lost_time_against_goodput(tmp_path):
  file = epath.Path(tmp_path / "telemetry.jsonl")
  begin = {"step": 0, "event": "start", "time": 0.0}
  lines = [begin, *({"step": s, "steps": 1, "step_seconds": 2.0} for s in (1, 2, 3))]
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  telemetry = Telemetry(file, 2)  # Step 3 is lost, and so is all time since 1970.
  telemetry.start()
  telemetry.count({"tokens": 10, "frames": 4, "samples": 1}, 1e9)
  telemetry.write(3, {})
  line = read_lines(file)[-1]
  assert [one["step"] for one in read_lines(file)] == [0, 1, 2, 2, 3]
  assert 0 < line["goodput"] < 1e-6
  assert line["tokens_per_second_per_chip"] > line["frames_per_second_per_chip"] > 0
  assert "mfu" not in line, "nobody knows the peak of a CPU"


def test_trackers_that_are_not_there_are_named(tmp_path, monkeypatch, config):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r'not installed; pip install "\.\[wandb\]" in'):
    open_trackers("wandb", epath.Path(tmp_path), 0, config)
  with pytest.raises(UserError, match="'mlflow' is none; choose from tensorboard, wandb"):
    open_trackers("mlflow", epath.Path(tmp_path), 0, config)


def test_wandb_gets_the_numbers_of_a_resumed_run_under_its_old_name(tmp_path, monkeypatch, config):
  begun, logged = [], []
  run = types.SimpleNamespace(
    log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None
  )
  init = lambda **kwargs: begun.append(kwargs) or run  # noqa: E731
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  for _ in range(2):
    (tracker,) = open_trackers("wandb", epath.Path(tmp_path), 0, config)
  assert begun[0]["id"] == begun[1]["id"]
  none = {"skipped": None, "grad_norm": float("inf")}
  tracker.write(3, numbers_of({"loss": 1.5, "gates": [0.0, 0.5, float("nan")], **none}))
  assert logged == [(3, {"loss": 1.5, "gates/0": 0.0, "gates/1": 0.5})]


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("train.max_skipped=-1", "train.max_skipped must be at least 0, got -1"),
    ("train.profile=(1,2,3)", r"must be \(first step, how many\), got \(1, 2, 3\)"),
    ("train.keep_best=accuracy", "is a metric of an evaluation, and eval.every is 0"),
    ("eval.every=-1", "eval.every must not be negative"),
  ],
)
def test_options_that_make_no_sense_are_named(tmp_path, field, words):
  with pytest.raises(UserError, match=words):
    loop.train(tiny_config(tmp_path, field), str(tmp_path))


def test_the_checkpoint_with_the_highest_score_stays_besides_the_newest(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, scores={1: 5.0, 2: 1.0, 3: 2.0})
  for step in (1, 2, 3):
    checkpoints.save(step, {"a": jax.numpy.zeros(3)}, {})
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
