# SPDX-License-Identifier: Apache-2.0
"""Training on one device, for tests of anything but the mesh."""

import jax
import pytest

from slowfast_jax.sharding import make_mesh
from slowfast_jax.train import plan


@pytest.fixture(scope="module")
def one_device():
  """Eight devices on two cores spend their time on waiting for one another."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
    yield
