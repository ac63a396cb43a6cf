# SPDX-License-Identifier: Apache-2.0
"""Shapes of slow cross-attention that tests and benchmarks share, and inputs of such shapes."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one call.

  Attributes:
    queries: text positions, T.
    keys: slow tokens, S.
    batch: videos, B.
    heads: query heads, N.
    kv_heads: key and value heads, K.
    head_dim: size of a head, H.
  """

  queries: int
  keys: int
  batch: int = 1
  heads: int = 28
  kv_heads: int = 4
  head_dim: int = 128

  @property
  def flops(self) -> int:
    """Useful operations of the forward pass; the backward pass takes 2.5 times as many."""
    return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim

  def min_bytes(self, itemsize: int = 2) -> int:
    """What the forward pass must at least move: q, k, v and the output once, and the lse."""
    kv = 2 * self.batch * self.kv_heads * self.keys * self.head_dim
    q = 2 * self.batch * self.heads * self.queries * self.head_dim
    return itemsize * (kv + q) + 4 * self.batch * self.heads * self.queries

  def min_backward_bytes(self, itemsize: int = 2) -> int:
    """The same of the backward pass: dk and dv too, and q's and the output's gradients."""
    kv = 2 * self.batch * self.kv_heads * self.keys * self.head_dim
    q = 2 * self.batch * self.heads * self.queries * self.head_dim
    return self.min_bytes(itemsize) + itemsize * (kv + q)

  def arrays(self, dtype: jnp.dtype = jnp.bfloat16) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v as shapes."""
    q = jax.ShapeDtypeStruct((self.batch, self.queries, self.heads, self.head_dim), dtype)
    k = jax.ShapeDtypeStruct((self.batch, self.keys, self.kv_heads, self.head_dim), dtype)
    return q, k, k


# Of Qwen2-7B (28 query heads on 4, of 128): on 64 frames of 81 tokens, 128 frames, and 100k tokens;
# one query is a step of decoding.
TEXT_LENGTHS = (1, 64, 256, 512)
KEY_LENGTHS = (5_184, 10_368, 98_304)
