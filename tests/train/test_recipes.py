# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe is a run that fits a pod, and the twins of its stages learn."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.config import load_config
from slowfast_jax.errors import UsageError
from slowfast_jax.sharding import MESH_AXES
from slowfast_jax.train.loop import train
from slowfast_jax.train.optimizer import schedule, split_frozen
from slowfast_jax.train.plan import make_plan
from tests.train.tiny_run import overrides, write_data

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
  file.name for stage in ("pretrain", "sft") for file in CONFIGS.glob(f"{stage}_*.py")
)


@pytest.fixture
def pod(monkeypatch):
  """A mesh of 64 devices that are not there: shapes and places need no more."""
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  mesh = jax.sharding.AbstractMesh((1, 64, 1, 1), MESH_AXES, axis_types=auto)
  monkeypatch.setattr("slowfast_jax.train.plan.make_mesh", lambda sizes, devices: mesh)


def test_the_released_recipes_are_there():
  released = {"pretrain_qwen2_7b_convnext_64f.py"}
  released |= {f"sft_qwen2_7b_convnext_{frames}f.py" for frames in (64, 96, 128)}
  assert released <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_a_pod(name, pod):
  plan = make_plan(load_config(CONFIGS / name))
  state = plan.abstract_state()
  for path, x in flatten(state).items():
    size, part = math.prod(x.shape) * 4, math.prod(x.sharding.shard_shape(x.shape)) * 4
    assert part * 32 <= size or size < 64e6, f"{path} {x.shape} is on every device"
  video, image = plan.abstract_batches()
  num_frames = int(name.split("_")[-1].removesuffix("f.py"))
  assert video.frames.shape[1] == num_frames
  assert video.pooling.shape[1:] == (16, num_frames)
  assert image.frames.shape[1] == 1
  assert video.frames.sharding.shard_shape(video.frames.shape)[0] == 4
  learning, _ = split_frozen(state.params, plan.optimizer)
  parts = {path.split(".")[0] for path in flatten(learning)}
  rate = schedule(plan.optimizer)(plan.config.optimizer.warmup_steps)
  if name.startswith("pretrain"):
    assert parts == {"projector", "adapters"}
    np.testing.assert_allclose(rate, 1e-3, rtol=1e-5)
    assert plan.optimizer.groups[1] == ("^adapters", 0.2)
  else:
    assert parts == {"vision", "projector", "decoder", "adapters"}
    np.testing.assert_allclose(rate, 2e-5, rtol=1e-5)


def test_warm_up_is_three_percent_of_the_steps():
  config = load_config(CONFIGS / RECIPES[0], ["--config.train.steps=5000"])
  assert config.optimizer.warmup_steps == 150


def fields(config, prefix=""):
  for name, value in config.items():
    nested = hasattr(value, "items") and name not in ("vision", "decoder", "compressor", "hybrid")
    yield from fields(value, f"{prefix}{name}.") if nested else [prefix + name]


def test_a_recipe_has_the_fields_of_every_training_config():
  demo = load_config(CONFIGS / "demo.py")
  assert sorted(fields(load_config(CONFIGS / RECIPES[0]))) == sorted(fields(demo))


def test_another_size_is_an_error():
  with pytest.raises(UsageError, match="small: no such size of a recipe; choose from"):
    load_config(f"{CONFIGS / RECIPES[0]}:small")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("tower", ["siglip", "convnext"])
def test_the_twins_of_both_stages_run_one_after_the_other_and_learn(tower, tmp_path):
  data = write_data(tmp_path / "data")
  init = ""
  for stage in ("pretrain", "sft"):
    more = (f"train.init_from={init}", "mesh.fsdp=1", "mesh.data=-1")
    config = load_config(
      f"{CONFIGS / f'{stage}_qwen2_7b_{tower}_64f.py'}:tiny", overrides(data, *more)
    )
    assert train(config, str(tmp_path / stage)) == 0
    lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == config.train.steps
    # Of stage 1 little may be asked: a random decoder that stays as it is.
    assert np.mean(losses[-5:]) < (0.97 if stage == "pretrain" else 0.7) * np.mean(losses[:3])
    init = tmp_path / stage / "export"
