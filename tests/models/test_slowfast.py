# SPDX-License-Identifier: Apache-2.0
"""The whole model against the equations in NumPy, for every gate, query set and kind of row."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.hybrid import GATES
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.shapes import QUERY_SETS
from slowfast_jax.sharding import make_mesh, sharding_of
from tests.models import oracle
from tests.models.tiny import (
  CONFIG,
  LENGTH,
  ROWS,
  TOKENS_PER_FRAME,
  batch_of,
  config,
  geometry_of,
  random_model,
  random_params,
  weights_of,
)


def check(cfg):
  """Hidden states and logits of every sample equal the oracle's."""
  model, geometry = random_model(cfg), geometry_of(cfg)
  weights = weights_of(model)
  batch, slow = batch_of(ROWS, geometry)
  # Eager: one small program for each operation, and all configurations share them.
  with jax.disable_jit():
    hidden = model.forward(batch, slow)
    scores = np.asarray(model.decoder.logits(hidden))
  hidden, segments = np.asarray(hidden), np.asarray(batch.segments)
  assert np.isfinite(hidden).all()
  for row, cases in enumerate(ROWS):
    assert segments[row].max() == len(cases)
    for segment, case in enumerate(cases, start=1):
      expected, tokens = oracle.logits(
        weights, cfg, case.ids, case.videos(), LENGTH, tokens_too=True
      )
      where = segments[row] == segment
      message = f"row {row}, sample {segment}"
      np.testing.assert_allclose(hidden[row, where], tokens, 1e-5, 1e-5, err_msg=message)
      np.testing.assert_allclose(scores[row, where], expected, 1e-5, 1e-5, err_msg=message)


STRIDES = [
  {"sampling_stride": 1, "temporal_stride": 2, "min_fast_frames": 2},
  {"sampling_stride": 3, "temporal_stride": 1, "min_fast_frames": 2},
  {"sampling_stride": 2, "temporal_stride": 3, "min_fast_frames": 3, "spatial_stride": 2},
]


@pytest.mark.parametrize("strides", STRIDES, ids=["average", "sample", "all-three"])
@pytest.mark.parametrize("queries", QUERY_SETS)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_and_query_set(gate, queries, strides):
  check(config(hybrid={"gate": gate, "queries": queries}, compressor=strides))


@pytest.mark.parametrize(
  "changes",
  [
    {"hybrid": None},
    {"hybrid": {"every": 1}},
    {"hybrid": {"every": 2, "min_depth": 1, "max_depth": 3}},
    {"hybrid": {"min_depth": 4}},
    {"decoder": {"qk_norm": True, "qkv_bias": False}},
    {"decoder": {"tie_embeddings": True, "norm_eps": 0.1}},
    {"decoder": {"num_kv_heads": 1, "rope_scaling": LlamaRopeScaling(4, 1, 3, 64)}},
  ],
  ids=["plain", "every-layer", "one-layer", "none-deep-enough", "qwen3", "tied", "llama"],
)
def test_every_variant_of_the_decoder(changes):
  check(config(**changes))


def test_samples_of_a_mixed_batch_equal_each_alone():
  model, geometry = random_model(), geometry_of(CONFIG)
  batch, slow = batch_of(ROWS, geometry)
  with jax.disable_jit():
    together = np.asarray(model.forward(batch, slow))
  alone, segments = jax.jit(model.forward), np.asarray(batch.segments)
  for row, cases in enumerate(ROWS):
    for segment, case in enumerate(cases, start=1):
      got = together[row, segments[row] == segment]
      expected = alone(*batch_of([[case]], geometry))[0, : len(got)]
      message = f"row {row}, sample {segment}"
      np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5, err_msg=message)


def test_a_compiled_program_is_the_same():
  geometry = geometry_of(CONFIG)
  batch, slow = batch_of(ROWS, geometry)
  model = random_model()
  with jax.disable_jit():
    eager = model.forward(batch, slow)
  jitted = jax.jit(lambda batch, slow: random_model().forward(batch, slow))(batch, slow)
  np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-5)


CONVNEXT = ConvNeXtConfig(image_size=16, depths=(1, 2), widths=(4, 6))


@pytest.mark.parametrize(
  ("vision", "projector"),
  [
    ({"family": "siglip"}, "mlp2x_gelu"),
    ({"family": "clip", "select_layer": -1, "norm_eps": 0.01}, "linear"),
    (CONVNEXT, "mlp2x_gelu"),
  ],
  ids=["siglip", "clip", "convnext"],
)
def test_pixels_become_slow_tokens(vision, projector):
  """Videos are pooled before the compressor, a still image is not."""
  cfg = config(vision=vision, compressor={"video_pooling_stride": 2}, projector=projector)
  model, rng = random_model(cfg), np.random.default_rng(0)
  encode = jax.jit(lambda frames: model.encode(frames, jnp.float32))
  for count, tokens_per_frame in ((3, 1), (1, 4)):
    size = cfg.vision.image_size
    frames = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    slow = encode(frames[None])
    assert slow.shape == (1, count, tokens_per_frame, 8)
    expected = oracle.slow_tokens(weights_of(model), cfg, frames)
    np.testing.assert_allclose(slow[0], expected, rtol=1e-5, atol=1e-5)


# --- Frames in chunks ---


@functools.cache
def encoder(vision=CONFIG.vision):
  """(structure, weights) of a model, of which only the encoder and projector run."""
  cfg = config(vision=vision, compressor={"video_pooling_stride": 2})
  return graphdef_of(cfg), random_params(cfg, 0)


def loss(params, graphdef, frames, weights, chunk):
  """Whatever depends on every slow token, and the slow tokens."""
  slow = nnx.merge(graphdef, params).encode(frames, jnp.float32, chunk)
  return jnp.sum(jnp.sin(slow) * weights), slow


