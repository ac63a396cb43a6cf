# SPDX-License-Identifier: Apache-2.0
"""config.json: every value that semantics section 7 names is understood, any other an error."""

import dataclasses
import json

import pytest
from checkpoints.official import CONFIG, TOWERS, convnext_shapes, tower_shapes
from etils import epath
from flax import nnx

from slowfast_jax.checkpoints.export import Export, VideoConfig
from slowfast_jax.checkpoints.hf_config import official_files, parse_decoder, parse_official
from slowfast_jax.checkpoints.hf_tower import tower_config
from slowfast_jax.checkpoints.json_fields import Fields
from slowfast_jax.errors import UserError
from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.presets import DECODERS, PRESETS
from slowfast_jax.models.presets import TOWERS as PRESET_TOWERS
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.vit import ViTConfig

FOLDER = epath.Path("/somewhere")


def parse(tower="convnext", described=None, shapes=None, **changes):
  config = {**CONFIG, **TOWERS[tower]["config"], **changes}
  files = {"config.json": json.dumps(config).encode()}
  described = TOWERS[tower]["file"] if described is None else described
  if described:
    files["vision_tower_config.json"] = json.dumps(described).encode()
  return parse_official(files, FOLDER, tower_shapes(tower) if shapes is None else shapes)


def test_the_released_settings_are_read():
  export = parse()
  model = export.model
  compressor = model.compressor
  assert (compressor.sampling_stride, compressor.temporal_stride) == (1, 4)
  assert (compressor.video_pooling_stride, compressor.min_fast_frames) == (2, 16)
  assert (model.hybrid.every, model.hybrid.max_depth) == (3, 4)
  assert export.video == VideoConfig(64, "fps", 2.0, "clip")
  assert (export.max_length, export.stop_ids) == (4096, (7,))


@pytest.mark.parametrize("flash", ["", "-flashattn"])
@pytest.mark.parametrize(
  ("name", "queries"),
  [
    ("text-only-vanilla", "text-only"),
    ("text-only-vanilla-masksystem", "text-only-masksystem"),
    ("vanilla", "all"),
  ],
)
def test_every_implementation_is_understood(name, queries, flash):
  assert parse(cross_attn_implementation=name + flash).model.hybrid.queries == queries


@pytest.mark.parametrize("gate", ["dynamic", "dynamic-tanh", "dynamic-tanh-warmup"])
def test_every_gate_is_understood(gate):
  assert parse(cross_attn_gating_type=f"whole-{gate}").model.hybrid.gate == gate


@pytest.mark.parametrize(
  ("strides", "frames"), [((1, 4), 64), ((1, 6), 96), ((2, 4), 128), ((3, 3), 64)]
)
def test_strides_tell_the_frames_of_the_released_models(strides, frames):
  found = parse(
    fast_token_temporal_sampling_stride=strides[0], fast_token_temporal_stride=strides[1]
  )
  assert found.video.num_frames == frames


def test_strides_that_are_not_there_are_one():
  absent = {
    "fast_token_temporal_sampling_stride": None,
    "fast_token_temporal_stride": None,
    "fast_token_spatial_stride": None,
    "mm_video_pooling_stride": None,
  }
  compressor = parse(**absent).model.compressor
  assert dataclasses.astuple(compressor)[:4] == (1, 1, 1, 1)


def test_our_own_section_is_how_videos_are_read():
  section = {"video": {"num_frames": 9, "sampler": "uniform"}, "system": "Be brief."}
  export = parse(slowfast_jax=section)
  assert (export.video, export.system) == (VideoConfig(9, "uniform", 2.0, "clip"), "Be brief.")


@pytest.mark.parametrize(
  ("key", "value", "expected"),
  [
    ("cross_attn_gating_type", "whole-static", '"whole-dynamic", "whole-dynamic-tanh"'),
    ("cross_attn_implementation", "perceiver", '"text-only-vanilla"'),
    ("cross_attn_implementation", None, "is missing"),
    ("cross_attn_every_n_layers", 0, "a whole number of at least 1"),
    ("cross_attn_min_layer_depth", -1, "a whole number of at least 0"),
    ("fast_token_temporal_stride", "4", "a whole number of at least 1"),
    ("min_fast_frames", 1.5, "a whole number of at least 1"),
    ("mm_projector_type", "resampler", '"mlp<n>x_gelu"'),
    ("mm_vision_select_layer", "last", "a whole number"),
    ("mm_vision_select_feature", "cls_patch", '"patch"'),
    ("mm_hidden_size", 99, "24"),
    ("hidden_act", "gelu", '"silu"'),
    ("use_sliding_window", True, "false"),
    ("layer_types", ["sliding_attention"], '"full_attention"'),
    ("num_attention_heads", True, "a whole number of at least 1"),
    ("rope_theta", -1, "a number above 0"),
    ("tie_word_embeddings", "no", "true or false"),
    ("eos_token_id", "<eos>", "a token id"),
    ("tokenizer_model_max_length", 0, "a whole number of at least 1"),
  ],
)
def test_every_other_value_is_an_error_that_names_it(key, value, expected):
  with pytest.raises(UserError) as error:
    parse(**{key: value})
  assert f"/somewhere/config.json: {key} " in str(error.value)
  assert expected in str(error.value)
  if value is not None:
    assert f"got {json.dumps(value)}" in str(error.value)


def test_values_that_do_not_belong_together_are_an_error():
  with pytest.raises(UserError, match="config.json: num_heads must be a multiple"):
    parse(num_attention_heads=3)


