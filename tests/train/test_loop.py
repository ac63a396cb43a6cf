# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, or asked to stop, ends as one that never was; and a run learns."""

import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from slowfast_jax.checkpoints.store import Checkpoints, flatten, load_export
from slowfast_jax.errors import UserError
from slowfast_jax.sharding import make_mesh
from slowfast_jax.train import loop, resume
from slowfast_jax.train.lines import read_lines
from slowfast_jax.train.loop import train
from slowfast_jax.train.program import compile_step
from slowfast_jax.train.resume import MAY_CHANGE
from slowfast_jax.train.setup import initial_state, open_setup, place_batch
from tests.train.tiny_run import TINY, overrides, tiny_config, write_data

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


def lines(workdir):
  return read_lines(epath.Path(workdir / "metrics.jsonl"))


def exported(workdir):
  params = load_export(workdir / "export").params
  return {name: np.asarray(value) for name, value in flatten(params).items()}


# --- Processes ---


class Command:
  """`slowfast train` as a user starts it, on one device."""

  def __init__(self, data: Path, workdir: Path, *more: str):
    self.workdir = workdir
    words = [f"train.steps={STEPS}", "train.checkpoint_every=4", "train.keep=2", *more]
    self._argv = [
      *(sys.executable, "-m", "slowfast_jax.cli.main", "train", f"--config={TINY}"),
      *(f"--workdir={workdir}", *overrides(data, *words)),
    ]

  def __enter__(self):
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(self._argv, stdout=pipe, stderr=pipe, text=True)
    return self

  def __exit__(self, *_):
    self.process.kill()
    self.process.communicate()

  def finish(self) -> tuple[int, str]:
    out, err = self.process.communicate(timeout=120)
    return self.process.returncode, out + err

  def wait_for_step(self, step: int) -> None:
    """Until a checkpoint of this step or of a later one is there."""
    for _ in range(6000):
      assert self.process.poll() is None, self.process.communicate()
      folder = self.workdir / "checkpoints"
      done = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
      if max(done, default=0) >= step:
        return
      time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} in a minute")


def test_a_run_that_was_killed_and_stopped_ends_as_one_that_was_not(data, tmp_path):
  with Command(data, tmp_path / "whole") as command:
    code, shown = command.finish()
  assert code == 0, shown
  assert "compiled in" in shown
  assert f"Training: {STEPS}/{STEPS} steps" in shown

  with Command(data, tmp_path / "broken") as command:
    command.wait_for_step(8)
    command.process.kill()
    assert command.finish()[0] == -signal.SIGKILL
  assert not (tmp_path / "broken" / "export").exists()
  with Command(data, tmp_path / "broken") as command:
    command.wait_for_step(20)
    command.process.send_signal(signal.SIGTERM)
    code, shown = command.finish()
  assert code == 42, shown
  assert "resumed after step" in shown
  assert "stopped by SIGTERM and saved" in shown
  assert 20 <= len(lines(tmp_path / "broken")) < STEPS
  assert not (tmp_path / "broken" / "export").exists()
  with Command(data, tmp_path / "broken") as command:
    code, shown = command.finish()
  assert code == 0, shown
  assert "resumed after step" in shown

  assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
  assert [line["step"] for line in lines(tmp_path / "whole")] == list(range(1, STEPS + 1))
  expected, got = exported(tmp_path / "whole"), exported(tmp_path / "broken")
  assert expected.keys() == got.keys()
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


# --- In this process ---


def config_of(data, *more):
  """A shallow model, and a rate that stays what it is: one program for most of the tests."""
  same = ("train.steps=3", "optimizer.final_fraction=1.0", "data.read_threads=0")
  shallow = ("model.decoder.num_layers=2", "model.hybrid.max_depth=1")
  return tiny_config(data, *same, *shallow, *more)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """A short run on all devices, and what it told."""
  workdir = tmp_path_factory.mktemp("finished")
  shown, said = [], []
  config = config_of(data, "train.checkpoint_every=2")
  assert train(config, str(workdir), lambda *args: shown.append(args), said.append) == 0
  return workdir, shown, said


def copy_of(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "run")
  return tmp_path / "run"


def test_what_a_run_leaves_and_tells(finished):
  workdir, shown, said = finished
  assert sorted(p.name for p in workdir.iterdir()) == [
    "checkpoints", "export", "hosts", "metrics.jsonl", "report.html", "telemetry.jsonl",
  ]  # fmt: skip
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["3"]
  assert [(done, total) for done, total, _ in shown] == [(0, 3), (1, 3), (2, 3), (3, 3)]
  assert shown[-1][2].startswith("loss ")
  assert said[0].endswith("; 1 cpu")
  assert [line.split(" ")[0] for line in said[1:]] == ["compiling", "compiled", "exported"]
  first, *_, last = lines(workdir)
  assert (first["step"], last["step"]) == (1, 3)
  assert first["loss"] == pytest.approx(np.log(304), abs=2)
  assert [line["learning_rate"] for line in lines(workdir)] == pytest.approx([0, 2e-3, 4e-3])
  assert first["gates"] == [0.0]
  assert last["failed_samples"] == 0