@pytest.mark.parametrize("vision", [CONFIG.vision, CONVNEXT], ids=["vit", "convnext"])
def test_frames_in_chunks_give_the_same_slow_tokens_and_gradients(vision):
  graphdef, params = encoder(vision)
  rng = np.random.default_rng(0)
  size = vision.image_size
  frames = jnp.asarray(rng.integers(0, 256, (2, 5, size, size, 3)), jnp.uint8)
  weights = jnp.asarray(rng.normal(0, 1, (2, 5, 1, 8)), jnp.float32)
  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 4))
  (_, expected), gradient = run(params, graphdef, frames, weights, None)
  for chunk in (1, 4, 5, 10):  # 4: the last of 3 chunks has 2 frames and padding.
    (_, slow), got = run(params, graphdef, frames, weights, chunk)
    np.testing.assert_allclose(slow, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_normalised_frames_in_chunks():
  model = random_model()
  pixels = jax.random.normal(jax.random.key(0), (1, 5, 4, 4, 3))
  expected = model.encode_pixels(pixels)
  np.testing.assert_allclose(model.encode_pixels(pixels, 2), expected, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="frame_chunk must be at least 1, got 0"):
    model.encode_pixels(pixels, 0)


def temporary_bytes(program, frames, chunk):
  graphdef, params = encoder(dataclasses.replace(CONVNEXT, image_size=32))
  weights = jax.ShapeDtypeStruct((1, frames, 4, 8), jnp.float32)
  frames = jax.ShapeDtypeStruct((1, frames, 32, 32, 3), jnp.uint8)
  lowered = jax.jit(program, static_argnums=(1, 4)).lower(params, graphdef, frames, weights, chunk)
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_the_encoder_needs_memory_for_one_chunk_alone():
  """Measured by the compiler; a backward pass has the slow tokens themselves and their gradient."""

  def slow(params, graphdef, frames, weights, chunk):
    return nnx.merge(graphdef, params).encode(frames, jnp.float32, chunk)

  gradient = jax.grad(lambda *args: loss(*args)[0])
  for program, kept in ((slow, 0), (gradient, 2 * 4 * 8 * 4)):
    few, many = (temporary_bytes(program, frames, 8) for frames in (64, 1000))
    assert many <= few + 936 * kept + 4096  # A frame has 3072 bytes.
    assert temporary_bytes(program, 64, None) > 4 * few


def test_devices_encode_their_own_frames_of_every_chunk():
  graphdef, params = encoder()
  mesh = make_mesh({"data": 8})
  frames = jax.ShapeDtypeStruct(
    (1, 32, 4, 4, 3), jnp.uint8, sharding=sharding_of((None, "frames"), (1, 32), mesh)
  )

  def slow(params, frames):
    return nnx.merge(graphdef, params).encode(frames, jnp.float32, 16)

  text = jax.jit(slow).lower(params, frames).compile().as_text()
  assert "while" in text
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


def test_a_model_encodes_its_frames():
  batch, _ = batch_of(ROWS, geometry_of(CONFIG))
  frames = jax.random.randint(jax.random.key(0), batch.frames.shape, 0, 256).astype(jnp.uint8)
  batch = dataclasses.replace(batch, frames=frames)
  model = random_model()
  with jax.disable_jit():
    expected = model.forward(batch, model.encode(frames, jnp.float32))
    np.testing.assert_array_equal(model(batch), expected)


@pytest.mark.parametrize(
  "sizes", [{"context": 8}, {"data": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}]
)
def test_a_mesh_changes_neither_hidden_states_nor_gradients(sizes):
  """Ten frames of four tokens: spread over eight devices, a frame may lie on two."""
  graphdef, params = graphdef_of(CONFIG), random_params(CONFIG, 0)
  batch, slow = batch_of(ROWS, geometry_of(CONFIG))
  weights = jax.random.normal(jax.random.key(0), (len(ROWS), LENGTH, 8))

  def loss(params, slow):
    hidden = nnx.merge(graphdef, params).forward(batch, slow)
    return jnp.sum(hidden * weights), hidden

  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (_, expected), expected_gradients = jax.jit(run)(params, slow)
  with jax.set_mesh(make_mesh(sizes)):
    (_, hidden), gradients = jax.jit(run)(params, slow)
    kv = jax.jit(lambda params, slow: nnx.merge(graphdef, params).slow_kv(slow))(params, slow)
  np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
  for got, one in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
    np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-5 * np.abs(one).max() + 1e-8)
  part = kv.k.addressable_shards[0].data.shape
  assert part[2] == slow.shape[1] * TOKENS_PER_FRAME // sizes.get("context", 1)


def test_all_is_computed_in_the_type_that_is_asked_for():
  geometry = geometry_of(CONFIG)
  batch, _ = batch_of(ROWS, geometry)
  model = random_model()
  half = jax.eval_shape(lambda b: model(b, dtype=jnp.bfloat16), batch)
  assert (half.dtype, half.shape) == (jnp.bfloat16, (len(ROWS), LENGTH, 8))
  assert jax.eval_shape(model.decoder.logits, half).dtype == jnp.float32
  assert jax.eval_shape(lambda b: model(b), batch).dtype == jnp.float32


def test_the_structure_of_a_model_is_made_of_shapes():
  params = random_params(CONFIG, 0)
  assert nnx.graphdef(nnx.merge(graphdef_of(CONFIG), params)) == graphdef_of(CONFIG)


def test_an_unknown_projector_is_found_before_a_model_is_made():
  with pytest.raises(ValueError, match="projector must be 'linear' or 'mlp<n>x_gelu', got 'mlp'"):
    config(projector="mlp")
