# SPDX-License-Identifier: Apache-2.0
"""`slowfast compile` with the TPU compiler itself, on a tiny model."""

import inspect
import json

import jax
import pytest

from slowfast_jax.cli.main import main
from slowfast_jax.compile.advice import advise
from slowfast_jax.compile.programs import Request
from slowfast_jax.compile.what_if import combinations
from slowfast_jax.config import load_config
from slowfast_jax.errors import UsageError
from slowfast_jax.generate.programs import Decoding, Visual
from slowfast_jax.generate.prompts import Prompts
from slowfast_jax.generate.sampling import Sampling
from slowfast_jax.models.cache import KVCache
from slowfast_jax.models.hybrid import SlowKV

COMMAND = ["compile", "--config=configs/tiny.py", "--topology=v5e:2x2"]
TOO_WIDE = 2**23


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """A model that fits and one that no memory holds; and the same again."""
  folder = tmp_path_factory.mktemp("compile")
  words = [f"model.decoder.mlp_width={TOO_WIDE},32"]
  command = [*COMMAND, f"--cache={folder / 'cache'}", "--what-if", *words]
  codes = [main([*command, "--json", str(folder / f"{i}.json")]) for i in range(2)]
  return codes, [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def test_points_that_run_come_first(sweep):
  (code, _), (points, _) = sweep
  assert code == 0
  assert points[0]["changes"] == ["model.decoder.mlp_width=32"]
  assert points[0]["summary"]["fits"]


def test_what_was_compiled_is_not_compiled_again(sweep):
  _, (first, second) = sweep
  assert first == second


def test_what_does_not_fit_is_told_with_what_would_help(sweep):
  _, (points, _) = sweep
  (program,) = points[1]["summary"]["programs"]
  assert not program["fits"]
  assert program["hbm_used"] > program["hbm_limit"] == 15.75 * 2**30
  # Parameters and moments, which four devices may share instead of each having them all.
  assert any("--config.mesh.fsdp=4" in line for line in program["advice"])


def test_the_figures_of_a_step(sweep):
  _, (points, _) = sweep
  (step,) = points[0]["summary"]["programs"]
  assert step["name"] == "step"
  assert step["mesh"]["data"] == 4
  assert sum(step["hbm_by_part"].values()) == pytest.approx(step["hbm_used"], rel=0.2)
  assert step["cost"]["flops"] > step["model_flops_per_device"] > 0
  low, high = step["estimate"]["mfu"]
  assert 0 < low <= high < 1
  reduced = [one for one in step["cost"]["collectives"] if one["axes"] == "data"]
  assert reduced
  assert all(one["sent"] > 0 for one in reduced)
  # Attention is the platform's kernel, and no array is positions by positions.
  kernels = " ".join(step["cost"]["kernels"])
  assert "splash" in kernels
  assert "slow_cross_attention" in kernels


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_the_step_of_a_recipe_compiles_for_other_chips(topology, tmp_path):
  recipe = "configs/sft_qwen2_7b_siglip_64f.py:tiny"
  words = [f"--config={recipe}", f"--topology={topology}", "--json", str(tmp_path / "step.json")]
  assert main(["compile", *words, "--config.train.remat=minimal"]) == 0
  (step,) = json.loads((tmp_path / "step.json").read_text())["programs"]
  assert step["fits"]
  kernels = step["cost"]["kernels"]
  assert "slow_cross_attention" in " ".join(kernels)
  # What attention's backward pass needs was kept: it does not run forward again.
  forward, backward = (
    sum(count for name, count in kernels.items() if f"splash_mha_{kind}" in name)
    for kind in ("fwd", "dkv")
  )
  assert forward == backward > 0


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--topology=v5q:2x2"], "expected GENERATION:SHAPE"),
    (["--config.data.batch_size=3"], "data.batch_size must be a multiple of"),
    (["--what-if", "train.rematt=full"], "no field 'train.rematt'"),
    (["--json", "no/such/folder.json"], "there is no such folder"),
    (["--what-if", "train.remat"], "expected FIELD=VALUE,VALUE"),
  ],
)
def test_wrong_words_are_told(words, message, capsys):
  assert main([*COMMAND, *words]) in (1, 2)
  assert message in capsys.readouterr().err


def test_advice_on_answering_names_a_mesh_and_less_of_what_is_asked_for(monkeypatch):
  # Shapes instead of arrays, which no array annotation describes.
  for kind in (Decoding, KVCache, Prompts, Sampling, SlowKV, Visual):
    monkeypatch.setattr(kind, "__init__", inspect.unwrap(kind.__init__))
  config = load_config("configs/tiny.py", ["--config.mesh.data=8", "--config.mesh.fsdp=1"])
  request = Request(rows=2, text=64, new_tokens=2**16, frames=2 * config.data.num_frames)
  lines = advise(config, jax.devices(), "decode", request, missing=1.0)
  assert any(line.startswith("--config.mesh.data=1 ") and "enough" in line for line in lines)
  assert any(line.startswith(f"--new_tokens={2**15}: ") for line in lines)
  assert any(line.startswith(f"--frames={config.data.num_frames}: ") for line in lines)


def test_combinations():
  assert combinations(["a.b=1,2", "c=x"]) == [("a.b=1", "c=x"), ("a.b=2", "c=x")]
  with pytest.raises(UsageError):
    combinations(["a=1,,2"])