def test_an_export_asks_videos_as_the_training_did(finished, data):
  export = load_export(finished[0] / "export")
  assert export.video.num_frames == 4
  assert export.system == "You are a helpful assistant."
  assert export.model == open_setup(config_of(data)).model


def test_a_finished_run_is_only_exported_again(finished, data, tmp_path):
  workdir = copy_of(finished, tmp_path)
  shutil.rmtree(workdir / "export")
  said = []
  assert train(config_of(data), str(workdir), None, said.append) == 0
  assert said[1:] == ["resumed after step 3", f"exported to {workdir / 'export'}"]
  np.testing.assert_equal(exported(workdir), exported(finished[0]))
  assert lines(workdir) == lines(finished[0])


def test_a_run_can_be_made_longer_and_its_data_moved(finished, data, tmp_path):
  workdir = copy_of(finished, tmp_path)
  moved = tmp_path / "moved"
  shutil.copytree(data, moved)
  assert train(config_of(moved, "train.steps=4"), str(workdir)) == 0
  assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("seed=1", r"\(seed: 0 -> 1\)"),
    ("model.decoder.width=32", r"\(model.decoder.width: 16 -> 32\)"),
    ("optimizer.groups=(('a', 2.0),)", "optimizer.groups: "),
    ("data.batch_size=16", r"\(data.batch_size: 8 -> 16\)"),
    ("model.slow=false", r"\(model.slow: True -> False\)"),
    ("train.dtype=bfloat16", r"\(train.dtype: 'float32' -> 'bfloat16'\)"),
  ],
)
def test_resuming_as_another_run_names_the_field(finished, data, override, words):
  with pytest.raises(UserError, match=words) as error:
    train(config_of(data, override), str(finished[0]))
  assert "another --workdir" in str(error.value)


def test_resuming_on_other_data_is_an_error(finished, tmp_path):
  other = write_data(tmp_path / "other", num_records=9)
  with pytest.raises(UserError, match="the data's records: 12 -> 9; the data's samples: 12 -> 9"):
    train(config_of(other), str(finished[0]))


def test_every_field_that_may_change_is_one(data):
  config = tiny_config(data)
  for field in MAY_CHANGE:
    node = config
    for name in filter(None, field.split(".")):
      node = node[name]


def test_losses_that_are_not_finite_end_the_run_name_the_records_and_save_nothing(
  data, tmp_path, monkeypatch
):
  def poisoned(setup):
    state = initial_state(setup)
    return dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))

  monkeypatch.setattr(resume, "initial_state", poisoned)
  config = config_of(data, "train.checkpoint_every=1", "train.max_skipped=1")
  with pytest.raises(UserError, match="step 2: loss is nan, 2 steps in a row") as error:
    train(config, str(tmp_path))
  file = tmp_path / "skipped-step-2.json"
  assert str(file) in str(error.value)
  shown = json.loads(file.read_text())
  assert len(shown) == 8
  assert all(one["id"] == f"square{one['record']}" for one in shown)
  assert list((tmp_path / "checkpoints").iterdir()) == []
  assert [line["loss"] for line in lines(tmp_path)] == [None]
  assert not (tmp_path / "export").exists()


def test_a_step_that_is_not_saved_is_not_evaluated(data, tmp_path, monkeypatch):
  """It has nothing to come back to, should the process be asked to stop meanwhile."""
  compile_steps = loop.compile_steps

  def compile_steps_of_which_the_second_is_skipped(*args):
    def spoiled(run, state, batch):
      state, metrics = run(state, batch)
      return state, metrics | {"loss": metrics["loss"] * (jnp.nan if state.step == 2 else 1)}

    return {
      shapes: dataclasses.replace(program, run=functools.partial(spoiled, program.run))
      for shapes, program in compile_steps(*args).items()
    }

  monkeypatch.setattr(loop, "compile_steps", compile_steps_of_which_the_second_is_skipped)
  seen = []

  def evaluate(export, folder):
    seen.append(int(folder.name))
    return {"accuracy": 1.0}

  config = config_of(data, "train.steps=4", "eval.every=2", "train.keep_best=accuracy")
  assert train(config, str(tmp_path), evaluate=evaluate) == 0
  assert seen == [4]
  assert json.loads((tmp_path / "best.json").read_text())["scores"] == {"4": 1.0}


def test_what_cannot_be_learned_is_told_before_compiling(data, tmp_path):
  said = []
  config = config_of(data, "data.text_bound=4")
  with pytest.raises(UserError, match="text_bound is 4"):
    train(config, str(tmp_path), None, said.append)
  assert "compiling" not in said


# --- The step on a mesh ---


