# SPDX-License-Identifier: Apache-2.0
"""`slowfast convert`: both ways, in memory that does not grow, and never half a result."""

import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import official as by_hand
from checkpoints.official import official
from safetensors.numpy import load_file

from slowfast_jax.checkpoints.store import load_export
from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.cli.main import main


def convert(*words):
  return main(["convert", *map(str, words)])


def test_to_orbax_and_back(tmp_path, capsys):
  made = official("siglip", "bfloat16")
  made.write(tmp_path / "hf")
  assert convert(tmp_path / "hf", tmp_path / "orbax", "--to", "orbax", "--dtype", "float32") == 0
  assert convert(tmp_path / "orbax", tmp_path / "b", "--to=huggingface", "--dtype=bfloat16") == 0
  assert "MB of parameters" in capsys.readouterr().out
  found = load_file(tmp_path / "b/model.safetensors")
  assert {name: x.tobytes() for name, x in found.items()} == {
    name: x.tobytes() for name, x in made.tensors.items()
  }


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (["hf", "--to=orbax"], 2, "expected SRC and DST, got 1 folders"),
    (["hf", "new", "--to=onnx"], 2, "invalid choice: 'onnx'"),
    (["hf", "new", "--to=huggingface"], 2, "hf is of the format huggingface already"),
    (["hf", "new", "--to=orbax", "--llm=x"], 2, "--llm and --vision go together"),
    (["hf", "new", "--to=orbax", "--frames=64"], 2, "are for a new model"),
    (["a", "b", "--to=orbax", "--llm=x", "--vision=y"], 2, "expected DST alone, got 2"),
    (["hf", "full", "--to=orbax"], 1, "full: it is there already; give another name"),
    (["nowhere", "new", "--to=orbax"], 1, "nowhere: there is no such folder"),
    (["new", "--to=orbax", "--llm=hf", "--vision=hf"], 1, "model_type must be one of"),
  ],
)
def test_what_cannot_be_done_is_told(tmp_path, capsys, monkeypatch, words, code, message):
  monkeypatch.chdir(tmp_path)
  official().write(tmp_path / "hf")
  (tmp_path / "full").mkdir()
  (tmp_path / "full/notes.txt").write_text("mine")
  assert convert(*words) == code
  assert message in capsys.readouterr().err
  assert not (tmp_path / "new").exists()


# --- Real processes ---

MB = 1 << 20
# Embeddings of 72 MB, twice, and stacks of layers of the same size.
LARGE = {
  "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
  "intermediate_size": 6144, "num_hidden_layers": 12, "vocab_size": 70000,
  "cross_attn_max_layer_depth": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """A checkpoint of 390 MB, whose numbers do not compress, and its tensors."""
  config = {**by_hand.CONFIG, **by_hand.TOWERS["siglip"]["config"], **LARGE}
  rng = np.random.default_rng(0)
  tensors = {
    name: np.frombuffer(rng.bytes(2 * int(np.prod(shape))), ml_dtypes.bfloat16).reshape(shape)
    for name, shape in by_hand.shapes(config, "siglip").items()
  }
  made = by_hand.Official(config, by_hand.TOWERS["siglip"]["file"], tensors)
  return made.write(tmp_path_factory.mktemp("large") / "hf", shards=3), tensors


def start(*words) -> subprocess.Popen:
  environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
  command = [sys.executable, "-m", "slowfast_jax.cli.main", "convert", *map(str, words)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def peak(*words) -> int:
  """The most memory that a conversion ever had."""
  process = start(*words)
  _, status, usage = os.wait4(process.pid, 0)
  assert status == 0
  return usage.ru_maxrss * 1024


def test_memory_does_not_grow_with_the_checkpoint(large, tmp_path):
  folder, tensors = large
  total = sum(tensor.nbytes for tensor in tensors.values())
  assert total > 350 * MB
  official("siglip", "bfloat16").write(tmp_path / "small")
  least = peak(tmp_path / "small", tmp_path / "small-orbax", "--to", "orbax")
  there = peak(folder, tmp_path / "orbax", "--to", "orbax")
  back = peak(tmp_path / "orbax", tmp_path / "back", "--to", "huggingface")
  # Parts of 64 MB, of which Orbax holds up to three while it writes.
  assert there - least < 0.75 * total
  assert back - least < 0.6 * total
  found = load_file(tmp_path / "back/model.safetensors")
  assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())


def test_a_killed_conversion_leaves_nothing_under_the_name_and_starts_over(large, tmp_path):
  folder, tensors = large
  process = start(folder, tmp_path / "orbax", "--to", "orbax")
  deadline = time.monotonic() + 120
  while not (tmp_path / "orbax.new/params/part-00001").exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  assert [path.name for path in tmp_path.iterdir()] == ["orbax.new"]
  assert convert(folder, tmp_path / "orbax", "--to", "orbax") == 0
  assert [path.name for path in tmp_path.iterdir()] == ["orbax"]
  norm = flatten(load_export(tmp_path / "orbax").params)["decoder.norm.scale"]
  assert np.asarray(norm).tobytes() == tensors["model.norm.weight"].tobytes()
