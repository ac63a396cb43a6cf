# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints: every tensor lands where it belongs, and comes back byte for byte."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import official as by_hand
from checkpoints.official import DTYPES, TOWER, Official, official
from safetensors.numpy import load_file

from slowfast_jax.checkpoints import parts
from slowfast_jax.checkpoints.convert import convert
from slowfast_jax.checkpoints.hf import load_hf, save_hf
from slowfast_jax.checkpoints.open import load_checkpoint, open_checkpoint
from slowfast_jax.checkpoints.source import parameter_shapes
from slowfast_jax.checkpoints.store import load_export, save_export
from slowfast_jax.checkpoints.tables import official_slots
from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.presets import PRESETS
from slowfast_jax.sharding import make_mesh

N, K, H, D = by_hand.N, by_hand.K, by_hand.H, by_hand.D


def tensors_of(folder):
  found = {}
  for file in folder.glob("*.safetensors"):
    found |= load_file(file)
  return found


def assert_same_bytes(tensors, expected):
  assert set(tensors) == set(expected)
  for name in expected:
    assert tensors[name].dtype == expected[name].dtype, name
    assert tensors[name].shape == expected[name].shape, name
    assert tensors[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture
def small_parts(monkeypatch):
  """Parts so small that stacks and vocabularies are cut."""
  monkeypatch.setattr(parts, "PART_BYTES", 2000)


# --- Where tensors go ---


def test_heads_and_layers_are_where_the_equations_want_them(tmp_path):
  made = official()
  params = flatten(load_hf(made.write(tmp_path)).params)
  t = made.tensors
  # y = x W^T: output row n * H + h is head n, dimension h.
  q = t["model.layers.2.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(
    params["decoder.layers.attention.q.kernel"][2][:, 3, 1], q[3 * H + 1]
  )
  o = t["model.layers.1.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(
    params["decoder.layers.attention.out.kernel"][1][2, 3], o[:, 2 * H + 3]
  )
  # Head-major (K, 2, H): value 1 of kv head 1 comes behind its key. Layer 3 is the second hybrid.
  kv = t["model.layers.3.self_attn.cross_attn_kv_proj.weight"]
  np.testing.assert_array_equal(
    params["adapters.kv.kernel"][1][:, 1, 1, 2], kv[(1 * 2 + 1) * H + 2]
  )
  gate = t["model.layers.3.self_attn.cross_attn_gate_proj.0.weight"]
  np.testing.assert_array_equal(params["adapters.gate.kernel"][1][1, 3, 0], gate[0, 1 * H + 3])
  alpha = t["model.layers.0.self_attn.cross_attn_warm_up_gate"]
  np.testing.assert_array_equal(params["adapters.warm_up"][0], alpha)
  np.testing.assert_array_equal(params["decoder.head.kernel"], t["lm_head.weight"].T)
  stem = t[f"{TOWER}stem.0.weight"]
  np.testing.assert_array_equal(params["vision.stem.conv.kernel"][1, 2, 0], stem[:, 0, 1, 2])
  depthwise = t[f"{TOWER}stages.1.blocks.1.conv_dw.weight"]
  np.testing.assert_array_equal(
    params["vision.stages.1.blocks.depthwise.kernel"][1][3, 4], depthwise[:, 0, 3, 4]
  )
  scale = t[f"{TOWER}stages.2.blocks.1.weight"]
  np.testing.assert_array_equal(params["vision.stages.2.blocks.layer_scale"][1], scale)
  second = t["model.mm_projector.2.weight"]
  np.testing.assert_array_equal(params["projector.layers.1.kernel"], second.T)


def test_the_released_layout_of_7b_has_743_tensors():
  model = PRESETS["slowfast-qwen2-7b-convnext-576-64f"]
  slots = official_slots(model, parameter_shapes(model))
  # Beside them, in the file: the encoder's head of four tensors.
  assert len(slots) + 4 == 743
  assert len({slot.source for slot in slots}) == len(slots)
  count = sum(int(np.prod(slot.shape)) for slot in slots)
  assert round((count + 1000 * 3073 + 2 * 3072) / 1e9, 2) == 8.50
  assert count == model.num_params


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_a_tensor(name):
  shapes = parameter_shapes(PRESETS[name])
  slots = official_slots(PRESETS[name], shapes)
  assert {slot.param for slot in slots} == set(shapes)
  assert sum(np.prod(slot.shape) for slot in slots) == sum(np.prod(x) for x in shapes.values())


# --- Round trips ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tower", by_hand.TOWERS)
def test_to_orbax_and_back_every_byte_is_the_same(tmp_path, tower, dtype):
  made = official(tower, dtype)
  made.write(tmp_path / "hf")
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax")
  convert(open_checkpoint(tmp_path / "orbax"), tmp_path / "back", "huggingface")
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)
  kept = {p.name: p.read_bytes() for p in (tmp_path / "hf").glob("*.json")}
  assert {p.name: p.read_bytes() for p in (tmp_path / "back").glob("*.json")} == kept


