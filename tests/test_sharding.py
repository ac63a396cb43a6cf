# SPDX-License-Identifier: Apache-2.0
"""The mesh, the table of axes, and arrays that are created where they belong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slowfast_jax.errors import UserError
from slowfast_jax.models.layers import Embedding, Projection, stack
from slowfast_jax.sharding import (
  MESH_AXES,
  RULES,
  batch_sharding,
  constrain,
  make_mesh,
  mesh_in_force,
  sharded_init,
  sharding_of,
  spec_of,
  state_shardings,
)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 4})


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({"data": 8}, (8, 1, 1, 1)),
    ({"data": -1}, (8, 1, 1, 1)),
    ({"tensor": 2, "fsdp": -1}, (1, 4, 1, 2)),
    ({"data": 2, "fsdp": 2, "context": 1, "tensor": 2}, (2, 2, 1, 2)),
    ({"data": 8, "context": -1}, (8, 1, 1, 1)),
  ],
)
def test_mesh_sizes(sizes, shape):
  mesh = make_mesh(sizes)
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == shape
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_of_some_devices():
  devices = jax.devices()[2:4]
  assert make_mesh({"fsdp": -1}, devices).devices.flatten().tolist() == devices
  assert make_mesh({}, devices[:1]).devices.shape == (1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks a chip of a slice."""

  coords: tuple[int, int, int]
  slice_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"
  core_on_chip: int = 0


@pytest.mark.parametrize("slices", [1, 2])
def test_an_axis_of_the_mesh_may_be_two_rows_of_a_slice(slices):
  chips = [Chip((x, y, 0), i) for i in range(slices) for y in range(16) for x in range(16)]
  grid = make_mesh({"data": -1, "fsdp": 32}, chips).devices
  assert grid.shape == (8 * slices, 32, 1, 1)
  for group in grid.reshape(-1, 32):
    assert len({chip.slice_index for chip in group}) == 1
    assert min(len({chip.coords[axis] for chip in group}) for axis in (0, 1)) == 2


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"model": 8}, r"unknown axes \['model'\]; choose from .*'tensor'"),
    ({}, "'data': 1, .* does not multiply to 8 devices; for instance mesh.data=8"),
    ({"data": 4}, "'data': 4, .* does not multiply to 8 devices"),
    ({"tensor": 2, "fsdp": 3}, "for instance mesh.data=4, mesh.tensor=2 with every other axis 1"),
    ({"tensor": 2, "fsdp": 12}, "for instance mesh.tensor=2, mesh.fsdp=4 with every other"),
    ({"data": 3, "fsdp": -1}, "'data': 3, 'fsdp': -1, .* 8 devices"),
    ({"data": -1, "fsdp": -1}, "'data': -1, 'fsdp': -1, .* 8 devices"),
    ({"data": 16, "fsdp": -1}, "8 devices"),
    ({"data": 0, "fsdp": -1}, "'data': 0"),
    ({"data": -2, "fsdp": -4}, "'data': -2, 'fsdp': -4"),
  ],
)
def test_mesh_errors(sizes, words):
  with pytest.raises(UserError, match=words):
    make_mesh(sizes)


