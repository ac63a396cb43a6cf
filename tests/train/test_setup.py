# SPDX-License-Identifier: Apache-2.0
"""A config becomes a run: what does not fit is named before anything is compiled."""

import dataclasses
import logging
import types

import jax
import numpy as np
import pytest

from slowfast_jax.checkpoints.store import flatten, load_export, save_export
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.presets import PRESETS
from slowfast_jax.models.slowfast import CompressorConfig
from slowfast_jax.sharding import make_mesh
from slowfast_jax.train.plan import geometry_of, make_plan, model_config, optimizer_config
from slowfast_jax.train.program import compiler_options
from slowfast_jax.train.setup import (
  check_batch,
  initial_state,
  local_rows,
  open_setup,
  place_batch,
)
from tests.train.tiny_run import record, tiny_config, write_data, write_records

FAST_ONLY = "model.slow=false"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain_export(data, tmp_path_factory):
  """A model without a slow path, its parameters random."""
  folder = tmp_path_factory.mktemp("plain") / "export"
  setup = open_setup(tiny_config(data, FAST_ONLY, "seed=5"))
  export = setup.export(initial_state(setup).params)
  save_export(folder, dataclasses.replace(export, max_length=50, stop_ids=(7,)))
  return folder


def numbers(tree):
  return {name: np.asarray(value) for name, value in flatten(tree).items()}


# --- Fields ---


def test_model_config_is_the_preset_with_the_changes(data):
  model = model_config(tiny_config(data, "model.decoder.num_layers=5").model)
  assert (model.decoder.num_layers, model.decoder.width) == (5, 16)
  assert model.decoder.rope_theta == PRESETS["demo"].decoder.rope_theta
  assert model.hybrid_layers == (0, 2)
  assert model_config(tiny_config(data, "model.slow=false").model).hybrid is None


@pytest.mark.parametrize(
  ("changes", "num_frames", "tokens"),
  [
    ({}, 4, 16),
    ({"spatial_stride": 2}, 4, 4),
    ({"video_pooling_stride": 2}, 4, 4),
    ({"video_pooling_stride": 2}, 1, 16),  # Stills are not pooled.
    ({"video_pooling_stride": 2, "spatial_stride": 2}, 4, 1),
  ],
)
def test_the_geometry_counts_tokens_as_the_model_makes_them(changes, num_frames, tokens):
  demo = PRESETS["demo"]
  vision = dataclasses.replace(demo.vision, image_size=64, patch_size=16)
  compressor = CompressorConfig(min_fast_frames=4, **changes)
  model = dataclasses.replace(demo, vision=vision, compressor=compressor)
  bounds = {"num_frames": num_frames, "decoder_length": 500, "text_bound": 100}
  geometry = geometry_of(model, bounds)
  assert geometry.tokens_per_frame == tokens
  assert geometry.image_size == (64, 64)
  assert geometry.query_set == "text-only"


def test_the_compiler_is_told_what_the_chips_can_and_what_the_config_says(data):
  name = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
  plan = make_plan(tiny_config(data, f"train.compiler_options=(('{name}', False), ('xla_b', 1))"))
  assert compiler_options(plan) == {name: False, "xla_b": 1}
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind="TPU v6 lite")]))
  of_v6e = compiler_options(dataclasses.replace(plan, mesh=mesh))
  assert not of_v6e[name]
  assert of_v6e["xla_tpu_enable_sparse_core_collective_offload_reduce_scatter"]
  assert of_v6e["xla_b"] == 1
  assert of_v6e["xla_tpu_scoped_vmem_limit_kib"] == 65536
  chunks = make_plan(tiny_config(data, "train.frame_chunk=1"))
  of_chunks = compiler_options(dataclasses.replace(chunks, mesh=mesh))
  assert "xla_tpu_scoped_vmem_limit_kib" not in of_chunks


