# SPDX-License-Identifier: Apache-2.0
"""Int8 weights take a quarter of the memory, and answer nearly as the weights that they round."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

import slowfast_jax as sf
from slowfast_jax.checkpoints.store import flatten, save_export
from slowfast_jax.cli.main import main
from slowfast_jax.errors import UserError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.models.int8 import with_int8_weights
from slowfast_jax.sharding import make_mesh
from tests.generate.tiny import frames, make_export

NEW = 12
QUESTION = "What colour was the circle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("int8") / "export"
  save_export(folder, make_export())
  return folder


@pytest.fixture(scope="module")
def int8(folder):
  vlm = sf.load(folder, int8=True)
  vlm.engine.stop_ids = (-1, -1)  # A random model stops anywhere.
  return vlm


def kernels(params):
  """Every array that stands for a kernel of the decoder, or for slow keys and values."""
  return {
    name: array
    for name, array in flatten(params).items()
    if name.startswith(("decoder.", "adapters.kv.")) and ".kernel" in name
  }


def scores(vlm):
  session = vlm.engine.encode(frames(8, 1))
  ids = vlm.engine.prompt_ids(QUESTION, session)
  return vlm.engine.logits([ids], [session])[0]


def test_kernels_are_int8_in_memory(folder, int8):
  arrays, exact = kernels(int8.export.params), kernels(make_export().params)
  small = {name: a for name, a in arrays.items() if a.dtype == np.int8}
  assert len(small) == len(exact) == 9
  assert sum(a.nbytes for a in small.values()) * 4 == sum(a.nbytes for a in exact.values())
  # The rest are scales: one float32 a channel, and the tiny model's channels have 16 to 32 weights.
  assert {a.dtype for a in arrays.values()} == {np.dtype("int8"), np.dtype("float32")}
  scales = sum(a.nbytes for a in arrays.values()) - sum(a.nbytes for a in small.values())
  assert scales <= sum(a.nbytes for a in exact.values()) / 16
  others = flatten(make_export().params).keys() - exact.keys()
  assert others == flatten(int8.export.params).keys() - arrays.keys()


def test_scores_are_close_to_the_exact_ones(folder, int8):
  exact, rounded = scores(sf.load(folder)), scores(int8)
  # A weight is off by up to half of 1/127 of its channel's largest, so by 0.5% of the channel's
  # standard deviation on average. Nine products behind one another may make 0.5% x sqrt(9) of that.
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 0.015


def test_cached_decoding_is_the_full_forward_pass(int8):
  session = int8.engine.encode(frames(8, 1))
  ids = int8.engine.prompt_ids(QUESTION, session)
  (reply,) = int8.engine.generate([ids], [session], NEW)
  full = int8.engine.logits([[*ids, *reply]], [session])[0][-NEW - 1 : -1]
  np.testing.assert_array_equal(np.argmax(full, axis=-1), reply)


def test_a_mesh_changes_nothing(folder, int8):
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  wide = sf.load(folder, mesh=mesh, int8=True)
  arrays = kernels(wide.export.params)
  up = next(a for name, a in arrays.items() if ".mlp.up." in name and a.dtype == np.int8)
  assert up.sharding.shard_shape(up.shape) == (3, 16, 16)
  np.testing.assert_allclose(scores(wide), scores(int8), atol=1e-4)


def test_scales_stay_float32_in_other_dtypes(folder):
  arrays = kernels(sf.load(folder, "bfloat16", int8=True).export.params)
  assert {a.dtype for a in arrays.values()} == {np.dtype("int8"), np.dtype("float32")}


def test_such_a_model_is_not_saved(int8, tmp_path):
  with pytest.raises(UserError, match="load it without `int8` to save it"):
    sf.save(int8, tmp_path / "again")
  assert not (tmp_path / "again").exists()


def test_without_the_package_it_says_what_to_install(folder, monkeypatch, capsys, tmp_path):
  monkeypatch.setitem(sys.modules, "qwix", None)
  assert main(["chat", "clip.mp4", "What?", f"--checkpoint={folder}", "--int8"]) == 1
  assert 'pip install ".[int8]"' in capsys.readouterr().err


def test_exact_weights_are_freed(folder):
  export = sf.load(folder).export
  before = kernels(export.params)
  engine = Engine(dataclasses.replace(export, params=with_int8_weights(export.params)))
  assert all(array.is_deleted() for array in before.values())
  assert not any(array.is_deleted() for array in jax.tree.leaves(engine.params))
