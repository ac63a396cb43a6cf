# SPDX-License-Identifier: Apache-2.0
"""A language model and an encoder become one model: theirs stays, the rest is fresh and seeded."""

import dataclasses
import json

import numpy as np
import pytest
from checkpoints import official as by_hand
from checkpoints.official import CONFIG, TOWERS, convnext_shapes, random_tensors, vit_shapes
from flax import nnx
from safetensors.numpy import save_file

from slowfast_jax.checkpoints.convert import convert
from slowfast_jax.checkpoints.hf import load_hf, load_parts, open_parts
from slowfast_jax.checkpoints.store import load_export
from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.hybrid import adapters_from_decoder
from slowfast_jax.models.slowfast import SlowFast


def write(folder, config, tensors):
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / "model.safetensors")
  return folder


def language_model(folder, family="qwen2", dtype="float32", **changes):
  keys = [
    key for key in CONFIG if not key.startswith(("mm_", "cross_attn_", "fast_token_", "min_"))
  ]
  config = {**{key: CONFIG[key] for key in keys}, "model_type": family, **changes}
  shapes = by_hand.decoder_shapes(config, bias=family == "qwen2", norms=family == "qwen3")
  return write(folder, config, random_tensors(shapes, dtype))


@pytest.fixture
def siglip(tmp_path):
  shapes = {
    **vit_shapes("siglip"), "logit_scale": (1,), "logit_bias": (1,), "text_model.head.bias": (3,)
  }  # fmt: skip
  config = {"model_type": "siglip", "vision_config": TOWERS["siglip"]["file"]}
  return write(tmp_path / "siglip", config, random_tensors(shapes))


def assert_same(found, expected):
  found, expected = flatten(found), flatten(expected)
  assert set(found) == set(expected)
  for name in expected:
    np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), name)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_slow_keys_and_values_start_as_the_language_models(tmp_path, siglip, family):
  llm = language_model(tmp_path / "llm", family)
  export = load_parts(llm, siglip, every=2)
  model = SlowFast(export.model, rngs=nnx.Rngs(0))
  nnx.update(model, export.params)
  adapters_from_decoder(model.adapters, model.decoder, export.model.hybrid_layers)
  assert export.model.hybrid_layers == (0, 2)
  assert_same(nnx.state(model), export.params)
  np.testing.assert_array_equal(export.params["adapters"]["warm_up"][...], 0.0)


def test_fresh_parts_are_seeded_and_the_trained_ones_are_not(tmp_path, siglip):
  llm = language_model(tmp_path / "llm")
  first, again, other = (flatten(load_parts(llm, siglip, seed=s).params) for s in (1, 1, 2))
  changed = {name for name in first if not np.array_equal(first[name], other[name])}
  assert changed == {
    "projector.layers.0.kernel", "projector.layers.1.kernel", "adapters.gate.kernel"
  }  # fmt: skip
  assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_streamed_model_is_the_loaded_one_in_both_formats(tmp_path, siglip):
  llm = language_model(tmp_path / "llm", dtype="bfloat16")
  train_tokenizer(["which colour"], 290).save(llm)
  loaded = load_parts(llm, siglip)
  convert(open_parts(llm, siglip), tmp_path / "orbax", "orbax")
  convert(open_parts(llm, siglip), tmp_path / "hf", "huggingface")
  for export in (load_export(tmp_path / "orbax"), load_hf(tmp_path / "hf")):
    assert_same(export.params, loaded.params)
    assert (export.model, export.video, export.system) == (
      loaded.model, loaded.video, loaded.system
    )  # fmt: skip
    assert export.stop_ids == (7,)
    assert export.tokenizer.encode("which") == loaded.tokenizer.encode("which")
  assert flatten(loaded.params)["adapters.kv.kernel"].dtype == "bfloat16"
  assert flatten(loaded.params)["vision.position"].dtype == "float32"


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_a_convnext_of_timm_or_open_clip(tmp_path, prefix):
  shapes = {prefix + name: shape for name, shape in convnext_shapes(scale="gamma").items()}
  if prefix:
    shapes |= {"visual.head.proj.weight": (3, 24), "text.token_embedding.weight": (4, 4)}
  tensors = random_tensors(shapes)
  config = {"architecture": "convnext_xxlarge", "pretrained_cfg": {"input_size": [3, 64, 64]}}
  vision = write(tmp_path / "vision", config, tensors)
  llm = language_model(tmp_path / "llm")
  for path in (vision, vision / "model.safetensors"):
    export = load_parts(llm, path, num_frames=128)
    scale = flatten(export.params)["vision.stages.1.blocks.layer_scale"]
    np.testing.assert_array_equal(scale[1], tensors[f"{prefix}stages.1.blocks.1.gamma"])
  compressor = export.model.compressor
  assert dataclasses.astuple(compressor) == (1, 2, 4, 1, 16)  # A grid of 2 x 2 is not pooled.
  assert export.video.num_frames == 128


def test_options_reach_the_model(tmp_path, siglip):
  llm = language_model(tmp_path / "llm")
  model = load_parts(
    llm, siglip, gate="dynamic", queries="all", projector="linear", select_layer=-1, num_frames=96
  ).model
  assert (model.hybrid.gate, model.hybrid.queries, model.projector) == ("dynamic", "all", "linear")
  assert model.vision.select_layer == -1
  assert (model.compressor.temporal_stride, model.compressor.video_pooling_stride) == (6, 2)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"num_frames": 65}, r"num_frames must be one of \[64, 96, 128\], got 65"),
    ({"gate": "open"}, "gate must be one of"),
    ({"projector": "qformer"}, "projector must be"),
    ({"select_layer": -9}, "select_layer -9 does not exist"),
  ],
)
def test_wrong_options_are_explained(tmp_path, siglip, options, words):
  with pytest.raises(UserError, match=words):
    load_parts(language_model(tmp_path / "llm"), siglip, **options)


def test_folders_that_are_not_such_parts_are_explained(tmp_path, siglip):
  llm = language_model(tmp_path / "llm")
  with pytest.raises(UserError, match='config.json: model_type must be one of "qwen2", "qwen3"'):
    load_parts(siglip, siglip)
  with pytest.raises(UserError, match="is of kind 'qwen2'; known are siglip"):
    load_parts(llm, llm)
  config = json.loads((llm / "config.json").read_text())
  (llm / "config.json").write_text(json.dumps({**config, "intermediate_size": 21}))
  with pytest.raises(UserError, match="12 of another shape"):
    load_parts(llm, siglip)