def test_optimizer_config_takes_its_length_from_the_steps(data):
  config = tiny_config(data, "train.steps=77", "optimizer.groups=(('^vision', 0.1), ('x', 2))")
  got = optimizer_config(config)
  assert got.total_steps == 77
  assert got.groups == (("^vision", 0.1), ("x", 2))
  assert got.learning_rate == config.optimizer.learning_rate


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("train.dtype=float16", "train.dtype must be one of"),
    ("train.remat=all", "train.remat must be one of .*'offload', 'full'.*, got 'all'"),
    ("train.z_loss=-1", "train.z_loss must not be negative, got -1.0"),
    ("train.compiler_options=('xla_a',)", "train.compiler_options must be pairs"),
    ("train.frame_chunk=-1", "train.frame_chunk must not be negative, got -1"),
    ("train.accumulation=0", "train.accumulation must be at least 1, got 0"),
    ("train.accumulation=2", "mesh.data x mesh.fsdp x train.accumulation = 16, got 8"),
    ("optimizer.name=sgd", "optimizer.name must be one of .*, got 'sgd'"),
    ("optimizer.groups=(('(', 1.0),)", "optimizer.groups: '\\(' is no regex"),
    ("train.log_every=0", "train.log_every must be at least 1, got 0"),
    ("train.steps=0", "train.steps must be at least 1, got 0"),
    ("model.preset=dmeo", "unknown preset 'dmeo'"),
    ("model.decoder.head_dim=7", "model.decoder: head_dim must be even"),
    ("model.decoder.vocab_size=200", "model.decoder.vocab_size is 200.*has 30. ids"),
    ("data.decoder_length=2", "data.decoder_length is 2, and the 2 fast tokens of 4 frames"),
    ("data.batch_size=6", "data.batch_size must be a multiple of mesh.data x mesh.fsdp = 8, got 6"),
    ("data.text_bound=0", "data.text_bound must be at least 1, got 0"),
    ("data.buckets=((4,64,0,8),)", r"data.buckets\[0\]: text_bound must be at least 1, got 0"),
    (
      "data.buckets=((1,64,56,8),(4,2,9,8))",
      r"data.buckets\[1\]: decoder_length is 2, and the 2 fast tokens of 4 frames",
    ),
    (
      "data.buckets=((1,64,56,6),)",
      r"data.buckets\[0\]: batch_size must be a multiple of mesh.data x mesh.fsdp = 8, got 6",
    ),
    ("data.records=", "data.records is empty; .*--config.data.records=DIR"),
    ("data.records=/nowhere", "/nowhere: there is no such folder"),
    ("data.tokenizer=", "data.tokenizer is empty"),
    ("data.tokenizer=/nowhere", "/nowhere"),
    ("mesh.tensor=3", "mesh"),
    ("seed=-1", "seed must not be negative"),
    ("model.hybrid_init=random", "model.hybrid_init must be one of .*, got 'random'"),
    ("model.compressor.min_fast_frames=0", "model.compressor: min_fast_frames must be at least 1"),
  ],
)
def test_what_does_not_fit_is_named(data, override, words):
  config = tiny_config(data, override)
  with pytest.raises(UserError, match=words):
    open_setup(config)


def test_a_field_that_the_model_does_not_have_is_named(data):
  config = tiny_config(data).unlock()
  config.model.decoder.widht = 3
  with pytest.raises(UserError, match=r"model\.decoder\.widht: no such field"):
    open_setup(config)


# --- Batches ---


def first_batch(data, *overrides):
  setup = open_setup(tiny_config(data, *overrides))
  return next(setup.pipeline.iterate()), setup.pipeline


def test_a_good_first_batch_has_no_problem(data):
  assert check_batch(*first_batch(data)) == ""


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["data.text_bound=4"], "8 of 8 samples .* text_bound is 4 and the row needs"),
    (["data.decoder_length=20"], "8 of 8 samples .* data.decoder_length = 20; raise it"),
    (["data.num_frames=2"], "num_frames is 2 and the row needs 4"),
    (["data.targets=all"], "targets must be one of"),
    (["model.vision.image_size=24"], r"must have shape \(4, 24, 24, 3\), got \(4, 16, 16, 3\)"),
  ],
)
def test_a_first_batch_that_teaches_nothing_is_an_error(data, overrides, words):
  with pytest.raises(UserError, match=words):
    check_batch(*first_batch(data, *overrides))


def test_a_first_batch_that_is_partly_bad_is_told(data, tmp_path, caplog):
  records = [record(i) for i in range(7)] + [record(7, size=8)]
  write_records(tmp_path / "records", records)
  with caplog.at_level(logging.WARNING):
    told = check_batch(*first_batch(data, f"data.records={tmp_path / 'records'}"))
  assert told.startswith("1 of 8 samples of the first batch teach nothing: record 7 (square7)")


@pytest.mark.parametrize(
  ("sizes", "num_devices"), [({"data": 8}, 8), ({"fsdp": 4, "tensor": 2}, 8), ({}, 1)]
)
def test_a_batch_is_laid_out_by_rows(data, sizes, num_devices):
  mesh = make_mesh(sizes, jax.devices()[:num_devices])
  assert local_rows(mesh, 8) == (0, 1)
  batch, _ = first_batch(data)
  placed = place_batch(batch, mesh)
  np.testing.assert_array_equal(placed.tokens, batch.tokens)
  np.testing.assert_array_equal(placed.frames, batch.frames)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  assert placed.frames.sharding.shard_shape(placed.frames.shape)[0] == 8 // parts