def test_what_is_cut_into_pieces_comes_back_as_well(tmp_path, small_parts):
  made = official("convnext", "bfloat16")
  made.write(tmp_path / "hf", shards=5)
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax")
  assert len(list((tmp_path / "orbax/params").iterdir())) > 5
  assert_equal(load_export(tmp_path / "orbax"), load_hf(tmp_path / "hf"))
  convert(open_checkpoint(tmp_path / "orbax"), tmp_path / "back", "huggingface")
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


def test_layers_of_different_dtypes_keep_them(tmp_path):
  made = official()
  name = "model.layers.1.mlp.up_proj.weight"
  made.tensors[name] = made.tensors[name].astype(DTYPES["bfloat16"])
  made.write(tmp_path / "hf")
  # One array holds all layers: in the dtype that has room for each of them.
  assert flatten(load_hf(tmp_path / "hf").params)["decoder.layers.mlp.up.kernel"].dtype == "float32"
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax")
  convert(open_checkpoint(tmp_path / "orbax"), tmp_path / "back", "huggingface")
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


@pytest.mark.parametrize("gate", ["dynamic", "dynamic-tanh", "dynamic-tanh-warmup"])
@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_every_gate_and_projector_survives(tmp_path, gate, projector):
  made = official(cross_attn_gating_type=f"whole-{gate}", mm_projector_type=projector)
  export = load_hf(made.write(tmp_path / "hf"))
  assert ("adapters.warm_up" in flatten(export.params)) == gate.endswith("warmup")
  save_hf(tmp_path / "back", export)
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


def test_a_factor_that_the_gate_does_not_have_travels_along(tmp_path):
  made = official(cross_attn_gating_type="whole-dynamic-tanh")
  for depth in (0, 3):
    name = f"model.layers.{depth}.self_attn.cross_attn_warm_up_gate"
    made.tensors[name] = np.zeros(1, np.float32)
  export = load_hf(made.write(tmp_path / "hf"))
  assert "adapters.warm_up" not in flatten(export.params)
  save_hf(tmp_path / "back", export)
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


@pytest.mark.parametrize("copied", [False, True])
def test_tied_embeddings_with_and_without_their_copy(tmp_path, copied):
  made = official(tie_word_embeddings=True)
  if copied:
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].copy()
  made.write(tmp_path / "hf")
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax")
  export = load_export(tmp_path / "orbax")
  assert "decoder.head.kernel" not in flatten(export.params)
  save_hf(tmp_path / "back", export)
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


def test_a_copy_of_tied_embeddings_that_differs_is_an_error(tmp_path):
  made = official(tie_word_embeddings=True)
  made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"] + 1
  with pytest.raises(UserError, match="1 unknown:\n    lm_head.weight"):
    load_hf(made.write(tmp_path))


