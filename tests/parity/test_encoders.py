# SPDX-License-Identifier: Apache-2.0
"""Vision encoders of Hugging Face and timm, through the converter: every hidden state."""

import dataclasses
from pathlib import Path

import einops
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from slowfast_jax.checkpoints.hf_parts import load_parts
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.models.vit import ViT
from tests.parity import oracles

# Of timm, recorded by the script that is there.
TIMM = Path(__file__).parent / "timm_convnext"
SIZE = oracles.IMAGE_SIZE
PIXELS = np.random.default_rng(0).normal(0, 1, (2, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
  """The smallest language model, which a whole model needs."""
  folder = tmp_path_factory.mktemp("qwen2")
  oracles.decoder("qwen2", folder)
  return folder


def channels_first():
  return torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def loaded_encoder(export):
  return nnx.merge(graphdef_of(export.model), export.params).vision


def vit_at(cfg, params, depth):
  """Hidden state `depth`: what an encoder of that many blocks gives."""
  cfg = dataclasses.replace(cfg, select_layer=depth)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
  params = nnx.State({**params, "blocks": jax.tree.map(lambda x: x[:depth], params["blocks"])})
  return jax.jit(lambda params, pixels: nnx.merge(graphdef, params)(pixels))(params, PIXELS)


@pytest.mark.parametrize("name", oracles.TOWERS)
def test_every_block_of_a_transformer_gives_the_same(name, tmp_path, language_model):
  model = oracles.tower(name, tmp_path)
  export = load_parts(language_model, tmp_path, select_layer=-1)
  with torch.no_grad():
    expected = model(channels_first(), output_hidden_states=True).hidden_states
  assert len(expected) == oracles.VISION["num_hidden_layers"] + 1
  for depth, theirs in enumerate(expected):
    theirs = theirs[:, 1:] if "clip" in name else theirs  # Without the class token.
    ours = vit_at(export.model.vision, export.params["vision"], depth)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=f"hidden state {depth}")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_the_selected_hidden_state_is_the_input_of_the_last_block(name, tmp_path, language_model):
  model = oracles.tower(name, tmp_path)
  encoder = loaded_encoder(load_parts(language_model, tmp_path))
  with torch.no_grad():
    expected = model(channels_first(), output_hidden_states=True).hidden_states[-2]
  expected = expected[:, 1:] if name == "clip" else expected
  np.testing.assert_allclose(jax.jit(encoder)(PIXELS), expected, rtol=0, atol=1e-5)


def test_every_stage_of_a_convnext_gives_the_same(language_model):
  encoder = loaded_encoder(load_parts(language_model, TIMM))
  with np.load(TIMM / "outputs.npz") as recorded:
    expected = list(recorded.values())

  def states(pixels):
    x = encoder.stem(pixels)
    found = [x]
    for stage in encoder.stages:
      x = stage(x)
      found.append(x)
    return found, encoder(pixels)

  found, tokens = jax.jit(states)(PIXELS)
  assert len(found) == len(expected)
  for number, (ours, theirs) in enumerate(zip(found, expected)):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=f"output {number}")
  # The raw output of the last stage: neither a norm nor the head of the classifier.
  last = einops.rearrange(expected[-1], "B y x E -> B (y x) E")
  np.testing.assert_allclose(tokens, last, rtol=0, atol=1e-5)
