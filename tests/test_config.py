# SPDX-License-Identifier: Apache-2.0
"""A config file comes back locked, overrides keep every field's type, and typos are named."""

import pytest

from slowfast_jax.config import find_config, load_config
from slowfast_jax.demo.run import STAGES as DEMO_STAGES
from slowfast_jax.errors import UsageError, UserError

EXAMPLE = """
import ml_collections

def get_config():
  config = ml_collections.ConfigDict()
  config.name = "example"
  config.remat = True
  config.limit = ml_collections.config_dict.placeholder(int)
  config.note = None
  config.strides = (1, 2)
  config.rates = [0.5, 1.0]
  config.tasks = ("mlvu",)
  config.optimizer = dict(learning_rate=1e-3, warmup_steps=10)
  config.total_steps = 100
  config.decay_steps = config.get_ref("total_steps") - 10
  return config
"""


@pytest.fixture
def example(tmp_path):
  file = tmp_path / "example.py"
  file.write_text(EXAMPLE)
  return file


@pytest.mark.parametrize(
  ("override", "field", "value"),
  [
    ("name=a=b c", "name", "a=b c"),
    ("name=", "name", ""),
    ("remat=false", "remat", False),
    ("remat=True", "remat", True),
    ("limit=7", "limit", 7),
    ("note=gs://bucket", "note", "gs://bucket"),
    ("note=(1, 'a')", "note", (1, "a")),
    ("strides=4,8,16", "strides", (4, 8, 16)),
    ("strides=[4]", "strides", (4,)),
    ("rates=(1, 2.5)", "rates", [1.0, 2.5]),
    ("tasks=mlvu,egoschema", "tasks", ("mlvu", "egoschema")),
    ("tasks=('mlvu', 'nextqa_mc')", "tasks", ("mlvu", "nextqa_mc")),
    ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
    ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("optimizer.warmup_steps=1_000", "optimizer.warmup_steps", 1000),
  ],
)
def test_override_sets_a_value_of_the_fields_type(example, override, field, value):
  config = load_config(example, [f"--config.{override}"])
  for part in field.split("."):
    config = config[part]
  assert config == value
  assert type(config) is type(value)


def test_overrides_reach_fields_that_are_computed_from_others(example):
  config = load_config(example, ["--config.total_steps=50", "--config.total_steps=60"])
  assert (config.total_steps, config.decay_steps) == (60, 50)


def test_config_is_locked(example):
  config = load_config(example)
  with pytest.raises(AttributeError):
    config.optimizer.learning_rat = 1.0


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("--config.optimizer.learning_rat=1", ["optimizer.learning_rat", "optimizer.learning_rate"]),
    ("--config.learning_rate=1", ["optimizer.learning_rate"]),
    ("--config.optimiser.warmup_steps=1", ["optimizer.warmup_steps"]),
    ("--config.name.x=1", ["no field 'name.x'"]),
    ("--config.zzzzzzzz=1", ["It has: decay_steps, limit"]),
    ("--config.optimizer=1", ["section", "optimizer.learning_rate, optimizer.warmup_steps"]),
    ("--config.total_steps=ten", ["expected int", "total_steps", "now 100", "'ten'"]),
    ("--config.total_steps=1.5", ["expected int"]),
    ("--config.total_steps=", ["expected int"]),
    ("--config.optimizer.learning_rate=fast", ["expected float", "optimizer.learning_rate"]),
    ("--config.remat=maybe", ["expected bool"]),
    ("--config.strides=1", ["expected tuple of int"]),
    ("--config.strides=1,a", ["expected tuple of int"]),
    ("--config.strides=1,2.5", ["expected tuple of int"]),
    ("--config.rates=a", ["expected list of float"]),
    ("--config.remat", ["expected --config.SECTION.FIELD=VALUE"]),
  ],
)
def test_wrong_override_names_field_expected_and_got(example, override, words):
  with pytest.raises(UsageError) as error:
    load_config(example, [override])
  for word in [override, *words]:
    assert word in str(error.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("x = 1", "get_config()"),
    ("def get_config():\n  return {}", "got dict"),
    ("def get_config(:", "example.py:1: not valid Python"),
  ],
)
def test_file_that_is_no_config(example, text, words):
  example.write_text(text)
  with pytest.raises(UserError, match="example") as error:
    load_config(example)
  assert words in str(error.value)


def test_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped = find_config("configs/demo.py")
  assert shipped.is_file()
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "demo.py").write_text(EXAMPLE)
  assert load_config("configs/demo.py").name == "example"  # The user's own file comes first.


def test_missing_config_names_the_nearest_shipped_one():
  with pytest.raises(UserError, match=r"configs/dmeo\.py.*Did you mean configs/demo\.py"):
    load_config("configs/dmeo.py")


STAGES = """
import ml_collections

def get_config(stage="first"):
  return ml_collections.ConfigDict({"stage": stage})
"""


def test_what_follows_the_colon_goes_to_get_config(example):
  example.write_text(STAGES)
  assert load_config(example).stage == "first"
  assert load_config(f"{example}:second").stage == "second"
  assert load_config(f"{example}:second", ["--config.stage=third"]).stage == "third"
  assert load_config(f"{example}:a:b").stage == "a:b"


def test_an_argument_that_get_config_does_not_take_is_named(example):
  with pytest.raises(UsageError, match="example.py: get_config.* does not fit .*'second'"):
    load_config(f"{example}:second")
  example.write_text("def get_config(stage): pass")
  with pytest.raises(UsageError, match="does not fit no argument.*stage"):
    load_config(example)


@pytest.mark.parametrize("stage", ["", *(f":{stage}" for stage in DEMO_STAGES)])
def test_the_demo_has_its_stages(stage):
  config = load_config(f"configs/demo.py{stage}", ["--config.train.steps=7"])
  assert config.train.steps == 7
  assert config.model.slow == (not stage.startswith(":fast_only"))
  assert (config.data.num_frames == 1) == stage.endswith("_stills")


def test_an_unknown_stage_is_named():
  with pytest.raises(UsageError, match="demo.py:fast: no such stage; choose from"):
    load_config("configs/demo.py:fast")