def test_a_model_of_fast_tokens_alone(tmp_path):
  made = official(**dict.fromkeys(k for k in by_hand.CONFIG if k.startswith("cross_attn_")))
  export = load_hf(made.write(tmp_path / "hf"))
  assert export.model.hybrid is None
  save_hf(tmp_path / "back", export)
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


def test_buffers_and_blocks_that_never_run_travel_along(tmp_path):
  made = official("siglip")
  made.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float64)
  ids = f"{TOWER}vision_model.embeddings.position_ids"
  made.tensors[ids] = np.arange(16, dtype=np.int64)[None]
  export = load_hf(made.write(tmp_path / "hf"))
  unused = set(export.hub.unused)
  assert {ids, f"{TOWER}vision_model.head.probe"} < unused
  assert f"{TOWER}vision_model.encoder.layers.2.mlp.fc1.weight" in unused
  save_export(tmp_path / "orbax", export)
  save_hf(tmp_path / "back", load_export(tmp_path / "orbax"))
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)


def test_a_model_that_never_was_released_is_written_and_read(tmp_path):
  made = load_hf(official().write(tmp_path / "hf"))
  tokenizer = train_tokenizer(["which colour"], 290)
  model = dataclasses.replace(
    made.model, decoder=dataclasses.replace(made.model.decoder, rope_theta=77.0)
  )
  video = dataclasses.replace(made.video, num_frames=12, sampler="uniform")
  own = dataclasses.replace(
    made, model=model, hub=None, tokenizer=tokenizer, video=video, system="Be brief."
  )
  save_hf(tmp_path / "own", own)
  again = load_checkpoint(tmp_path / "own")
  assert_equal(again, own)
  assert (again.model, again.video, again.system) == (model, video, "Be brief.")
  assert (again.max_length, again.stop_ids) == (own.max_length, own.stop_ids)
  assert again.tokenizer.encode("which colour") == tokenizer.encode("which colour")


def test_a_changed_setting_reaches_the_config_and_their_keys_stay(tmp_path):
  export = load_hf(official().write(tmp_path / "hf"))
  model = dataclasses.replace(
    export.model, compressor=dataclasses.replace(export.model.compressor, temporal_stride=6)
  )
  save_hf(tmp_path / "back", dataclasses.replace(export, model=model))
  config = json.loads((tmp_path / "back/config.json").read_text())
  assert (config["fast_token_temporal_stride"], config["a_key_of_theirs"]) == (6, [1, 2])
  assert load_hf(tmp_path / "back").model == model


# --- Dtypes, shards, meshes ---


def test_a_wanted_dtype_is_that_of_parameters_file_and_config(tmp_path):
  made = official("siglip", "float32")
  made.write(tmp_path / "hf")
  leaves = jax.tree.leaves(load_hf(tmp_path / "hf", dtype="bfloat16").params)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax", dtype="bfloat16")
  convert(open_checkpoint(tmp_path / "orbax"), tmp_path / "back", "huggingface", dtype="float16")
  name = "model.norm.weight"
  expected = made.tensors[name].astype(DTYPES["bfloat16"]).astype(np.float16)
  np.testing.assert_array_equal(tensors_of(tmp_path / "back")[name], expected)
  assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float16"
  leaves = jax.tree.leaves(load_export(tmp_path / "orbax", dtype="float32").params)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_an_unknown_dtype_is_an_error(tmp_path):
  with pytest.raises(UserError, match="dtype must be one of .*got 'int8'"):
    load_hf(official().write(tmp_path), dtype="int8")


