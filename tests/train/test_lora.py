# SPDX-License-Identifier: Apache-2.0
"""Adapters learn, the decoder stays as it is, and an export has them in its kernels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

import slowfast_jax as sf
from slowfast_jax.checkpoints.store import Checkpoints
from slowfast_jax.checkpoints.trees import flatten, unflatten
from slowfast_jax.errors import UserError
from slowfast_jax.models.lora import LORA, LoraConfig, merge_lora
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.train.loop import export, train
from slowfast_jax.train.plan import make_plan
from slowfast_jax.train.setup import initial_state, open_setup
from tests.models import tiny
from tests.train.tiny_run import tiny_config, write_data

SIZE = ("model.lora.rank=2", "model.lora.alpha=8.0")


# One layer, which is hybrid: compiling is what the test takes time for.
PLAIN = tiny.config(
  vision={"num_layers": 1, "select_layer": -1},
  decoder={"num_layers": 1},
  hybrid={"every": 1, "max_depth": 1},
)


@functools.cache
def logits_of(cfg):
  """A program that runs once or twice, so it is not worth optimising."""
  batch, _ = tiny.batch_of(tiny.ROWS[:2], tiny.geometry_of(cfg))

  def of(params):
    model = nnx.merge(graphdef_of(cfg), params)
    return model.decoder.logits(model(batch))

  return jax.jit(of, compiler_options={"xla_backend_optimization_level": 0})


def test_merged_kernels_give_the_logits_of_kernels_and_adapters():
  cfg = dataclasses.replace(PLAIN, lora=LoraConfig(rank=2, alpha=4.0))
  params, like = tiny.random_params(cfg, 0), tiny.random_params(PLAIN, 0)
  expected = logits_of(cfg)(params)
  merged = unflatten(like, merge_lora(flatten(params), cfg.lora))
  np.testing.assert_allclose(logits_of(PLAIN)(merged), expected, rtol=1e-4, atol=1e-4)
  own = unflatten(like, {name: x for name, x in flatten(params).items() if LORA not in name})
  assert np.abs(logits_of(PLAIN)(own) - expected).max() > 0.1, "adapters that do nothing"


@pytest.mark.usefixtures("one_device")
def test_a_run_trains_adapters_alone_and_exports_them_merged(tmp_path):
  data = write_data(tmp_path / "data")
  config = tiny_config(data, *SIZE, "train.steps=4", "train.checkpoint_every=2", "train.keep=2")
  assert train(config, str(tmp_path / "run")) == 0

  setup = open_setup(config)
  before, after = flatten(initial_state(setup).params), {}
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2)
  restored = checkpoints.restore(setup.abstract_state(), lambda run: None)
  checkpoints.close()
  after = flatten(restored.state.params)
  for name in before:
    same = np.array_equal(before[name], after[name])
    assert same == (name.startswith("decoder") and LORA not in name), name
  remembered = [name for name in flatten(restored.state.opt_state) if ".decoder." in name]
  assert remembered
  assert all(LORA in name for name in remembered)

  exported = sf.load(tmp_path / "run")
  assert exported.config.lora is None
  found = flatten(exported.export.params)
  assert list(found) == [name for name in before if LORA not in name]
  for name, value in merge_lora(after, setup.model.lora).items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
    learned = f"{name.removesuffix('.kernel')}{LORA}lora_b" in after
    assert np.array_equal(found[name], after[name]) != learned, name
  export(config, str(tmp_path / "run"), "2", lambda line: None)
  earlier = flatten(sf.load(tmp_path / "run").export.params)
  assert not np.array_equal(
    earlier["decoder.layers.attention.q.kernel"], found["decoder.layers.attention.q.kernel"]
  )


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("model.lora.rank=-1", "model.lora: rank must be at least 1, got -1"),
    ("model.lora.alpha=0.0", "model.lora: alpha must be above 0, got 0.0"),
    ("model.lora.modules=('q', 'o')", "model.lora: modules must be some of .*, got .*'o'"),
    ("optimizer.groups=(('^vision', 1.0),('', 0.0))", "freezes the adapters of model.lora"),
  ],
)
def test_a_field_that_makes_no_sense_is_named(tmp_path, field, words):
  with pytest.raises(UserError, match=words):
    make_plan(tiny_config(tmp_path, *SIZE, field))
