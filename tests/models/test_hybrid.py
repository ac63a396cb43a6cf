# SPDX-License-Identifier: Apache-2.0
"""What slow tokens may change, and what they must not; how a slow path starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.compressor import compress
from slowfast_jax.models.hybrid import (
  GATES,
  HybridConfig,
  SlowQuery,
  adapters_from_decoder,
  slow_query,
)
from slowfast_jax.models.layers import layer_of
from slowfast_jax.models.slowfast import graphdef_of, make_adapters
from slowfast_jax.shapes import FAST, QUERY_SETS
from tests.models.tiny import (
  CONFIG,
  ROWS,
  batch_of,
  config,
  geometry_of,
  random_model,
  random_params,
)


@functools.cache
def inputs(queries="text-only"):
  return batch_of(ROWS, geometry_of(config(hybrid={"queries": queries})))


def forward(model, batch, slow, read=None):
  """Hidden states where the fast tokens are made of `slow` and `read` is what is read beside."""
  with jax.disable_jit():  # Eager: the same small programs as in the comparison with the oracle.
    fast = compress(slow, batch.pooling, model.cfg.compressor.spatial_stride)
    kv = model.slow_kv(slow if read is None else read)
    readers = model.readers(kv, model.query(batch, slow.shape[2]))
    x = model.embed(batch.tokens, batch.kind, fast)
    hidden, _ = model.decoder(x, batch.positions, Causal(batch.segments), readers=readers)
  return np.asarray(hidden)


def opened(alpha, **changes):
  """A random model whose warm-up factor is set."""
  model = random_model(config(**changes))
  model.adapters.warm_up[...] = jnp.full_like(model.adapters.warm_up[...], alpha)
  return model


# --- The start ---


@pytest.mark.parametrize("queries", QUERY_SETS)
def test_with_alpha_zero_the_language_model_is_unchanged_to_the_bit(queries):
  batch, slow = inputs(queries)
  changes = {"hybrid": {"queries": queries}}
  plain = random_model(config(hybrid=None))
  model = opened(0.0, **changes)
  model.decoder = plain.decoder
  expected = forward(plain, batch, slow)
  np.testing.assert_array_equal(forward(model, batch, slow), expected)
  model.adapters.warm_up[...] += 0.5
  assert np.abs(forward(model, batch, slow) - expected).max() > 0.01


def test_only_alpha_gets_a_gradient_at_the_first_step():
  batch, slow = inputs()
  model = random_model()
  model.adapters = make_adapters(CONFIG.hybrid, CONFIG.decoder, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params).forward(batch, slow)))

  found = gradient(params).adapters
  assert np.abs(found.warm_up[...]).min() > 1e-3
  for path, leaf in nnx.to_flat_state(found):
    if path != ("warm_up",):
      assert not np.asarray(leaf[...]).any(), path


def test_a_fresh_gate_is_open_and_its_factor_shut():
  adapters = make_adapters(CONFIG.hybrid, CONFIG.decoder, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(adapters.warm_up[...], np.zeros((2, 1)))
  np.testing.assert_array_equal(adapters.gate.bias[...], np.ones((2, 1)))
  adapter = layer_of(adapters, 0)
  adapter.warm_up[...] = jnp.array([np.arctanh(0.5)])
  o = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 4, 4)), jnp.float32)
  np.testing.assert_allclose(adapter.gate_values(o).mean(), 0.5 * np.tanh(1), atol=0.03)


@pytest.mark.parametrize("gate", GATES)
def test_only_a_gate_that_warms_up_has_a_factor(gate):
  adapters = random_model(config(hybrid={"gate": gate})).adapters
  assert (adapters.warm_up is not None) == (gate == "dynamic-tanh-warmup")
  # A fresh gate of another kind is open at once.
  fresh = make_adapters(HybridConfig(3, gate=gate), CONFIG.decoder, rngs=nnx.Rngs(0))
  o = jnp.zeros((1, 1, 4, 4))
  expected = {"dynamic": 1.0, "dynamic-tanh": np.tanh(1), "dynamic-tanh-warmup": 0.0}[gate]
  np.testing.assert_allclose(layer_of(fresh, 0).gate_values(o), [[[expected]]], rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_slow_path_starts_as_the_self_attention_of_its_layer(bias):
  """Head j of the slow keys is head j of the layer's keys, at [j, 0]; of its values at [j, 1]."""
  model = random_model(config(decoder={"qkv_bias": bias}))
  adapters_from_decoder(model.adapters, model.decoder, (0, 3))
  attention = model.decoder.layers.attention
  pairs = [(model.adapters.kv.kernel, attention.k.kernel, attention.v.kernel)]
  if bias:
    pairs.append((model.adapters.kv.bias, attention.k.bias, attention.v.bias))
  for got, k, v in pairs:
    for number, depth in enumerate((0, 3)):
      for j in range(2):
        np.testing.assert_array_equal(got[...][number, ..., j, 0, :], k[...][depth, ..., j, :])
        np.testing.assert_array_equal(got[...][number, ..., j, 1, :], v[...][depth, ..., j, :])
  # Those are the keys and values that the layer would give a token, before any rotation.
  slow = jnp.ones((1, 1, 8))
  kv = model.slow_kv(slow[:, None])
  layer = layer_of(model.decoder.layers, 3)
  y = layer.input_norm(slow)
  np.testing.assert_allclose(kv.k[1], layer.attention.k(y), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(kv.v[1], layer.attention.v(y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_start_of_the_released_code_by_hand(bias):
  """With 2 heads: head 0 gets both heads of Wk as key and value, head 1 both heads of Wv."""
  model = random_model(config(decoder={"qkv_bias": bias}))
  adapters_from_decoder(model.adapters, model.decoder, (0, 3), reference=True)
  attention = model.decoder.layers.attention
  for part in ("kernel", "bias") if bias else ("kernel",):
    got = getattr(model.adapters.kv, part)[...]
    k, v = (getattr(own, part)[...] for own in (attention.k, attention.v))
    for number, depth in enumerate((0, 3)):
      heads = (k[depth, ..., 0, :], k[depth, ..., 1, :], v[depth, ..., 0, :], v[depth, ..., 1, :])
      np.testing.assert_array_equal(got[number, ..., 0, 0, :], heads[0])
      np.testing.assert_array_equal(got[number, ..., 0, 1, :], heads[1])
      np.testing.assert_array_equal(got[number, ..., 1, 0, :], heads[2])
      np.testing.assert_array_equal(got[number, ..., 1, 1, :], heads[3])


# --- What is read ---


def test_the_order_of_slow_tokens_means_nothing():
  batch, slow = inputs()
  model = random_model()
  shuffled = np.random.default_rng(0).permuted(np.arange(10 * 4).reshape(10, 4), axis=1)
  # Within each frame, and whole frames together with whose they are.
  order = np.random.default_rng(1).permutation(10)
  within = jnp.take_along_axis(slow, jnp.asarray(shuffled % 4)[None, :, :, None], axis=2)
  expected = forward(model, batch, slow)
  np.testing.assert_allclose(forward(model, batch, slow, within), expected, rtol=1e-5, atol=1e-5)
  moved = dataclasses.replace(
    batch, frame_segments=batch.frame_segments[:, order], pooling=batch.pooling[:, :, order]
  )
  got = forward(model, moved, slow[:, order])
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_slow_tokens_matter_to_those_who_read_them():
  batch, slow = inputs()
  model = random_model()
  without = forward(model, batch, slow, jnp.zeros_like(slow))
  changed = np.abs(without - forward(model, batch, slow)).max(axis=-1) > 1e-4
  kind, segments = np.asarray(batch.kind), np.asarray(batch.segments)
  # In each row, samples that have fast positions: their words, and what comes behind a word.
  expected = np.zeros_like(changed)
  for row, segment in ((r, s) for r in range(len(ROWS)) for s in range(1, 5)):
    mine = segments[row] == segment
    if (kind[row, mine] == FAST).any():
      expected[row, mine] = np.cumsum(kind[row, mine] != FAST) > 0
  assert not expected.all()
  np.testing.assert_array_equal(changed[segments > 0], expected[segments > 0])


def test_slow_tokens_of_padding_have_no_effect():
  batch, slow = inputs()
  model = random_model()
  padding = np.asarray(batch.frame_segments == 0)[:, :, None, None]
  assert padding.any()
  assert np.abs(np.asarray(slow)[np.broadcast_to(padding, slow.shape)]).min() == 1e3
  got = forward(model, batch, jnp.where(padding, 0.0, slow))
  np.testing.assert_array_equal(got, forward(model, batch, slow))


@pytest.mark.parametrize("queries", QUERY_SETS)
def test_packed_samples_do_not_touch_each_other(queries):
  """Row 4 holds four samples, one of them text alone; each in turn is replaced by another."""
  batch, slow = inputs(queries)
  model = random_model(config(hybrid={"queries": queries}))
  expected = forward(model, batch, slow)
  segments, frame_segments = np.asarray(batch.segments), np.asarray(batch.frame_segments)
  for segment in range(1, 5):
    mine, my_frames = segments == segment, frame_segments == segment
    others = (segments[4] > 0) & ~mine[4]
    other = dataclasses.replace(
      batch, tokens=jnp.where(mine, (batch.tokens + 5) % 24, batch.tokens)
    )
    got = forward(model, other, jnp.where(my_frames[:, :, None, None], -slow + 1, slow))
    np.testing.assert_array_equal(got[4, others], expected[4, others])
    assert (np.abs(got - expected).max(axis=-1) > 1e-4)[4, mine[4]].all()


def test_a_text_sends_no_gradient_to_slow_tokens_of_its_row():
  batch, slow = inputs()
  graphdef, params = graphdef_of(CONFIG), random_params(CONFIG, 0)

  @jax.jit
  @functools.partial(jax.grad, argnums=1)
  def gradient(params, slow, weights):
    hidden = nnx.merge(graphdef, params).forward(batch, slow)
    return jnp.sum(jnp.sin(hidden) * weights[:, :, None])

  for segment in (1, 2, 3, 4):  # The third is the text.
    weights = (batch.segments == segment) * (jnp.arange(len(ROWS)) == 4)[:, None]
    found = np.abs(gradient(params, slow, weights.astype(jnp.float32))).max(axis=(2, 3))
    assert np.isfinite(found).all()
    expected = np.zeros(found.shape, bool)
    expected[4] = batch.frame_segments[4] == segment
    np.testing.assert_array_equal(found > 1e-7, expected)


def test_who_does_not_query_keeps_the_output_of_self_attention():
  adapter = layer_of(random_model().adapters, 0)
  rng = np.random.default_rng(0)
  q, o = (jnp.asarray(rng.normal(size=(2, 6, 4, 4)), jnp.float32) for _ in range(2))
  k, v = (jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32) for _ in range(2))
  index = jnp.array([[5, 0, -1, -1], [2, 3, -1, 4]])
  # In the second row position 3 belongs to a sample without slow tokens, 4 to padding.
  query = SlowQuery(
    index, jnp.array([[1, 1, 0, 0], [2, 3, 0, 0]]), jnp.array([[1, 1, 0, 1, 1], [2, 2, 2, 0, 1]])
  )
  change = np.abs(adapter(q, o, (k, v), query) - o).max(axis=(2, 3))
  np.testing.assert_array_equal(change > 1e-3, [[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(change[change <= 1e-3], 0)


def test_segments_of_queries_and_of_slow_tokens_by_hand():
  text_index, segments = jnp.array([[1, 3, -1]]), jnp.array([[4, 4, 5, 5, 0]])
  query = slow_query(text_index, segments, jnp.array([[4, 5, 0]]), 2)
  np.testing.assert_array_equal(query.text_index, text_index)
  np.testing.assert_array_equal(query.q_segments, [[4, 5, 0]])
  np.testing.assert_array_equal(query.kv_segments, [[4, 4, 5, 5, 0, 0]])


# --- Configuration ---


@pytest.mark.parametrize(
  ("cfg", "num_layers", "depths"),
  [
    (HybridConfig(), 28, (0, 8, 16, 24)),
    (HybridConfig(min_depth=4), 28, (4, 12, 20)),
    (HybridConfig(max_depth=16), 28, (0, 8)),
    (HybridConfig(), 9, (0, 8)),
    (HybridConfig(every=1, min_depth=1, max_depth=3), 28, (1, 2)),
    (HybridConfig(min_depth=28), 28, ()),
  ],
)
def test_depths_of_hybrid_layers(cfg, num_layers, depths):
  assert cfg.layers(num_layers) == depths


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"gate": "static"}, r"gate must be one of \('dynamic', .*got 'static'"),
    ({"queries": "vision"}, r"queries must be one of \('text-only', .*got 'vision'"),
    ({"every": 0}, "every must be >= 1 and min_depth >= 0, got 0 and 0"),
    ({"min_depth": -1}, "every must be >= 1 and min_depth >= 0, got 8 and -1"),
  ],
)
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    HybridConfig(**changes)


def test_without_hybrid_layers_there_is_nothing_to_read():
  for changes in ({"hybrid": None}, {"hybrid": {"min_depth": 4}}):
    model = random_model(config(**changes))
    assert model.adapters is None
    assert model.cfg.hybrid_layers == ()
    assert model.slow_kv(jnp.zeros((1, 1, 4, 8))) is None
    assert model.readers(None, None) == {}