@dataclasses.dataclass(frozen=True)
class DeviceOfSlice:
  """As much of a TPU's device as the making of a mesh looks at."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


# As JAX may list them: neighbours belong to different slices.
TWO_SLICES = [DeviceOfSlice(i, i % 2) for i in range(16)]


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "fsdp": -1},
    {"data": 4, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 4},
    {"data": 16},
  ],
)
def test_only_the_data_axis_reaches_from_slice_to_slice(sizes):
  mesh = make_mesh(sizes, TWO_SLICES)
  assert {device.id for device in mesh.devices.flat} == set(range(16))
  slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
  half = mesh.shape["data"] // 2
  assert slices == [{0}] * half + [{1}] * half


@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"data": 1, "context": 16}])
def test_a_mesh_whose_data_axis_cannot_reach_over_the_slices_is_an_error(sizes):
  with pytest.raises(UserError, match="data must be a multiple of the 2 slices, got 1; for .*=2"):
    make_mesh(sizes, TWO_SLICES)


def test_rules_name_axes_of_the_mesh():
  for axes in RULES.values():
    assert set([axes] if isinstance(axes, str) else axes) <= set(MESH_AXES)


def test_logical_axes_land_on_mesh_axes():
  assert spec_of(("layers", "embed", "heads", None)) == P(None, "fsdp", "tensor", None)
  assert spec_of(("vocab", "embed")) == P("tensor", "fsdp")
  assert spec_of(("mlp", "norm")) == P("tensor", None)
  assert spec_of(("batch", None)) == P(("data", "fsdp"), None)
  assert spec_of(("frames",)) == P(MESH_AXES)


@pytest.mark.parametrize(
  ("axes", "shape", "spec"),
  [
    (("embed", "heads"), (6, 8), P("fsdp", "tensor")),
    (("embed", "heads"), (6, 6), P("fsdp", None)),
    (("embed", "heads"), (5, 2), P(None, None)),
    (("batch",), (2,), P(("data", "fsdp"))),
    (("batch",), (3,), P(None)),
    (("frames", None), (16, 3), P(MESH_AXES, None)),
    (("frames", None), (4, 3), P(None, None)),
    ((), (4, 4), P()),
  ],
)
def test_an_axis_that_does_not_divide_is_replicated(mesh, axes, shape, spec):
  assert sharding_of(axes, shape, mesh) == NamedSharding(mesh, spec)
  jax.device_put(np.zeros(shape), sharding_of(axes, shape, mesh))


def test_rows_of_a_batch_lie_on_data_and_fsdp(mesh):
  assert batch_sharding(mesh).spec == P(("data", "fsdp"))


@pytest.mark.parametrize(
  ("axes", "shape", "spec"),
  [
    (("batch", "slow"), (4, 6, 3), P(("data", "fsdp"), "context")),
    (("batch", "slow"), (2, 5, 3), P("data")),
    (("frames",), (8, 3), P(MESH_AXES)),
    (("frames",), (4, 3), P(("data", "fsdp", "context"))),
    ((None, "heads"), (4, 2), P(None, "tensor")),
    (("heads",), (3,), P()),
  ],
)
def test_activations_lie_on_as_many_devices_as_divide_them(axes, shape, spec):
  mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
  with jax.set_mesh(mesh):
    found = jax.jit(lambda x: constrain(2 * x, *axes))(np.ones(shape))
  assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape))


def test_without_a_mesh_activations_lie_where_they_lie():
  assert mesh_in_force() is None
  x = jnp.ones(3)
  assert constrain(x, "batch") is x
  with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
    assert mesh_in_force() is None
    assert constrain(x, "batch") is x


class Parts(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    self.embed = Embedding(8, 4, rngs=rngs)
    self.layers = stack(
      lambda r: Projection(
        "...D,DNH->...NH", (4, 4, 3), ("embed", "heads", None), bias=True, rngs=r
      ),
      2,
      rngs=rngs,
    )


def init(key):
  params = nnx.state(Parts(rngs=nnx.Rngs(key)))
  return {"params": params, "moments": optax.adam(1.0).init(params), "step": jnp.zeros((), int)}


def test_a_state_is_created_on_its_own_devices(mesh):
  key = jax.random.key(0)
  state = sharded_init(init, mesh, key)
  params = state["params"]
  for tree in (params, state["moments"][0].mu, state["moments"][0].nu):
    assert tree.embed.embedding.get_value().sharding.spec == P("tensor", "fsdp")
    assert tree.layers.kernel.get_value().sharding.spec == P(None, "fsdp", "tensor", None)
    assert tree.layers.bias.get_value().sharding.spec == P(None, "tensor", None)
  assert state["step"].sharding == NamedSharding(mesh, P())
  # Each device holds an eighth of the table, and nobody ever held it all.
  assert params.embed.embedding.get_value().addressable_shards[0].data.shape == (2, 2)
  assert len(params.embed.embedding.get_value().sharding.device_set) == 8
  expected = jax.jit(init)(key)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  # Arrays and their shapes alone get the same places.
  places = state_shardings(jax.eval_shape(init, key), mesh)
  assert jax.tree.leaves(places) == jax.tree.leaves(state_shardings(expected, mesh))
