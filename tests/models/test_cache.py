# SPDX-License-Identifier: Apache-2.0
"""A processor's forms of the cache and of the parameters hold the same, and nothing is copied."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.generate import programs
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sampling import make_sampling
from slowfast_jax.models.apart import views
from slowfast_jax.models.cache import FlatCache, KVCache
from slowfast_jax.models.hybrid import SlowKV, SlowLayers
from slowfast_jax.models.slowfast import graphdef_of
from tests.generate.tiny import frames, make_export

SHAPE = (3, 2, 8, 2, 4)  # L B T K H


def random(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("turned", [False, True])
def test_all_caches_hold_what_is_written(turned):
  stacked = KVCache(random(0, SHAPE), random(1, SHAPE))
  flat = FlatCache.of(stacked, turned=turned)
  assert (flat.num_slots, flat.dtype) == (stacked.num_slots, stacked.dtype) == (8, jnp.float32)
  k, v = random(2, (2, 1, 2, 4)), random(3, (2, 1, 2, 4))
  slots = jnp.array([[5], [0]])
  stacked, flat = stacked.write(1, slots, k, v), flat.write(1, slots, k, v)
  for depth in range(3):
    for found, expected in zip(flat.read(depth), stacked.read(depth)):
      np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(flat.read(1)[0][0, 5], k[0, 0])


def test_a_cache_of_one_row_has_no_axis_of_rows_in_a_loop():
  stacked = KVCache(random(0, (3, 1, 8, 2, 4)), random(1, (3, 1, 8, 2, 4)))
  v = random(2, (1, 1, 2, 4))
  alone = FlatCache.of(stacked, turned=False).entering_loop()
  alone = alone.write(2, jnp.array([[7]]), v, v)
  np.testing.assert_array_equal(alone.read(2)[1][0, 7], v[0, 0])
  assert jax.tree.leaves(alone.leaving_loop())[0].shape == (1, 8, 8)


@pytest.mark.parametrize("turned", [False, True])
def test_slow_layers_are_those_of_their_stack(turned):
  stack = SlowKV(random(0, SHAPE), random(1, SHAPE))
  layers = SlowLayers.of(stack, turned=turned)
  assert layers.num_slots == stack.num_slots == 8
  for i in range(3):
    for found, expected in zip(layers.read(i), stack.read(i)):
      np.testing.assert_array_equal(found, expected)


def test_views_share_the_memory_of_their_stack():
  stack = random(0, (3, 64, 16))
  layers = views(stack)
  assert len(layers.layers) == len(stack)
  bytes_of_layer = 64 * 16 * 4
  for i in range(3):
    np.testing.assert_array_equal(layers[i], stack[i])
    begin = stack.unsafe_buffer_pointer() + i * bytes_of_layer
    assert layers[i].unsafe_buffer_pointer() == begin


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_on_a_processor_copies_no_kernel_and_no_cache(rows):
  engine = Engine(make_export())
  session = engine.encode(frames(8, 1))
  prompts = [[IMAGE_TOKEN, 1, 2, 3]] * rows
  run = engine._start(prompts, [session] * rows, 8, make_sampling(rows), True)
  leaves, tree = jax.tree.flatten((programs.with_layers_apart(engine.params), run.visual))
  state, state_tree = jax.tree.flatten(run.state)

  # As lists: what JAX tells of a program's arguments is no array.
  def decode(state, leaves):
    params, visual = tree.unflatten(leaves)
    model = nnx.merge(graphdef_of(engine.export.model), params)
    done = programs.decode(
      model, state_tree.unflatten(state), visual, run.sampling,
      jnp.full(rows, 8), jnp.int32(8), jnp.array([-1]),
    )  # fmt: skip
    return jax.tree.leaves(done)

  text = jax.jit(decode, donate_argnums=0).lower(state, leaves).compile().as_text()
  kernels = [x[0] for x in jax.tree.leaves(engine.params["decoder"]["layers"]) if x.ndim > 2]
  large = {x.size for x in [*kernels, *run.state.cache.k, *run.visual.kv.k]}
  copied = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
  assert copied, "there are small ones, or this finds nothing"
  assert not large & {math.prod(map(int, shape.split(","))) for shape in copied}
