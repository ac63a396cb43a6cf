# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl has every line once, and a run that diverges ends with the step's number."""

import dataclasses
import json

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem

from slowfast_jax.data.packing import Geometry, collate, empty_row
from slowfast_jax.errors import UserError
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.train.best import Scores
from slowfast_jax.train.lines import LineFile, read_lines
from slowfast_jax.train.metrics import Recorder, instrument
from slowfast_jax.train.optimizer import OptimizerConfig, make_optimizer
from slowfast_jax.train.resume import Counts
from slowfast_jax.train.telemetry import Telemetry
from tests.models.tiny import CONFIG as MODEL
from tests.train.tiny_run import TrainState


def metrics(loss=1.0, grad_norm=1.0):
  return {
    "grad_norm": jnp.float32(grad_norm),
    "loss": jnp.float32(loss),
    "token_accuracy": jnp.float32(0.5),
    "gates": jnp.array([0.0, 0.25]),
    "tokens": jnp.int32(60),
  }


@pytest.fixture
def file(tmp_path):
  return epath.Path(tmp_path / "metrics.jsonl")


def recorder(file, step=0, log_every=1, shown=None, max_skipped=0, counts=Counts()):  # noqa: B008
  telemetry = Telemetry(file.parent / "telemetry.jsonl", step)
  telemetry.start()
  show = (lambda *_: None) if shown is None else (lambda *args: shown.append(args))
  blame = "See {}.".format
  return Recorder(LineFile(file, step), counts, log_every, max_skipped, telemetry, show, blame)


def run_steps(made, losses, first=1):
  for step, loss in enumerate(losses, start=first):
    made.add(step, metrics(loss), 0, 1e9)
  made.flush()


def test_a_line_has_the_values_of_its_step_and_nothing_of_the_clock(file):
  made = recorder(file)
  made.add(1, metrics(), 3, 1e9)
  made.flush()
  assert read_lines(file) == [
    {
      "step": 1, "loss": 1.0, "token_accuracy": 0.5, "gates": [0.0, 0.25], "grad_norm": 1.0,
      "tokens": 60, "failed_samples": 3, "skipped_steps": 0,
    }
  ]  # fmt: skip


def test_metrics_are_read_one_step_late(file):
  shown = []
  made = recorder(file, shown=shown)
  made.add(1, metrics(loss=3.0), 0, 0.0)
  assert shown == []
  made.add(2, metrics(loss=2.0), 2, 0.0)
  assert shown == [(1, "loss 3.0000, accuracy 0.500")]
  made.flush()
  made.flush()
  assert shown[1:] == [(2, "loss 2.0000, accuracy 0.500, 2 samples failed")]


def test_a_line_every_so_many_steps(file):
  run_steps(recorder(file, log_every=3), [1.0] * 7)
  assert [line["step"] for line in read_lines(file)] == [3, 6]


@pytest.mark.parametrize("rest", ["", '{"step": 5, "lo', '{"step": 5}\n\x00\x00'])
def test_resuming_drops_later_lines_and_a_torn_one(file, rest):
  file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + rest)
  made = recorder(file, step=2)
  run_steps(made, [1.0], first=3)
  lines = file.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"loss": float("nan")}, "step 7: loss is nan"),
    ({"loss": float("inf")}, "step 7: loss is inf"),
    ({"grad_norm": float("nan")}, "step 7: grad_norm is nan"),
  ],
)
def test_a_number_that_is_none_names_its_step_and_the_records(file, values, words):
  made = recorder(file)
  made.add(7, metrics(**values), 0, 0.0)
  with pytest.raises(UserError, match=words) as error:
    made.flush()
  assert "See 7." in str(error.value)
  assert read_lines(file) == []


def test_some_steps_in_a_row_may_be_skipped_and_are_counted(file):
  shown = []
  made = recorder(file, shown=shown, max_skipped=2)
  nan = float("nan")
  run_steps(made, [nan, nan, 1.0, nan])
  assert made.counts == Counts(0, skipped_steps=3, skipped_in_a_row=1)
  assert [line["skipped_steps"] for line in read_lines(file)] == [1, 2, 2, 3]
  assert [line["loss"] for line in read_lines(file)] == [None, None, 1.0, None]
  assert shown[-1][1].endswith("3 steps skipped")
  with pytest.raises(UserError, match="step 6: .* 3 steps in a row .*train.max_skipped is 2"):
    run_steps(made, [nan, nan], first=5)


