# SPDX-License-Identifier: Apache-2.0
"""Facts of a checkpoint, told without reading its tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import slowfast_jax as sf
from slowfast_jax.checkpoints.describe import describe_checkpoint, model_facts, tokens_of
from slowfast_jax.checkpoints.parts import PartsReader
from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.models.presets import PRESETS
from tests.generate.tiny import make_export
from tests.models.tiny import config


def facts_of(text):
  """The description as a dictionary; lines without a name go on with the last one."""
  found, name = {}, ""
  for line in text.splitlines()[1:]:
    name = line[:15].strip() or name
    found[name] = found.get(name, "") + line[15:]
  return found


@pytest.fixture(scope="module")
def export():
  return dataclasses.replace(make_export(), max_length=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, export):
  folder = tmp_path_factory.mktemp("describe")
  save_export(folder / "run/export", export)
  return folder


def test_an_export_and_the_run_that_has_it(folder, export, monkeypatch):
  def read(*_):
    raise AssertionError("a tensor was read")

  monkeypatch.setattr(PartsReader, "pieces", read)
  facts = facts_of(describe_checkpoint(folder / "run/export"))
  count = sum(leaf.size for leaf in jax.tree.leaves(export.params))
  assert export.model.num_params == count
  assert facts["parameters"].startswith(f"{count:,}: vision ")
  assert facts["preset"] == "none"
  assert facts["stored as"] == "float32"
  assert facts["size"].startswith(f"{4 * count / 1e3:.3g} kB of parameters, ")
  assert facts["hybrid layers"] == "0, 2; gate dynamic-tanh-warmup; queries text-only"
  assert "SigLIP ViT, 16 pixels to 4 x 4 tokens of 16" in facts["vision"]
  assert "3 layers of width 32, 4 heads of 8 over 2, MLP 32, vocabulary 320" in facts["decoder"]
  assert "biases on q, k, v" in facts["decoder"]
  assert "8 frames (uniform), made square as siglip" in facts["video"]
  # 8 frames, of which 4 are sampled, of 4 x 4 tokens that are pooled to 2 x 2.
  assert "32 slow and 16 fast tokens; a still image: 16 slow and 16 fast" in facts["video"]
  assert facts["length"] == "2,048 positions"
  assert facts["tokenizer"] == f"{export.tokenizer.vocab_size} ids, ChatML"
  assert facts["system prompt"] == "'Be brief.'"
  (folder / "run/checkpoints").mkdir()
  (folder / "run/checkpoints/state").write_bytes(b"0" * 10**6)
  assert describe_checkpoint(folder / "run") == describe_checkpoint(folder / "run/export")


def test_a_hugging_face_folder(folder, export):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), export.params)
  mixed = dataclasses.replace(export, params=half, tokenizer=None)
  sf.save(sf.VLM(mixed, dtype="bfloat16"), folder / "hub", format="huggingface")
  facts = facts_of(describe_checkpoint(folder / "hub"))
  count = export.model.num_params
  assert facts["parameters"].startswith(f"{count:,}: ")
  assert facts["stored as"] == "bfloat16"
  assert facts["size"].startswith(f"{2 * count / 1e3:.3g} kB of parameters")
  assert facts["tokenizer"].startswith("none")


def test_presets_are_recognised():
  released = PRESETS["slowfast-qwen2-0.5b-convnext-576-64f"]
  assert dict(model_facts(released))["preset"] == "slowfast-qwen2-0.5b-convnext-576-64f"
  other = dataclasses.replace(released, projector="linear")
  assert dict(model_facts(other))["preset"] == (
    "none as a whole; decoder qwen2-0.5b or qwen2.5-0.5b, vision convnext-576"
  )


def test_models_without_a_slow_path():
  assert dict(model_facts(config(hybrid=None)))["hybrid layers"].startswith("none")


def test_tokens_of_a_released_model():
  """64 frames of 81 slow tokens, 16 of which are fast frames."""
  cfg = next(cfg for name, cfg in PRESETS.items() if name.endswith("7b-convnext-576-64f"))
  assert tokens_of(cfg, 64) == "5,184 slow and 1,296 fast tokens"
  assert tokens_of(cfg, 1) == "324 slow and 324 fast tokens"