# --- Language models ---


def decoder(family="qwen2", **changes):
  return parse_decoder(Fields({**CONFIG, **changes}, "config.json"), family)


def test_families_differ_in_biases_and_norms():
  kinds = {family: decoder(family) for family in ("qwen2", "qwen3", "llama")}
  assert {f: (c.qkv_bias, c.qk_norm) for f, c in kinds.items()} == {
    "qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)
  }  # fmt: skip
  with pytest.raises(UserError, match="attention_bias must be false"):
    decoder("llama", attention_bias=True)


LLAMA3 = {
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
  "changes",
  [
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
    {
      "rope_theta": None,
      "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    },
  ],
)
def test_rotary_settings_of_old_and_new_files_are_the_same(changes):
  cfg = decoder("llama", **changes)
  assert cfg.rope_theta == 500000.0
  assert cfg.rope_scaling == LlamaRopeScaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_scalings_are_an_error(key):
  with pytest.raises(UserError, match=f'{key}: rope_type must be one of .*got "yarn"'):
    decoder(**{key: {"rope_type": "yarn", "factor": 4.0}})


# --- Vision encoders ---


def tower(name="x", described=None, select_layer=-2, shapes=None):
  fields = None if described is None else Fields(described, "vision_tower_config.json")
  return tower_config(name, fields, select_layer, shapes or {}, "config.json")


@pytest.mark.parametrize("prefix", ["", "google/", "/models/"])
def test_a_name_is_that_of_a_preset_with_the_layer_of_the_config(prefix):
  found = tower(f"{prefix}siglip-so400m-patch14-384", select_layer=-1)
  preset = PRESET_TOWERS["siglip-so400m-patch14-384"]
  assert found == dataclasses.replace(preset, select_layer=-1)
  assert tower("convnext-576") == PRESET_TOWERS["convnext-576"]


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_what_a_file_says_comes_before_the_name(family):
  described = {**TOWERS[family]["file"], "num_hidden_layers": 5}
  found = tower("google/siglip-so400m-patch14-384", described)
  assert isinstance(found, ViTConfig)
  assert (found.family, found.num_layers, found.patch_size) == (family, 5, 7)
  outer = {"model_type": family, "vision_config": {**described, "model_type": "-"}}
  outer["vision_config"].pop("model_type")
  assert tower("x", outer) == found


def test_transformers_leaves_defaults_out():
  assert tower("x", {"model_type": "siglip", "vision_config": {}}) == dataclasses.replace(
    PRESET_TOWERS["siglip-base-patch16-224"]
  )
  assert tower("x", {"model_type": "clip_vision_model"}) == PRESET_TOWERS["clip-vit-base-patch32"]


SMALL = ConvNeXtConfig(image_size=64, depths=(1, 2, 2, 1), widths=(4, 8, 12, 24))


@pytest.mark.parametrize(
  ("name", "described"),
  [
    ("convnext-64", None),
    ("x", {"image_size": 64}),
    ("x", {"model_type": "convnext", "image_size": 64, "depths": [1, 2, 2, 1]}),
    ("x", {"architecture": "convnext_xxlarge", "pretrained_cfg": {"input_size": [3, 64, 64]}}),
    (
      "x",
      {
        "architecture": "convnext_tiny",
        "pretrained_cfg": {"input_size": [3, 64, 64]},
        "model_args": {"depths": [1, 2, 2, 1], "dims": [4, 8, 12, 24], "norm_eps": 1e-5},
      },
    ),
    (
      "x",
      {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_xxlarge", "image_size": 64}}},
    ),
  ],
)
def test_a_convnext_is_read_from_its_config_or_its_shapes(name, described):
  assert tower(name, described, shapes=convnext_shapes()) == SMALL


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_a_transformer_is_measured_where_nothing_describes_it(family):
  shapes = tower_shapes(family)
  with pytest.raises(UserError, match="how many heads an encoder of width 16"):
    tower("tiny", shapes=shapes)
  wide = {name: tuple(128 if n == 16 else n for n in shape) for name, shape in shapes.items()}
  wide["vision_model.embeddings.position_embedding.weight"] = (16 + (family == "clip"), 128)
  found = tower("tiny", shapes=wide)
  assert (found.family, found.width, found.num_layers, found.num_heads) == (family, 128, 3, 2)
  assert (found.image_size, found.patch_size, found.mlp_width) == (28, 7, 24)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"name": "dino"}, "mm_vision_tower is 'dino', which is none of siglip-so400m"),
    ({"described": {"model_type": "dinov2"}}, "is of kind 'dinov2'; known are siglip"),
    ({"described": {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}}, "quick_gelu"),
    ({"name": "convnext", "shapes": convnext_shapes()}, "nothing tells the image size"),
    ({"described": {"model_type": "siglip", "num_attention_heads": 7}}, "width must be a multiple"),
  ],
)
def test_another_encoder_is_an_error(arguments, words):
  with pytest.raises(UserError) as error:
    tower(**arguments)
  assert words in str(error.value)


# --- And back ---


@pytest.mark.parametrize("name", [*PRESETS, *DECODERS])
def test_every_preset_survives_its_config(name):
  model = PRESETS.get(name) or dataclasses.replace(PRESETS["demo"], decoder=DECODERS[name])
  video = VideoConfig(17, "uniform", 3.0, "clip")
  export = Export(model, nnx.State({}), None, video, "Hm.", max_length=99, stop_ids=(1, 2))
  assert parse_official(official_files(export, "float32"), FOLDER, {}) == export
