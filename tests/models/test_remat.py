# SPDX-License-Identifier: Apache-2.0
"""What the backward pass keeps changes memory, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.errors import UserError
from slowfast_jax.models.remat import REMAT, remat
from slowfast_jax.models.slowfast import graphdef_of
from tests.models.tiny import ROWS, batch_of, config, geometry_of, random_params

# Layers enough that what is kept of them outweighs all else; the plain ones are one loop.
CFG = config(vision={"num_layers": 6}, decoder={"num_layers": 8}, hybrid=None)
# Policies, and frames that are encoded at a time.
WAYS = {name: (name, 0) for name in REMAT} | {"a frame at a time": ("full", 1)}
# Programs that run once.
QUICKLY = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def programs():
  """Temporary bytes, loss and gradients by the name of the way."""
  batch, _ = batch_of(ROWS[:4], geometry_of(CFG))
  graphdef, params = graphdef_of(CFG), random_params(CFG, 0)
  found = {}
  for way, (policy, chunk) in WAYS.items():

    def loss(params, policy=policy, chunk=chunk):
      model = nnx.merge(graphdef, params)
      return jnp.sum(jnp.sin(model(batch, policy=policy, frame_chunk=chunk)))

    program = jax.jit(jax.value_and_grad(loss), compiler_options=QUICKLY)
    compiled = program.lower(params).compile()
    found[way] = compiled.memory_analysis().temp_size_in_bytes, *compiled(params)
  return found


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"none"}))
def test_loss_and_gradients_are_the_same(programs, way):
  _, expected_loss, expected = programs["none"]
  _, loss, gradients = programs[way]
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)

  # Some are sums of which all terms cancel, as those of the keys' biases: what is left is rounding.
  size = max(np.abs(x).max() for x in jax.tree.leaves(expected))

  def same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * size)

  jax.tree.map(same, gradients, expected)


def test_who_keeps_less_needs_less_memory(programs):
  memory = {way: found[0] for way, found in programs.items()}
  assert memory["full"] < memory["minimal"] < memory["dots"] < memory["none"]
  assert memory["full"] < 0.6 * memory["none"]
  assert memory["a frame at a time"] < memory["full"]


def test_an_unknown_policy_is_named():
  with pytest.raises(UserError, match="train.remat must be one of .*, got 'everything'"):
    remat(lambda x: x, "everything")
