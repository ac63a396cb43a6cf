# SPDX-License-Identifier: Apache-2.0
"""A model that has really learned: what it knows of the flashes comes through its slow tokens."""

import pytest

from tests.conftest import Shell

# Half of what `slowfast demo` takes; and a tenth of that for the fast-only model, which has nothing
# to learn from: in a whole demo it does not leave the level of guessing either.
CODE = """
import contextlib, dataclasses, pathlib
from slowfast_jax.demo.run import STAGES, Demo, Size

size = Size(
  num_train=420, num_test=40, num_stills=2000, align_steps=200, stills_steps=450, steps=340
)
watch = lambda title, unit: contextlib.nullcontext(lambda *args, **kwargs: None)
demo = Demo(pathlib.Path("demo"), size, 0, watch)
demo.make_data()
demo.prepare()
demo.align()
for stage in STAGES:
  if stage == "fast_only_stills":
    demo.size = dataclasses.replace(size, stills_steps=50, steps=40)
  demo.train(stage)
demo.report()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  shell = Shell(tmp_path_factory.mktemp("trained"), optimised=True)
  outcome = shell.python("-c", CODE)
  assert outcome.returncode == 0, outcome.stderr[-4000:]
  return shell.json("demo/report.json")


@pytest.mark.slow
def test_the_gain_comes_from_the_slow_tokens(report):
  """Without its slow tokens the trained slow-fast model is no better than the fast-only one."""
  # An accuracy of one third, out of 120 answers, has a standard deviation of 0.043, and the
  # difference of two 0.061; the bounds are three of them.
  assert report["num_questions"] == 120
  assert report["slow_fast_accuracy"] - report["fast_only_accuracy"] > 0.3
  assert report["zeroed_slow_accuracy"] - report["fast_only_accuracy"] < 0.18
  assert abs(report["fast_only_accuracy"] - report["chance"]) < 0.13


@pytest.mark.slow
def test_right_answers_come_from_the_event(report):
  assert report["attention_hits"] > 0.85
