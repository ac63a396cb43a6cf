# SPDX-License-Identifier: Apache-2.0
"""The array annotations of the package are really checked while its tests run."""

import jax.numpy as jnp
import jaxtyping
import pytest

from slowfast_jax.models.compressor import compress


def test_arrays_that_contradict_the_annotations_are_found():
  slow, pooling = jnp.ones((2, 4, 9, 8)), jnp.ones((2, 3, 4))
  assert compress(slow, pooling, 1).shape == (2, 3, 9, 8)
  with pytest.raises(jaxtyping.TypeCheckError, match="pooling"):
    compress(slow, pooling[:, :, :3], 1)