@pytest.fixture(scope="module")
def first_state(data):
  """The run's parts, and its first state in the memory of the host."""
  setup = open_setup(config_of(data))
  return setup, jax.device_get(initial_state(setup))


def run(first_state, sizes, steps):
  """Metrics of each step on the first batch, and the gradients of step 1 (a tenth of them)."""
  setup, state = first_state
  mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
  setup = dataclasses.replace(setup, mesh=mesh)
  shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_state())
  state = jax.device_put(state, shardings)
  batch = place_batch(next(setup.pipeline.iterate()), mesh)
  compiled = compile_step(setup, state, batch, lambda _: None)
  history = []
  for step in range(steps):
    state, metrics = compiled(state, batch)
    if step == 0:
      gradients = {n: np.asarray(x) for n, x in flatten(state.opt_state).items() if ".mu." in n}
    history.append(jax.device_get(metrics))
  return history, gradients


@pytest.fixture(scope="module")
def on_one_device(first_state):
  return run(first_state, {"data": 1}, 60)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"context": 2}])
def test_a_mesh_changes_nothing(first_state, on_one_device, sizes):
  history, gradients = run(first_state, sizes, 3)
  for got, expected in zip(history, on_one_device[0]):
    for name in expected:
      np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
  assert gradients.keys() == on_one_device[1].keys()
  for name, expected in on_one_device[1].items():
    scale = 1e-5 * np.abs(expected).max() + 1e-8
    np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=scale, err_msg=name)


def test_a_checkpoint_goes_on_with_the_same_loss_on_any_mesh(first_state, tmp_path):
  setup, state = first_state
  batch, losses = next(setup.pipeline.iterate()), []
  state = dataclasses.replace(state, step=np.int32(2))  # The learning rate of step 0 is 0.
  for sizes in ({"fsdp": 8}, {"tensor": 2}, {"data": 2, "fsdp": 2}):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    setup = dataclasses.replace(setup, mesh=mesh)
    abstract = setup.abstract_state()
    with contextlib.closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
      restored = checkpoints.restore(abstract, lambda run: None)
      now = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
      now = restored.state if restored else now
      placed = place_batch(batch, mesh)
      compiled = compile_step(setup, now, placed, lambda _: None)
      now, _ = compiled(now, placed)
      checkpoints.save(len(losses) + 1, now, {})
      checkpoints.wait()
      # The next step, by whom saved; and below by whom restores, on another mesh.
      losses.append((len(losses) + 1, float(compiled(now, placed)[1]["loss"])))
    if restored:
      assert restored.step == losses[-2][0]
  again, mesh = [], make_mesh({"fsdp": 8}, jax.devices())
  setup, placed, compiled = dataclasses.replace(setup, mesh=mesh), place_batch(batch, mesh), None
  for step, _ in losses:
    with contextlib.closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
      now = checkpoints.restore(setup.abstract_state(), lambda run: None, step).state
    compiled = compiled or compile_step(setup, now, placed, lambda _: None)
    again.append((step, float(compiled(now, placed)[1]["loss"])))
  # Another mesh sums in another order.
  np.testing.assert_allclose(again, losses, rtol=1e-5)


def test_one_batch_is_learned_by_heart(on_one_device):
  losses = [float(metrics["loss"]) for metrics in on_one_device[0]]
  assert losses[0] > 5
  assert losses[-1] < 0.05
  assert on_one_device[0][-1]["token_accuracy"] == 1.0


# --- Frozen parts ---


def test_frozen_parts_stay_as_they_are_and_cost_no_memory(data):
  groups = (("^vision|^projector|embed", 0.0), ("", 1.0))
  config = config_of(data).unlock()
  config.optimizer.groups = groups
  setup = open_setup(config)
  after = initial_state(setup)
  before = {name: np.array(x) for name, x in flatten(after.params).items()}
  batch = place_batch(next(setup.pipeline.iterate()), setup.mesh)
  step = compile_step(setup, after, batch, lambda _: None)
  for _ in range(2):  # The learning rate of the first step is 0.
    after, _ = step(after, batch)
  now = flatten(after.params)
  assert list(before) == list(now)
  frozen = {name for name in before if name.startswith(("vision", "projector"))}
  frozen |= {name for name in before if "embed" in name}
  assert frozen < set(before)
  # A shut warm-up gate gives the rest of the slow path no gradient yet.
  stays = {name for name in before if np.array_equal(before[name], now[name])}
  assert {name for name in stays if not name.startswith("adapters")} == frozen
  remembered = {name.split(".mu.")[1] for name in flatten(after.opt_state) if ".mu." in name}
  assert remembered == set(before) - frozen


def test_a_run_in_which_nothing_learns_is_an_error(data):
  with pytest.raises(UserError, match=r"groups freezes every parameter: \(\('', 0.0\),\)"):
    open_setup(config_of(data, "optimizer.groups=(('',0.0),)"))