# --- The first state ---


def test_the_seed_decides_the_first_state(data, plain_export):
  setup = open_setup(tiny_config(data, FAST_ONLY, "seed=6"))
  six = numbers(initial_state(setup).params)["decoder.layers.mlp.up.kernel"]
  five = numbers(load_export(plain_export).params)["decoder.layers.mlp.up.kernel"]
  assert np.std(six) == pytest.approx(np.std(five), rel=0.1)
  assert not np.any(six == five)


@pytest.fixture(scope="module")
def hybrid(data, plain_export):
  """The slow path added to the plain model, and the setup that it was added by."""
  setup = open_setup(tiny_config(data, f"train.init_from={plain_export}", "data.tokenizer="))
  return setup, initial_state(setup)


def test_a_slow_path_is_added_to_an_export_that_has_none(hybrid, plain_export):
  setup, state = hybrid
  given, got = numbers(load_export(plain_export).params), numbers(state.params)
  for name in given:
    np.testing.assert_array_equal(got[name], given[name], err_msg=name)
  added = set(got) - set(given)
  assert all(name.startswith("adapters.") for name in added)
  # Semantics section 4: slow keys and values start as the layer's own, the gate closed.
  layers = list(setup.model.hybrid_layers)
  for i, part in enumerate("kv"):
    own = given[f"decoder.layers.attention.{part}.kernel"][layers]
    np.testing.assert_array_equal(got["adapters.kv.kernel"][..., i, :], own)
  np.testing.assert_array_equal(got["adapters.warm_up"], 0.0)
  assert int(state.step) == 0
  assert all(not np.any(value) for value in numbers(state.opt_state).values())
  leaf = state.params["decoder"]["layers"]["mlp"]["up"]["kernel"][...]
  assert len(leaf.sharding.device_set) == jax.device_count()


def test_how_long_prompts_may_be_and_what_ends_replies_is_taken_over(hybrid):
  setup, state = hybrid
  export = setup.export(state.params)
  assert (export.max_length, export.stop_ids) == (50, (7,))


def test_a_slow_path_may_start_as_the_released_one(data, tmp_path):
  """Which needs two heads to be another start."""
  two, folder = "model.decoder.num_kv_heads=2", tmp_path / "export"
  plain = open_setup(tiny_config(data, two, FAST_ONLY))
  save_export(folder, plain.export(initial_state(plain).params))
  changes = (two, f"train.init_from={folder}", "model.hybrid_init=reference")
  got = numbers(initial_state(open_setup(tiny_config(data, *changes))).params)
  for i, part in enumerate("kv"):
    own = got[f"decoder.layers.attention.{part}.kernel"][[0, 2]]
    np.testing.assert_array_equal(got["adapters.kv.kernel"][:, :, i], own)


@pytest.mark.parametrize("overrides", [[], [FAST_ONLY]])
def test_an_export_gives_all_that_the_model_has(hybrid, data, tmp_path, overrides):
  setup, state = hybrid
  # Other numbers in the adapters than they would start with.
  params = jax.tree.map(lambda x: x + 1, state.params)
  save_export(tmp_path / "export", setup.export(params))
  config = tiny_config(data, f"train.init_from={tmp_path / 'export'}", *overrides)
  expected, got = numbers(params), numbers(initial_state(open_setup(config)).params)
  if overrides:
    expected = {name: x for name, x in expected.items() if not name.startswith("adapters.")}
  assert got.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("width", 32, "embedding has shape .* make the fields of `model` the same"),
    ("qk_norm", True, "it has no decoder.layers.attention.k_norm.scale"),
  ],
)
def test_an_export_of_another_model_is_an_error(data, plain_export, field, value, words):
  config = tiny_config(data, f"train.init_from={plain_export}").unlock()
  config.model.decoder[field] = value
  with pytest.raises(UserError, match=words):
    initial_state(open_setup(config))


def test_an_export_with_another_tokenizer_is_an_error(data, plain_export, tmp_path):
  train_tokenizer(["other words"] * 3, 300).save(tmp_path)
  init = (f"train.init_from={plain_export}", f"data.tokenizer={tmp_path}")
  with pytest.raises(UserError, match="another tokenizer than data.tokenizer="):
    initial_state(open_setup(tiny_config(data, *init)))
