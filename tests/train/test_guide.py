# SPDX-License-Identifier: Apache-2.0
"""The guides of training are real: their commands make a plan, the fields that they name exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import tests.train.tiny_run  # noqa: F401  # Lets a state be built of shapes, as a plan does.
from slowfast_jax.cli import main as slowfast
from slowfast_jax.config import load_config
from slowfast_jax.defaults import training_defaults
from slowfast_jax.train.options import options_of
from slowfast_jax.train.plan import make_plan

ROOT = Path(__file__).parents[2]
GUIDES = {name: (ROOT / f"docs/{name}.md").read_text("utf-8") for name in ("training", "recipes")}
DEFAULTS = training_defaults()


def commands():
  for name, guide in GUIDES.items():
    for block in re.findall(r"^```bash\n(.*?)^```", guide, re.MULTILINE | re.DOTALL):
      for line in block.replace("\\\n", " ").splitlines():
        yield pytest.param(line, id=f"{name}: {line[:70]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_has_options_that_exist_and_trains_a_model_that_can_be(line, monkeypatch):
  monkeypatch.chdir(ROOT)
  program, verb, *words = shlex.split(line.replace("=STEPS", "=1000"))
  assert program == "slowfast"
  args = slowfast._parse(verb, importlib.import_module(f"slowfast_jax.cli.{verb}"), words)
  if verb == "train":
    config = load_config(args.config, args.overrides)
    options_of(config)
    # One device stands for all that a recipe wants; rows are then no matter.
    config.mesh.data, config.mesh.fsdp = -1, 1
    make_plan(config)


@pytest.mark.parametrize("name", GUIDES)
def test_every_field_that_a_guide_names_exists(name):
  sections = [section for section in DEFAULTS if hasattr(DEFAULTS[section], "items")]
  named = re.findall(rf"`(?:--config\.)?((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)", GUIDES[name])
  assert len(named) > 5
  for field in named:
    section, *rest = field.split(".")
    assert rest[0] in {*DEFAULTS[section], *OF_ALL_CONFIGS}, f"docs/{name}.md: {field}"


# What every config must set, so there is no default of it.
OF_ALL_CONFIGS = ("preset", "batch_size", "learning_rate", "steps", "checkpoint_every")


def test_every_exit_code_of_the_guide_is_one_of_the_command():
  codes = re.findall(r"^\| (\d+) \|", GUIDES["training"], re.MULTILINE)
  known = (slowfast.DONE, slowfast.FAILED, slowfast.USAGE, slowfast.PREEMPTED)
  assert tuple(map(int, codes)) == known
