# SPDX-License-Identifier: Apache-2.0
"""A store of encoded videos keeps to its size, and equal videos are encoded once."""

import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.generate.sessions import SessionStore, VideoSession
from slowfast_jax.models.hybrid import SlowKV


class Encoder:
  """Sessions of 400 bytes a frame."""

  def __init__(self):
    self.encoded = []

  def encode(self, frames):
    self.encoded.append(len(frames))
    n = len(frames)
    kv = SlowKV(jnp.zeros((1, 1, n, 1, 5)), jnp.zeros((1, 1, n, 1, 5)))
    return VideoSession(jnp.zeros((1, n, 8, 10)), jnp.zeros((1, n, 10)), kv, n, n)


@pytest.fixture
def store():
  return SessionStore(Encoder(), 1000)


def make(store, frames):
  return lambda: store._engine.encode(np.zeros(frames))


def test_the_one_asked_longest_ago_goes_first(store):
  a = store.get("a", make(store, 1))
  assert a.nbytes == store.bytes == 400
  store.get("b", make(store, 1))
  assert store.get("a", make(store, 1)) is a
  store.get("c", make(store, 1))
  assert ["a" in store, "b" in store, "c" in store] == [True, False, True]
  assert store.bytes == 800
  assert store._engine.encoded == [1, 1, 1]


def test_one_that_is_too_large_is_handed_out_and_evicts_nothing(store):
  store.get("a", make(store, 1))
  assert store.get("large", make(store, 3)).num_frames == 3
  assert len(store) == 1
  assert "a" in store


def test_sessions_can_be_evicted_and_freed(store):
  a, _ = store.get("a", make(store, 1)), store.get("b", make(store, 1))
  store.evict("a")
  store.evict("never there")
  assert store.bytes == 400
  assert a.slow.shape == (1, 1, 8, 10)
  a.close()
  assert a.slow.is_deleted()
  store.clear()
  assert store.bytes == 0


def test_equal_frames_are_encoded_once(store):
  frames = np.arange(2 * 3).reshape(2, 3)
  assert store.encode(frames) is store.encode(frames.copy())
  store.encode(frames + 1)
  store.encode(frames.astype(np.float32))
  store.encode(frames.reshape(3, 2))
  assert store._engine.encoded == [2, 2, 2, 3]


def test_a_negative_size_is_refused():
  with pytest.raises(UserError, match="0 or more bytes, got -1"):
    SessionStore(Encoder(), -1)
