# SPDX-License-Identifier: Apache-2.0
"""States and exports come back bit for bit, on other devices too, and torn ones are found out."""

import dataclasses
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.checkpoints import store
from slowfast_jax.checkpoints.store import (
  Checkpoints,
  Export,
  VideoConfig,
  flatten,
  load_export,
  save_export,
  unflatten,
  with_shardings,
)
from slowfast_jax.data.tokenizer import Tokenizer, train_tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.presets import build_config
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.slowfast import SlowFast, SlowFastConfig, abstract_params, graphdef_of
from slowfast_jax.sharding import make_mesh
from slowfast_jax.train.optimizer import OptimizerConfig, make_optimizer

MODEL = build_config(
  "demo",
  {
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "num_layers": 1, "num_heads": 2},
    "decoder": {
      "vocab_size": 300,
      "width": 16,
      "num_layers": 2,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 8,
      "mlp_width": 16,
    },
    "hybrid": {"every": 1, "max_depth": 2},
  },
)
OPTIMIZER = make_optimizer(OptimizerConfig(1e-3, 1, 10))


def mesh_of(**sizes):
  return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def random_like(abstract):
  """A state on its devices without compiling an initialiser; no two numbers are equal."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    values = (rng.standard_normal(leaf.shape) * 100).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map(draw, abstract)


def train_state(mesh):
  def init():
    params = nnx.state(SlowFast(MODEL, rngs=nnx.Rngs(0)))
    return {"step": jnp.int32(0), "params": params, "opt_state": OPTIMIZER.init(params)}

  return with_shardings(jax.eval_shape(init), mesh)


def small_state(value=0.0):
  # Random: what compresses well is stored inside of an index, and there is no file to tear.
  noise = np.random.default_rng(0).standard_normal((300, 100), np.float32)
  return {"a": jnp.asarray(noise + value), "n": jnp.int32(value)}


def small_abstract(state=None):
  mesh = make_mesh({}, jax.devices()[:1])
  return with_shardings(jax.eval_shape(lambda: small_state() if state is None else state), mesh)


def assert_equal(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def restore(folder, abstract, check=lambda run: None):
  checkpoints = Checkpoints(folder, keep=9)
  try:
    return checkpoints.restore(abstract, check)
  finally:
    checkpoints.close()


def saved(folder, *steps, keep=9):
  checkpoints = Checkpoints(folder, keep)
  for step in steps:
    checkpoints.save(step, small_state(step), {"name": f"run {step}"})
  checkpoints.close()


# --- Paths ---


def test_paths_are_those_of_the_attributes():
  state = train_state(mesh_of(data=1))
  names = list(flatten(state))
  assert "params.decoder.layers.attention.q.kernel" in names
  assert "params.adapters.warm_up" in names
  assert "params.projector.layers.0.bias" in names
  assert "opt_state.1.mu.adapters.kv.kernel" in names
  assert "step" in names
  assert len(set(names)) == len(jax.tree.leaves(state))


def test_unflatten_goes_by_name_and_not_by_order():
  tree = {"b": 1, "a": [2, 3]}
  leaves = dict(reversed(flatten(tree).items()))
  assert unflatten(tree, leaves) == tree


# --- Running states ---


def test_a_training_state_saved_on_eight_devices_comes_back_on_two(tmp_path):
  state = random_like(train_state(mesh_of(data=1, fsdp=8)))
  kernel = state["params"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert len(kernel[...].sharding.device_set) == 8
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(7, state, {"samples": [1, 2]})
  checkpoints.close()

  abstract = train_state(mesh_of(fsdp=2))
  restored = restore(tmp_path, abstract)
  assert (restored.step, restored.run) == (7, {"samples": [1, 2]})
  assert_equal(restored.state, state)
  for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(abstract)):
    assert leaf.sharding == wanted.sharding
  up = restored.state["params"]["decoder"]["layers"]["mlp"]["up"]["kernel"][...]
  assert up.sharding.shard_shape(up.shape)[1] == up.shape[1] // 2


def test_donating_a_state_after_saving_it_changes_nothing(tmp_path):
  add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"a": jnp.zeros((1000, 1000)), "n": jnp.int32(0)}
  checkpoints = Checkpoints(tmp_path, keep=9)
  for step in range(1, 10):
    state = add_one(state)
    if step % 3 == 0:
      checkpoints.save(step, state, {})
  checkpoints.close()
  shutil.rmtree(tmp_path / "9")
  restored = restore(tmp_path, small_abstract(state))
  assert restored.step == 6
  np.testing.assert_array_equal(restored.state["a"], 6.0)


def test_only_the_newest_are_kept(tmp_path):
  saved(tmp_path, 1, 2, 3, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.all_steps() == [2, 3]
  checkpoints.close()


def test_nothing_to_restore(tmp_path):
  assert restore(tmp_path / "new", small_abstract()) is None


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(UserError, match="train.keep must be at least 1, got 0"):
    Checkpoints(tmp_path, keep=0)


def delete(file):
  shutil.rmtree(file) if file.is_dir() else file.unlink()


def cut(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
  ("tear", "pattern"),
  [
    (delete, "*"),
    (delete, "run"),
    (cut, "run/metadata"),
    (delete, "state"),
    (delete, "state/_METADATA"),
    (delete, "state/manifest.ocdbt"),
    (delete, "state/d/*"),
    (delete, "state/ocdbt.process_0"),
    (cut, "state/ocdbt.process_0/d/*"),
  ],
)
def test_a_torn_folder_is_skipped_with_a_warning(tmp_path, tear, pattern, caplog):
  saved(tmp_path, 1, 2)
  for file in list((tmp_path / "2").glob(pattern)):
    tear(file)
  with caplog.at_level(logging.WARNING):
    restored = restore(tmp_path, small_abstract())
  assert restored.step == 1
  assert_equal(restored.state, small_state(1))
  (warning,) = [line for line in caplog.messages if ": torn" in line]
  assert f"{tmp_path / '2'}: torn" in warning
  assert "\n" not in warning
  # The step can be saved again.
  saved(tmp_path, 2)
  assert restore(tmp_path, small_abstract()).step == 2


def test_an_unfinished_folder_is_none(tmp_path):
  saved(tmp_path, 1)
  shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
  assert restore(tmp_path, small_abstract()).step == 1
  saved(tmp_path, 2)  # Orbax removes it in the background, and waits for that before it saves.
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_the_state_of_another_model_is_an_error_and_stays(tmp_path):
  saved(tmp_path, 1)
  other = {"a": jnp.zeros((300, 99)), "b": jnp.zeros(()), "n": jnp.int32(0)}
  with pytest.raises(UserError) as error:
    restore(tmp_path, small_abstract(other))
  for words in ("1 missing: b", "a (expected (300, 99), got (300, 100))", str(tmp_path / "1")):
    assert words in str(error.value)
  assert (tmp_path / "1").exists()


def test_the_check_stops_before_anything_is_moved(tmp_path):
  saved(tmp_path, 1)

  def check(run):
    raise UserError(f"not {run['name']}")

  with pytest.raises(UserError, match="not run 1"):
    restore(tmp_path, small_abstract(), check)
  assert (tmp_path / "1").exists()


def not_reached():
  """As Orbax tells what TensorStore says."""
  error = Exception("Encountered error while reading array index")
  error.__cause__ = ValueError("UNAVAILABLE: Error reading a/0.0: connection reset")
  return error


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    not_reached(),
  ],
)
def test_what_is_no_damage_moves_no_checkpoint(tmp_path, monkeypatch, error):
  saved(tmp_path, 1, 2)

  def fail(*_):
    raise error

  monkeypatch.setattr(store, "read_arrays", fail)
  with pytest.raises(type(error)) as raised:
    restore(tmp_path, small_abstract())
  assert raised.value is error
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_where_no_checkpoint_can_be_read_none_is_moved_and_nothing_begins_anew(tmp_path):
  saved(tmp_path, 1, 2)
  for step in "12":
    delete(tmp_path / step / "state/_METADATA")
  with pytest.raises(UserError, match="no other checkpoint that can be read") as error:
    restore(tmp_path, small_abstract())
  assert str(tmp_path / "2") in str(error.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# --- Exports ---


@pytest.fixture(scope="module")
def export():
  abstract = with_shardings(abstract_params(MODEL), mesh_of(data=1))
  tokenizer = train_tokenizer(["which colour flashed"] * 3, 290)
  video = VideoConfig(32, "fps", 1.5, "clip")
  return Export(MODEL, random_like(abstract), tokenizer, video, "You are terse.")


@pytest.fixture
def folder(export, tmp_path):
  save_export(tmp_path / "export", export)
  return tmp_path / "export"


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2}])
def test_an_export_comes_back_bit_for_bit(folder, export, sizes):
  loaded = load_export(folder, None if sizes is None else mesh_of(**sizes))
  assert_equal(loaded.params, export.params)
  assert (loaded.model, loaded.video, loaded.system) == (MODEL, export.video, "You are terse.")
  text = "which colour <|im_end|>?"
  assert loaded.tokenizer.encode(text) == export.tokenizer.encode(text)
  count = 1 if sizes is None else 4
  assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(loaded.params))


def test_the_model_of_an_export_runs(folder, export):
  loaded = load_export(folder)
  model = nnx.merge(graphdef_of(MODEL), loaded.params)
  np.testing.assert_array_equal(
    model.adapters.warm_up[...], export.params["adapters"]["warm_up"][...]
  )


def test_config_json_is_as_documented(folder):
  config = json.loads((folder / "config.json").read_text())
  assert (config["format"], config["version"]) == ("slowfast_jax", 2)
  assert config["model"]["decoder"]["num_layers"] == 2
  assert config["model"]["hybrid"]["every"] == 1
  assert config["video"] == {
    "num_frames": 32, "sampler": "fps", "target_fps": 1.5, "policy": "clip"
  }  # fmt: skip
  assert config["system"] == "You are terse."


@pytest.mark.parametrize(
  "changes",
  [
    {"hybrid": None},
    {"decoder": dataclasses.replace(MODEL.decoder, rope_scaling=LlamaRopeScaling(factor=32.0))},
    {"decoder": dataclasses.replace(MODEL.decoder, qk_norm=True, qkv_bias=False)},
    {"vision": dataclasses.replace(MODEL.vision, family="clip"), "projector": "linear"},
  ],
)
def test_every_kind_of_model_config_survives_json(changes):
  model = dataclasses.replace(MODEL, **changes)
  values = json.loads(json.dumps(dataclasses.asdict(model)))
  assert store._from_dict(SlowFastConfig, values) == model


def test_saving_again_replaces_an_export(folder, export):
  save_export(folder, dataclasses.replace(export, system="Another."))
  assert load_export(folder).system == "Another."
  assert [p.name for p in folder.parent.iterdir()] == ["export"]


def test_an_export_that_fails_leaves_the_old_one(folder, export, monkeypatch):
  def fail(self, path):
    raise OSError("disk full")

  monkeypatch.setattr(Tokenizer, "save", fail)
  with pytest.raises(OSError, match="disk full"):
    save_export(folder, dataclasses.replace(export, system="Another."))
  monkeypatch.undo()
  assert load_export(folder).system == "You are terse."
  save_export(folder, dataclasses.replace(export, system="Another."))
  assert load_export(folder).system == "Another."


@pytest.mark.parametrize(
  ("tear", "pattern", "words"),
  [
    (delete, "", "there is no such folder"),
    (delete, "config.json", "not an export, it has no config.json"),
    (cut, "config.json", "config.json: not readable as JSON"),
    (delete, "tokenizer.json", "tokenizer.json: no such file"),
    (delete, "params", "params: the parameters are missing or damaged"),
    (delete, "params/part-00000", "params: the parameters are missing or damaged"),
    (delete, "params/part-00000/d/*", "params: the parameters are missing or damaged"),
    (cut, "params/part-00000/ocdbt.process_0/d/*", "params: the parameters are missing or damaged"),
  ],
)
def test_a_damaged_export_is_explained(folder, tear, pattern, words):
  for file in list(folder.glob(pattern)) if pattern else [folder]:
    tear(file)
  with pytest.raises(UserError) as error:
    load_export(folder)
  assert words in str(error.value)
  assert str(folder) in str(error.value)
  assert "\n" not in str(error.value)


def edit(folder, change):
  config = json.loads((folder / "config.json").read_text())
  change(config)
  (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda c: c.update(version=3), "got ('slowfast_jax', 3)"),
    (lambda c: c.update(format="other"), "got ('other', 2)"),
    (lambda c: c.pop("video"), "not the config of an export: 'video'"),
    (lambda c: c["model"].update(new=1), "SlowFastConfig has no field 'new'"),
    (lambda c: c["model"]["decoder"].pop("width"), "'width'"),
    (lambda c: c["model"]["decoder"].update(num_heads=3), "num_heads must be a multiple"),
    (lambda c: c["model"].update(hybrid=None), "not of this model: adapters."),
    (lambda c: c["model"]["decoder"].update(mlp_width=8), "expected (2, 16, 8), got (2, 16, 16)"),
  ],
)
def test_a_config_that_does_not_fit_is_explained(folder, change, words):
  edit(folder, change)
  with pytest.raises(UserError) as error:
    load_export(folder)
  assert words in str(error.value)


def test_the_folder_of_a_run_stands_for_its_export(folder):
  assert load_export(folder.parent).system == "You are terse."
