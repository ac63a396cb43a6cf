# SPDX-License-Identifier: Apache-2.0
"""Language models of Hugging Face, through the converter: every hidden state, and the scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from slowfast_jax.checkpoints.hf_parts import load_parts
from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.layers import layer_of
from slowfast_jax.models.rope import frequencies, rope_table
from slowfast_jax.models.slowfast import graphdef_of
from tests.parity import oracles

# The samples of each row, packed and then padded: lengths, no two alike.
ROWS = ((50,), (7, 20, 3), (1, 31), ())
LENGTH = 52


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """The smallest vision encoder, which a whole model needs."""
  folder = tmp_path_factory.mktemp("siglip")
  oracles.tower("siglip", folder)
  return folder


def batch():
  """tokens, positions and segments [B, T]."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, oracles.VOCAB_SIZE, (len(ROWS), LENGTH))
  positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, lengths in enumerate(ROWS):
    starts = np.cumsum([0, *lengths])
    for segment, (start, length) in enumerate(zip(starts, lengths), 1):
      positions[row, start : start + length] = np.arange(length)
      segments[row, start : start + length] = segment
  return tokens, positions, segments


def hidden_states(graphdef, params, tokens, positions, segments):
  """The input of every layer and the output of the last, after the norm; and the scores."""
  decoder = nnx.merge(graphdef, params).decoder
  cfg, mask = decoder.cfg, Causal(segments)
  x = embedded = decoder.embed(tokens, jnp.float32)
  rope = rope_table(positions, frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling))
  states = []
  for depth in range(cfg.num_layers):
    states.append(x)
    x, _ = layer_of(decoder.layers, depth)(x, rope, mask)
  last, _ = decoder(embedded, positions, mask)
  return [*states, last], decoder.logits(last)


@pytest.mark.parametrize("name", oracles.DECODERS)
def test_every_layer_gives_the_same(name, tmp_path, encoder):
  model = oracles.decoder(name, tmp_path)
  export = load_parts(tmp_path, encoder)
  arrays = batch()
  run = jax.jit(hidden_states, static_argnums=0)
  states, scores = run(graphdef_of(export.model), export.params, *map(jnp.asarray, arrays))
  for row, lengths in enumerate(ROWS):
    for segment in range(1, len(lengths) + 1):
      where = arrays[2][row] == segment
      with torch.no_grad():
        ids = torch.tensor(arrays[0][row, where])[None]
        expected = model(ids, output_hidden_states=True)
      assert len(expected.hidden_states) == len(states)
      for depth, (ours, theirs) in enumerate(zip(states, expected.hidden_states)):
        np.testing.assert_allclose(
          ours[row, where], theirs[0], rtol=0, atol=1e-5, err_msg=f"hidden state {depth}"
        )
      np.testing.assert_allclose(scores[row, where], expected.logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_config_of_before_transformers_5_says_the_same(name, tmp_path, encoder):
  """Published folders have rope_theta and rope_scaling in place of rope_parameters."""
  oracles.decoder(name, tmp_path)
  file = tmp_path / "config.json"
  expected = load_parts(tmp_path, encoder).model.decoder
  config = json.loads(file.read_text())
  scaling = config.pop("rope_parameters")
  config["rope_theta"] = scaling.pop("rope_theta")
  config["rope_scaling"] = scaling if name == "llama" else None
  config["torch_dtype"] = config.pop("dtype")
  file.write_text(json.dumps(config))
  assert (expected.rope_scaling is not None) == (name == "llama")
  assert load_parts(tmp_path, encoder).model.decoder == expected
