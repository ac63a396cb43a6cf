# SPDX-License-Identifier: Apache-2.0
"""Safetensors: read as the library writes it, written as the library reads it; damage is told."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slowfast_jax.checkpoints.safetensors_files import (
  RawTensor,
  SafetensorsFiles,
  SafetensorsWriter,
)
from slowfast_jax.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
  "a": RNG.normal(size=(6, 4)).astype(np.float32),
  "b": RNG.normal(size=(3,)).astype(ml_dtypes.bfloat16),
  "c": RNG.normal(size=(2, 3, 1)).astype(np.float16),
  "scalar": np.array(3.0, np.float32),
}


@pytest.fixture
def sharded(tmp_path):
  save_file({"a": ARRAYS["a"]}, tmp_path / "model-1.safetensors")
  save_file({"b": ARRAYS["b"], "c": ARRAYS["c"]}, tmp_path / "model-2.safetensors")
  weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
  index = {"weight_map": weight_map}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  return tmp_path


def test_the_librarys_files_are_read_whole_and_by_rows(tmp_path):
  save_file(ARRAYS, tmp_path / "model.safetensors")
  with SafetensorsFiles(tmp_path) as files:
    for name, array in ARRAYS.items():
      found = files.read(name)
      assert found.dtype == array.dtype
      np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(files.read("a", 2, 5), ARRAYS["a"][2:5])
    assert files.read_raw("b") == RawTensor("BF16", (3,), ARRAYS["b"].tobytes())


def test_the_library_reads_what_is_written_in_any_order_and_by_rows(tmp_path):
  kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
  described = {name: (kinds[x.dtype.name], x.shape) for name, x in ARRAYS.items()}
  writer = SafetensorsWriter(tmp_path, {**described, "ids": ("I64", (2,))})
  writer.write_raw("ids", RawTensor("I64", (2,), np.arange(2).tobytes()))
  writer.write("a", ARRAYS["a"][4:], 4)
  for name in ("scalar", "c", "b"):
    writer.write(name, ARRAYS[name])
  writer.write("a", ARRAYS["a"][:4])
  writer.close()
  found = load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(found.pop("ids"), [0, 1])
  assert {name: x.tobytes() for name, x in found.items()} == {
    name: x.tobytes() for name, x in ARRAYS.items()
  }


def test_shards_are_one_checkpoint(sharded):
  with SafetensorsFiles(sharded) as files:
    assert set(files.tensors) == {"a", "b", "c"}
    np.testing.assert_array_equal(files.read("c"), ARRAYS["c"])


def test_one_file_may_have_any_name(tmp_path):
  save_file(ARRAYS, tmp_path / "open_clip_model.safetensors")
  assert set(SafetensorsFiles(tmp_path).tensors) == set(ARRAYS)
  assert set(SafetensorsFiles(tmp_path / "open_clip_model.safetensors").tensors) == set(ARRAYS)


def edit_index(folder, change):
  file = folder / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  change(index)
  file.write_text(json.dumps(index))


def cut(file):
  file.write_bytes(file.read_bytes()[:-1])


def claim(file, header):
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda d: (d / "model-2.safetensors").unlink(), "1 of its shards are missing: model-2"),
    (lambda d: cut(d / "model-2.safetensors"), "model-2.safetensors: cut off or damaged"),
    (lambda d: (d / "model-1.safetensors").write_bytes(b"abc"), "its start is damaged (3 bytes)"),
    (lambda d: (d / "model-1.safetensors").write_bytes(b"\xff" * 99), "its start is damaged"),
    (
      lambda d: claim(d / "model-1.safetensors", {"a": {"dtype": "F32", "shape": [3]}}),
      "header is damaged: 'data_offsets'",
    ),
    (
      lambda d: claim(
        d / "model-1.safetensors", {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
      ),
      "F32 [3] does not take 8 bytes",
    ),
    (
      lambda d: claim(
        d / "model-1.safetensors", {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}
      ),
      "unknown dtype 'F4'",
    ),
    (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not an index of shards"),
    (lambda d: edit_index(d, lambda i: i.pop("weight_map")), "not an index of shards"),
    (
      lambda d: edit_index(d, lambda i: i["weight_map"].update(d="model-1.safetensors")),
      "1 tensors of model.safetensors.index.json are in none of its shards: d",
    ),
    (
      lambda d: save_file({"a": ARRAYS["a"], "b": ARRAYS["b"]}, d / "model-1.safetensors"),
      "the tensor b is also in model-1.safetensors",
    ),
    (lambda d: (d / "model.safetensors.index.json").unlink(), "2 files (model-1.safetensors, "),
  ],
)
def test_damage_is_explained(sharded, damage, words):
  damage(sharded)
  with pytest.raises(UserError) as error:
    SafetensorsFiles(sharded)
  assert words in str(error.value)
  assert str(sharded) in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_not_opened_and_the_way_out_is_told(tmp_path, name):
  (tmp_path / name).write_bytes(b"pickle")
  for path in (tmp_path, tmp_path / name):
    with pytest.raises(UserError, match="is a pickle, .*safetensors.torch.save_file"):
      SafetensorsFiles(path)


def test_nothing_there(tmp_path):
  with pytest.raises(UserError, match="no safetensors in it. Expected model.safetensors"):
    SafetensorsFiles(tmp_path)
  with pytest.raises(UserError, match="there is no such folder or file"):
    SafetensorsFiles(tmp_path / "none")
