# SPDX-License-Identifier: Apache-2.0
"""The language model: who sees whom, one scan as a plain loop, the cache, recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.cache import KVCache, cache_mask
from slowfast_jax.models.decoder import Decoder, _runs
from slowfast_jax.models.layers import layer_of
from slowfast_jax.models.rope import frequencies, rope_table
from tests.models.tiny import CONFIG, random_module

CFG = CONFIG.decoder
T = 10
X = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, T, CFG.width)), jnp.float32)
# Two samples and padding in a row; one sample and padding.
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0], [1] * 8 + [0, 0]])
POSITIONS = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 0], [*range(8), 0, 0]])


@pytest.fixture(scope="module")
def decoder():
  return random_module(lambda r: Decoder(CFG, rngs=r))


def read(q, o):
  """Stands for a hybrid layer: depends on both that it is given."""
  return o + 0.3 * jnp.tanh(q) * o


READERS = {1: read, 3: read}


def test_gradients_flow_back_to_earlier_positions_of_the_same_sample(decoder):
  weights = jnp.asarray(np.random.default_rng(1).normal(size=CFG.width), jnp.float32)
  mask = Causal(SEGMENTS)

  @jax.jit
  @jax.grad
  def gradient(x, row, t):
    hidden, _ = decoder(x, POSITIONS, mask, readers=READERS)
    return jnp.dot(hidden[row, t], weights)

  for row, t in ((0, 0), (0, 3), (0, 4), (0, 6), (1, 5)):
    reached = np.abs(gradient(X, row, t)).max(axis=-1) > 1e-6
    expected = np.zeros((2, T), bool)
    expected[row, : t + 1] = SEGMENTS[row, : t + 1] == SEGMENTS[row, t]
    np.testing.assert_array_equal(reached, expected, err_msg=f"{row, t}")


def test_stacked_layers_are_a_plain_loop(decoder):
  mask = Causal(SEGMENTS)
  hidden, cache = jax.jit(lambda x: decoder(x, POSITIONS, mask, readers=READERS))(X)
  rope = rope_table(POSITIONS, frequencies(CFG.head_dim, CFG.rope_theta, None))
  x = X
  with jax.disable_jit():
    for i in range(CFG.num_layers):
      x, (k, v) = layer_of(decoder.layers, i)(x, rope, mask, read_slow=READERS.get(i))
      np.testing.assert_allclose(cache.k[i], k, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(cache.v[i], v, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden, decoder.norm(x), rtol=1e-5, atol=1e-5)


def test_recomputing_in_the_backward_pass_changes_nothing(decoder):
  graphdef, params = nnx.split(decoder)
  mask = Causal(SEGMENTS)

  def loss(params, x, policy):
    hidden, _ = nnx.merge(graphdef, params)(x, POSITIONS, mask, readers=READERS, policy=policy)
    return jnp.sum(jnp.sin(hidden))

  programs = [
    jax.jit(jax.value_and_grad(lambda p, x, policy=policy: loss(p, x, policy), argnums=(0, 1)))
    for policy in ("none", "full")
  ]
  # One for each hybrid layer, one for the plain layers before, one for those between.
  assert [str(p.trace(params, X).jaxpr).count("= remat2[") for p in programs] == [0, 4]
  expected, got = (program(params, X) for program in programs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_the_cache_of_rows_of_different_lengths(decoder):
  """Three tokens each, behind prompts of four and of seven, equal the whole at once."""
  positions = jnp.broadcast_to(jnp.arange(T), (2, T))
  mask = Causal(jnp.ones((2, T), int))
  full = jax.jit(lambda x: decoder(x, positions, mask, readers=READERS)[0])(X)

  @jax.jit
  def run(x, slots, cache):
    return decoder(x, slots, cache_mask(slots, T), cache=cache, readers=READERS)

  poison = jnp.full((CFG.num_layers, 2, T, CFG.num_kv_heads, CFG.head_dim), 1e3)
  hidden, cache = run(X[:, :7], positions[:, :7], KVCache(poison, poison))
  np.testing.assert_allclose(hidden[0, :4], full[0, :4], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(hidden[1], full[1, :7], rtol=1e-5, atol=1e-5)
  for step in range(3):
    slots = np.array([[4], [7]]) + step
    hidden, cache = run(jnp.take_along_axis(X, slots[:, :, None], axis=1), slots, cache)
    for row, t in enumerate(slots[:, 0]):
      np.testing.assert_allclose(hidden[row, 0], full[row, t], rtol=1e-5, atol=1e-5)


def test_masks_by_hand():
  mask = Causal(jnp.array([[1, 1, 2, 0]])).dense()
  np.testing.assert_array_equal(
    mask[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  )
  mask = cache_mask(jnp.array([[0, 1], [2, 3]]), 4)
  np.testing.assert_array_equal(
    mask[:, 0], [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
  )


@pytest.mark.parametrize(
  ("hybrid", "runs"),
  [
    ([], [(0, 4, False)]),
    ([0, 2], [(0, 1, True), (1, 2, False), (2, 3, True), (3, 4, False)]),
    ([1, 3], [(0, 1, False), (1, 2, True), (2, 3, False), (3, 4, True)]),
    ([0, 1, 2, 3], [(i, i + 1, True) for i in range(4)]),
  ],
)
def test_layers_are_run_together_between_hybrid_ones(hybrid, runs):
  assert _runs(4, hybrid) == runs


def test_variants_have_their_parameters():
  def names(**changes):
    cfg = dataclasses.replace(CFG, **changes)
    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))))
    return {".".join(path) for path, _ in flat}

  plain = names()
  assert plain - names(qkv_bias=False) == {f"layers.attention.{x}.bias" for x in "qkv"}
  assert names(qk_norm=True) - plain == {f"layers.attention.{x}_norm.scale" for x in "qk"}
  assert plain - names(tie_embeddings=True) == {"head.kernel"}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
    ({"head_dim": 5}, "head_dim must be even for rotary embeddings, got 5"),
    ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got 0"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"width": -8}, "width must be at least 1, got -8"),
  ],
)
def test_errors(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CFG, **changes)
