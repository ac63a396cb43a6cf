# SPDX-License-Identifier: Apache-2.0
"""A processor's forms of the cache and of the parameters hold the same, and nothing is copied."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.generate import programs
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sampling import make_sampling
from slowfast_jax.models.apart import views
from slowfast_jax.models.cache import FlatCache, KVCache
from slowfast_jax.models.slowfast import graphdef_of
from tests.generate.tiny import frames, make_export

SHAPE = (3, 2, 8, 2, 4)  # L B T K H


def random(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_both_caches_hold_what_is_written():
  stacked = KVCache(random(0, SHAPE), random(1, SHAPE))
  flat = FlatCache.of(stacked)
  assert (flat.num_slots, flat.dtype) == (stacked.num_slots, stacked.dtype) == (8, jnp.float32)
  k, v = random(2, (2, 1, 2, 4)), random(3, (2, 1, 2, 4))
  slots = jnp.array([[5], [0]])
  stacked, flat = stacked.write(1, slots, k, v), flat.write(1, slots, k, v)
  for depth in range(3):
    for found, expected in zip(flat.read(depth), stacked.read(depth)):
      np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(flat.read(1)[0][0, 5], k[0, 0])
  alone = FlatCache.of(KVCache(stacked.k[:, :1], stacked.v[:, :1])).entering_loop()
  alone = alone.write(2, jnp.array([[7]]), k[:1], v[:1])
  np.testing.assert_array_equal(alone.read(2)[1][0, 7], v[0, 0])
  assert jax.tree.leaves(alone.leaving_loop())[0].shape == (1, 8, 8)


def test_views_share_the_memory_of_their_stack():
  stack = random(0, (3, 64, 16))
  layers = views(stack)
  assert len(layers.layers) == len(stack)
  bytes_of_layer = 64 * 16 * 4
  for i in range(3):
    np.testing.assert_array_equal(layers[i], stack[i])
    begin = stack.unsafe_buffer_pointer() + i * bytes_of_layer
    assert layers[i].unsafe_buffer_pointer() == begin


def test_a_step_on_a_processor_copies_no_kernel_and_no_cache():
  engine = Engine(make_export())
  session = engine.encode(frames(8, 1))
  run = engine._start([[IMAGE_TOKEN, 1, 2, 3]], [session], 8, make_sampling(1), True)
  leaves, tree = jax.tree.flatten((programs.with_layers_apart(engine.params), run.visual))
  state, state_tree = jax.tree.flatten(run.state)

  # As lists: what JAX tells of a program's arguments is no array.
  def decode(state, leaves):
    params, visual = tree.unflatten(leaves)
    model = nnx.merge(graphdef_of(engine.export.model), params)
    done = programs.decode(
      model, state_tree.unflatten(state), visual, run.sampling,
      jnp.array([8]), jnp.int32(8), jnp.array([-1]),
    )  # fmt: skip
    return jax.tree.leaves(done)

  text = jax.jit(decode, donate_argnums=0).lower(state, leaves).compile().as_text()
  kernels = [x[0] for x in jax.tree.leaves(engine.params["decoder"]["layers"]) if x.ndim > 2]
  large = {x.size for x in [*kernels, *run.state.cache.k, *run.visual.kv.k]}
  copied = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
  assert copied, "there are small ones, or this finds nothing"
  assert not large & {math.prod(map(int, shape.split(","))) for shape in copied}
