# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl has every line once, and a run that diverges ends with the step's number."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from slowfast_jax.errors import UserError
from slowfast_jax.train.metrics import Recorder, instrument, read_metrics
from tests.train.tiny_run import TrainState


def metrics(loss=1.0, grad_norm=1.0):
  return {
    "grad_norm": jnp.float32(grad_norm),
    "loss": jnp.float32(loss),
    "token_accuracy": jnp.float32(0.5),
    "gates": jnp.array([0.0, 0.25]),
  }


@pytest.fixture
def file(tmp_path):
  return epath.Path(tmp_path / "metrics.jsonl")


def recorder(file, step=0, log_every=1, shown=None):
  made = Recorder(file, step, log_every, 4, lambda *args: shown is None or shown.append(args))
  made.start()
  return made


def test_a_line_has_the_values_of_its_step(file):
  made = recorder(file)
  with made.waiting_for_data():
    pass
  made.add(1, metrics(), 3)
  made.flush()
  made.close()
  (line,) = read_metrics(file)
  assert line["step_seconds"] > line["data_stall_seconds"] >= 0
  assert line["samples_per_second"] > 0
  assert {name: line[name] for name in list(line)[:5]} == {
    "step": 1, "loss": 1.0, "token_accuracy": 0.5, "gates": [0.0, 0.25], "grad_norm": 1.0,
  }  # fmt: skip
  assert line["failed_samples"] == 3


def test_metrics_are_read_one_step_late(file):
  shown = []
  made = recorder(file, shown=shown)
  made.add(1, metrics(loss=3.0), 0)
  assert [step for step, _ in shown] == [0]
  made.add(2, metrics(loss=2.0), 2)
  assert shown[1:] == [(1, "loss 3.0000, accuracy 0.500")]
  made.flush()
  made.flush()
  assert shown[2:] == [(2, "loss 2.0000, accuracy 0.500, 2 samples failed")]


def test_a_line_every_so_many_steps(file):
  made = recorder(file, log_every=3)
  for step in range(1, 8):
    made.add(step, metrics(), 0)
  made.flush()
  assert [line["step"] for line in read_metrics(file)] == [3, 6]


@pytest.mark.parametrize("rest", ["", '{"step": 5, "lo', '{"step": 5}\n\x00\x00'])
def test_resuming_drops_later_lines_and_a_torn_one(file, rest):
  file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + rest)
  made = recorder(file, step=2)
  made.add(3, metrics(), 0)
  made.flush()
  made.close()
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
def test_a_number_that_is_none_names_its_step(file, values, words):
  made = recorder(file)
  made.add(7, metrics(**values), 0)
  with pytest.raises(UserError, match=words):
    made.add(8, metrics(), 0)
  assert read_metrics(file) == []


def test_the_rate_and_the_gates_are_those_that_the_step_ran_with():
  def step(state, batch):
    return TrainState(state.step + 1, state.params, ()), {"loss": batch}

  adapters = {"warm_up": nnx.Param(jnp.array([[0.5], [-2.0]]))}
  state = TrainState(jnp.int32(3), nnx.State({"adapters": adapters}), ())
  _, got = instrument(step, lambda step: 0.5 * step)(state, 1.0)
  assert got["loss"] == 1.0
  np.testing.assert_allclose(got["learning_rate"], 1.5)
  np.testing.assert_allclose(got["gates"], np.tanh([0.5, -2.0]), rtol=1e-6)
  _, got = instrument(step, lambda step: 0.5)(TrainState(jnp.int32(0), nnx.State({}), ()), 1.0)
  assert "gates" not in got