def test_shards_are_filled_up_to_their_size(tmp_path):
  made = official()
  export = load_hf(made.write(tmp_path / "hf", shards=3))
  save_hf(tmp_path / "back", export, max_shard_bytes=10_000)
  files = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(files) > 3
  assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
  assert all(file.stat().st_size < 20_000 for file in files)
  assert_same_bytes(tensors_of(tmp_path / "back"), made.tensors)
  assert_equal(load_hf(tmp_path / "back"), export)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_on_eight_devices_everything_is_sharded_and_the_same(tmp_path, kind, cut, monkeypatch):
  if cut:
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
  official("siglip", "bfloat16").write(tmp_path / "hf")
  convert(open_checkpoint(tmp_path / "hf"), tmp_path / "orbax", "orbax")
  expected = load_hf(tmp_path / "hf")
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  export = load_checkpoint(tmp_path / kind, mesh)
  assert_equal(export, expected)
  params = flatten(export.params)
  assert all(len(leaf.sharding.device_set) == 8 for leaf in params.values())
  kernel = params["decoder.layers.mlp.up.kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (4, D // 2, by_hand.M // 2)
  embedding = params["decoder.embed.embedding"]
  assert embedding.sharding.shard_shape(embedding.shape) == (by_hand.V // 2, D // 2)


def assert_equal(export, expected):
  found, wanted = flatten(export.params), flatten(expected.params)
  assert set(found) == set(wanted)
  for name in wanted:
    assert found[name].dtype == wanted[name].dtype, name
    np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(wanted[name]), name)


# --- What does not fit ---


def test_all_that_is_wrong_with_the_tensors_is_told_at_once(tmp_path):
  made = official()
  t = made.tensors
  del t["model.layers.1.mlp.up_proj.weight"], t[f"{TOWER}stem.1.bias"]
  t["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
  t["model.image_newline"] = np.zeros(12, np.float32)
  t["model.norm.weight"] = np.zeros(13, np.float32)
  t["model.layers.0.mlp.up_proj.weight"] = np.zeros((20, 12), np.int8)
  with pytest.raises(UserError) as error:
    load_hf(made.write(tmp_path))
  for words in (
    str(tmp_path),
    "2 missing:",
    "model.layers.1.mlp.up_proj.weight [20, 12]",
    f"{TOWER}stem.1.bias [4]",
    "2 unknown:",
    "model.layers.9.mlp.up_proj.weight [2, 3]",
    "model.image_newline [12]",
    "1 of another shape:\n    model.norm.weight (expected [12], got [13])",
    "1 of a dtype other than F32, F16, BF16:\n    model.layers.0.mlp.up_proj.weight I8",
  ):
    assert words in str(error.value)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda o: o.config.update(model_type="qwen2"), "slowfast convert --llm"),
    (lambda o: o.config.update(model_type="mamba"), 'model_type must be one of "llava_qwen_slow'),
    (lambda o: o.config.pop("hidden_size"), "hidden_size is missing"),
    (lambda o: o.config.update(vocab_size=41), "expected [41, 12], got [40, 12]"),
  ],
)
def test_a_config_that_does_not_fit_is_explained(tmp_path, change, words):
  made: Official = official()
  change(made)
  with pytest.raises(UserError) as error:
    load_hf(made.write(tmp_path))
  assert words in str(error.value)
  assert str(tmp_path) in str(error.value)


def test_a_damaged_config_is_explained(tmp_path):
  official().write(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json: not readable as JSON"):
    load_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
  export = load_hf(official().write(tmp_path / "hf"))
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes/diary.txt").write_text("dear")
  with pytest.raises(UserError, match="no checkpoint, so it is not replaced"):
    save_hf(tmp_path / "notes", export)
  assert (tmp_path / "notes/diary.txt").read_text() == "dear"


def test_saving_again_replaces_a_checkpoint(tmp_path):
  export = load_hf(official("siglip").write(tmp_path / "hf"))
  save_hf(tmp_path / "hf", load_hf(official("clip").write(tmp_path / "clip")))
  assert load_hf(tmp_path / "hf").model.vision.family == "clip"
  assert export.model.vision.family == "siglip"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "hf"]


def test_without_a_tokenizer_there_is_none_and_one_of_another_kind_is_a_warning(tmp_path, caplog):
  official().write(tmp_path)
  assert load_hf(tmp_path).tokenizer is None
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "tokenizer_config.json").write_text("{}")
  assert load_hf(tmp_path).tokenizer is None
  assert "opened without a tokenizer" in caplog.text