def test_what_was_counted_before_an_interruption_counts(file):
  made = recorder(file, step=4, max_skipped=2, counts=Counts(0, 7, 2))
  with pytest.raises(UserError, match="3 steps in a row"):
    run_steps(made, [float("nan")], first=5)


def empty_batch():
  return collate([empty_row(Geometry(4, 8, 4, (8, 8), 1))])


def test_the_rate_is_that_of_the_step_though_steps_before_were_skipped():
  cfg = OptimizerConfig(0.1, 4, 12)
  optimizer, params = make_optimizer(cfg), nnx.State({"x": nnx.Param(jnp.ones(()))})
  opt_state = optimizer.init(params)
  for step in range(3):  # The second is skipped: see `make_train_step`.
    update, after = optimizer.update(params, opt_state, params)
    state = TrainState(jnp.int32(step), params, opt_state)
    _, got = instrument(lambda state, _: (state, {}), MODEL, cfg)(state, empty_batch())
    # Adam's step is of size 1 while gradients stay the same.
    np.testing.assert_allclose(-update["x"][...], got["learning_rate"], rtol=1e-5)
    opt_state = opt_state if step == 1 else after


@pytest.mark.parametrize(
  ("queries", "gates"), [("text-only", np.tanh([0.5, -2.0])), ("all", [0.5, -2.0])]
)
def test_the_rate_and_the_gates_are_those_that_the_step_ran_with(queries, gates):
  def step(state, batch):
    return dataclasses.replace(state, step=state.step + 1), {"loss": jnp.sum(batch.targets)}

  cfg = OptimizerConfig(0.1, 4, 12)
  opt_state = make_optimizer(cfg).init(nnx.State({}))
  opt_state = (*opt_state[:-1], opt_state[-1]._replace(count=jnp.int32(3)))
  adapters = {"warm_up": nnx.Param(jnp.array([[0.5], [-2.0]]))}
  state = TrainState(jnp.int32(3), nnx.State({"adapters": adapters}), opt_state)
  model = dataclasses.replace(MODEL, hybrid=HybridConfig(every=1, queries=queries))
  _, got = instrument(step, model, cfg)(state, empty_batch())
  assert got["loss"] == 0
  np.testing.assert_allclose(got["learning_rate"], 0.075, rtol=1e-6)
  np.testing.assert_allclose(got["gates"], gates, rtol=1e-6)
  fast_only = dataclasses.replace(MODEL, hybrid=None)
  state = dataclasses.replace(state, params=nnx.State({}))
  _, got = instrument(step, fast_only, cfg)(state, empty_batch())
  assert "gates" not in got
  assert (got["tokens"], got["frames"], got["samples"]) == (0, 0, 0)


class Bucket(MemoryFileSystem):
  """Google's buckets as fsspec shows them: what is opened to append is overwritten."""

  def _open(self, path, mode="rb", **kwargs):
    return super()._open(path, mode.replace("a", "w"), **kwargs)

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + path.removeprefix("s3://").strip("/")


def test_lines_and_other_small_files_lie_in_a_bucket_too(monkeypatch):
  monkeypatch.setattr(Bucket, "store", {})
  monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
  monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: Bucket())
  folder = epath.Path("s3://bucket/run")  # Whatever the kind: epath keeps its client.
  file = folder / "metrics.jsonl"
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # Step 3 is lost, and done again.
    lines = LineFile(file, start)
    for step in steps:
      lines.write({"step": step})
      lines.flush()
    lines.close()
  assert [line["step"] for line in read_lines(file)] == [1, 2, 3, 4]
  Scores(folder / "best.json", "loss").rate(2, {"loss": 1.0}, [1, 2])
  assert Scores(folder / "best.json", "loss") == {2: -1.0}
