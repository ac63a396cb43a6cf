# SPDX-License-Identifier: Apache-2.0
"""Encoded videos and images, a store of them, and what one row of a batch sees of them."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slowfast_jax.errors import UserError
from slowfast_jax.generate.prompts import bucket
from slowfast_jax.models.hybrid import SlowKV


@dataclasses.dataclass(frozen=True)
class VideoSession:
  """A video that was encoded and can be asked. Its arrays stay on the devices.

  Attributes:
    slow: slow tokens; frames past `num_frames` are padding.
    fast: fast tokens, flat; those past `num_fast` are padding.
    kv: slow keys and values of every hybrid layer; None where the model has none.
    num_frames: frames of the video.
    num_fast: decoder positions that it takes.
  """

  slow: Float[Array, "1 F P D"]
  fast: Float[Array, "1 fast D"]
  kv: SlowKV | None
  num_frames: int
  num_fast: int

  @property
  def num_slow(self) -> int:
    return self.num_frames * self.slow.shape[2]

  @property
  def nbytes(self) -> int:
    """Of all arrays, on all devices together."""
    return sum(array.nbytes for array in jax.tree.leaves((self.slow, self.fast, self.kv)))

  def close(self) -> None:
    """Frees the devices' memory at once; the session cannot be asked any more."""
    for array in jax.tree.leaves((self.slow, self.fast, self.kv)):
      array.delete()


@runtime_checkable
class Encoder(Protocol):
  """What makes sessions: the engine, which is built on this module."""

  def encode(self, frames: np.ndarray) -> VideoSession: ...


class SessionStore:
  """Encoded videos, as many as fit into a size; the one that was asked longest ago goes first.

  A session that was handed out stays whole for whoever holds it. Not thread-safe.

  Args:
    engine: encodes the videos.
    max_bytes: of all sessions. One that alone is larger is handed out, but not kept.

  Raises:
    UserError: the size is negative.
  """

  def __init__(self, engine: Encoder, max_bytes: int):
    if max_bytes < 0:
      raise UserError(f"The size of a session store must be 0 or more bytes, got {max_bytes}.")
    self.max_bytes = max_bytes
    self._engine = engine
    self._kept: collections.OrderedDict[Hashable, VideoSession] = collections.OrderedDict()

  @property
  def bytes(self) -> int:
    """What the sessions hold on the devices."""
    return sum(session.nbytes for session in self._kept.values())

  def __len__(self) -> int:
    return len(self._kept)

  def __contains__(self, key: Hashable) -> bool:
    return key in self._kept

  def get(self, key: Hashable, make: Callable[[], VideoSession]) -> VideoSession:
    """The session of this key, made where there is none.

    Args:
      key: all that a session depends on: the video's content, its part and how it is sampled.
      make: encodes the video.
    """
    if key in self._kept:
      self._kept.move_to_end(key)
      return self._kept[key]
    session = make()
    if session.nbytes <= self.max_bytes:
      while self.bytes + session.nbytes > self.max_bytes:
        self._kept.popitem(last=False)
      self._kept[key] = session
    return session

  def encode(self, frames: np.ndarray) -> VideoSession:
    """The session of these frames; equal frames are encoded once."""
    content = hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()
    key = (frames.shape, str(frames.dtype), content)
    return self.get(key, lambda: self._engine.encode(frames))

  def evict(self, key: Hashable) -> None:
    """Forgets a session, if it is there."""
    self._kept.pop(key, None)

  def clear(self) -> None:
    """Forgets all sessions."""
    self._kept.clear()


# What a prompt is about: one video or image, several in the order of their placeholders, or none.
Sessions = VideoSession | Sequence[VideoSession] | None


@dataclasses.dataclass(frozen=True)
class RowMedia:
  """All that one row sees: its fast tokens in order, and the slow tokens that its text reads.

  Attributes:
    fast: fast tokens, then padding.
    kv: slow keys and values of all its videos and images, then padding.
    num_fast: decoder positions of each video or image.
    num_slow: valid slow tokens.
  """

  fast: Float[Array, "1 fast D"]
  kv: SlowKV | None
  num_fast: tuple[int, ...]
  num_slow: int


def as_tuple(sessions: Sessions) -> tuple[VideoSession, ...]:
  """A prompt's videos and images in their order, however they were given."""
  if sessions is None:
    return ()
  return (sessions,) if isinstance(sessions, VideoSession) else tuple(sessions)


def join(sessions: Sequence[VideoSession]) -> RowMedia | None:
  """One row's videos and images behind one another, padded to a bucket; None where there are none.

  Slow tokens carry no position, so those of several videos together are one set.
  """
  if not sessions:
    return None
  num_fast, num_slow = tuple(s.num_fast for s in sessions), sum(s.num_slow for s in sessions)
  if len(sessions) == 1:
    return RowMedia(sessions[0].fast, sessions[0].kv, num_fast, num_slow)
  # Padding between the parts goes: valid tokens are a prefix of their row.
  fast = jnp.concatenate([s.fast[:, : s.num_fast] for s in sessions], axis=1)
  pairs = [(s.kv, s.num_slow) for s in sessions if s.kv is not None]
  kv = None
  if pairs:
    k = jnp.concatenate([pair.k[:, :, :n] for pair, n in pairs], axis=2)
    v = jnp.concatenate([pair.v[:, :, :n] for pair, n in pairs], axis=2)
    kv = SlowKV(*(_pad(x, 2, bucket(num_slow)) for x in (k, v)))
  return RowMedia(_pad(fast, 1, bucket(sum(num_fast))), kv, num_fast, num_slow)


def stack_rows(rows: Sequence[Array | None], axis: int) -> Array:
  """Arrays of batch size 1 along `axis`, the next axis padded to the longest; None is zeros."""
  some = [row for row in rows if row is not None]
  if len(rows) == len(some) == 1:
    return some[0]
  length = max(row.shape[axis + 1] for row in some)
  none = jnp.zeros((*some[0].shape[: axis + 1], length, *some[0].shape[axis + 2 :]), some[0].dtype)
  padded = [none if row is None else _pad(row, axis + 1, length) for row in rows]
  return jnp.concatenate(padded, axis=axis)


@functools.partial(jax.jit, static_argnames=("axis", "length"))
def fit(array: Array, axis: int, length: int) -> Array:
  """Padded with zeros, or cut, to `length` along `axis`."""
  return _pad(
    jax.lax.slice_in_dim(array, 0, min(length, array.shape[axis]), axis=axis), axis, length
  )


def _pad(array: Array, axis: int, length: int) -> Array:
  """Zeros behind the array, up to `length` along `axis`."""
  missing = length - array.shape[axis]
  widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
  return jnp.pad(array, widths) if missing else array
