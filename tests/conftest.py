# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices before JAX starts, a compilation cache, and annotations that are checked."""

import getpass
import os
import tempfile
from pathlib import Path

# Through the environment, so that the commands which tests start compile into the same cache. Not
# in the checkout: compiled code must not travel to a machine with another processor.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(Path(tempfile.gettempdir()) / f"slowfast-jax-tests-{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping

# Sharded tests always run; a program for one device is not slower for it (measured: under 5%).
jax.config.update("jax_num_cpu_devices", 8)

# `Batch` itself stays unchecked: JAX builds it of shapes, shardings and specs too.
import slowfast_jax.shapes  # noqa: E402, F401

jaxtyping.install_import_hook("slowfast_jax", "type_checker.check")


def pytest_configure(config):
  config.addinivalue_line("markers", "slow: takes more than about ten seconds")
  config.addinivalue_line("markers", "torch: compares with PyTorch, from the extra `parity`")
