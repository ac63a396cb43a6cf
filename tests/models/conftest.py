# SPDX-License-Identifier: Apache-2.0
"""Compiling is most of the work of these tests, so little is optimised."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
