# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings as rotations of complex numbers, and Llama's stretched wavelengths."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.models.rope import LlamaRopeScaling, frequencies, rope_table, rotate
from tests.models import oracle
from tests.models.tiny import CONFIG


def test_rotation_by_hand():
  """Dimension i turns with dimension i + H/2; a quarter of a turn takes (1, 0) to (0, 1)."""
  freq = np.array([np.pi / 2, np.pi], np.float32)
  x = jnp.array([1.0, 2.0, 0.0, 5.0]) * jnp.ones((1, 3, 1, 1))
  got = rotate(x, rope_table(jnp.array([[0, 1, 2]]), freq))[0, :, 0]
  np.testing.assert_allclose(got, [[1, 2, 0, 5], [0, -2, 1, -5], [-1, 2, 0, 5]], atol=1e-5)


def test_rotation_is_that_of_complex_numbers():
  dec = dataclasses.replace(CONFIG.decoder, head_dim=16, rope_theta=1e4)
  x = np.random.default_rng(0).normal(size=(700, 3, 16))
  freq = frequencies(16, 1e4, None)
  got = rotate(jnp.float32(x)[None], rope_table(jnp.arange(700)[None], freq))[0]
  # float32 holds an angle of 700 radians to 3e-5.
  np.testing.assert_allclose(got, oracle.rope(x, oracle.frequencies(dec)), atol=2e-4)
  np.testing.assert_allclose(got[:10], oracle.rope(x, oracle.frequencies(dec))[:10], atol=1e-5)


def test_positions_beyond_256_survive_bfloat16():
  freq = frequencies(4, 100.0, None)
  x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
  got = rotate(x, rope_table(jnp.array([[256, 257]]), freq))
  assert got.dtype == jnp.bfloat16
  assert np.abs(got[0, 0] - got[0, 1]).max() > 0.5


def test_frequencies_by_hand():
  np.testing.assert_allclose(frequencies(4, 100.0, None), [1, 0.1], rtol=1e-6)
  np.testing.assert_allclose(frequencies(6, 1e6, None), [1, 1e-2, 1e-4], rtol=1e-6)
  assert frequencies(6, 1e6, None).dtype == np.float32


def test_llama_scaling_by_hand():
  """Wavelengths 2 pi (1, 10, 20, 50) in a context of 200 pi: 100, 10, 5 and 2 turns.

  More than 8 turns are kept, fewer than 4 are stretched by 4, 5 turns lie a quarter between.
  """
  scaling = LlamaRopeScaling(4.0, 4.0, 8.0, 200 * np.pi)
  # Of four dimensions the second pair turns by theta ** -0.5.
  np.testing.assert_allclose(frequencies(4, 100.0, scaling), [1, 0.1], rtol=1e-6)
  between = 0.05 * (0.75 / 4 + 0.25)
  np.testing.assert_allclose(frequencies(4, 20.0**2, scaling), [1, between], rtol=1e-6)
  np.testing.assert_allclose(frequencies(4, 50.0**2, scaling), [1, 0.02 / 4], rtol=1e-6)


def test_llama_scaling_of_the_released_models():
  """Llama 3.1 8B, by its wavelengths."""
  scaling = LlamaRopeScaling()
  dec = dataclasses.replace(CONFIG.decoder, head_dim=128, rope_theta=5e5, rope_scaling=scaling)
  got = frequencies(128, 5e5, scaling)
  np.testing.assert_allclose(got, oracle.frequencies(dec), rtol=1e-6)
  plain = frequencies(128, 5e5, None)
  np.testing.assert_array_equal(got[:29], plain[:29])
  assert (got[29:35] < plain[29:35]).all()
  assert (got[29:35] > plain[29:35] / 8).all()
  np.testing.assert_allclose(got[35:], plain[35:] / 8, rtol=1e-6)


def test_scaling_errors():
  with pytest.raises(ValueError, match=r"high_freq_factor must be above .*got 1\.0 and 1\.0"):
    LlamaRopeScaling(high_freq_factor=1.0)
