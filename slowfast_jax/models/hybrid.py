# SPDX-License-Identifier: Apache-2.0
"""The hybrid part of a decoder layer: text reads all slow tokens through the layer's own query.

Semantics section 4. The adapters of all hybrid layers are one stack, separate from the language
model's parameters, so any decoder of the family can be given a slow path.
"""

import dataclasses
import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention import cross_attention
from slowfast_jax.kernels.cross_attention.context_parallel import Layout, cross_attention_on_mesh
from slowfast_jax.models.decoder import Decoder, DecoderConfig
from slowfast_jax.models.layers import Projection, RMSNorm, Rngs, make_param
from slowfast_jax.shapes import QUERY_SETS
from slowfast_jax.sharding import RULES, mesh_in_force

GATES = ("dynamic", "dynamic-tanh", "dynamic-tanh-warmup")
INITS = ("decoder", "reference")


@dataclasses.dataclass(frozen=True)
class HybridConfig:
  """Which layers read slow tokens, who asks, and how the answer is gated.

  Attributes:
    every, min_depth, max_depth: hybrid layers are min_depth, min_depth + every, ... < max_depth.
    gate: one of GATES. The released models use "dynamic-tanh-warmup".
    queries: which positions ask, one of QUERY_SETS; "all" also changes the warm-up factor.
  """

  every: int = 8
  min_depth: int = 0
  max_depth: int = 28
  gate: str = "dynamic-tanh-warmup"
  queries: str = "text-only"

  def __post_init__(self):
    if self.gate not in GATES:
      raise ValueError(f"gate must be one of {GATES}, got {self.gate!r}.")
    if self.queries not in QUERY_SETS:
      raise ValueError(f"queries must be one of {QUERY_SETS}, got {self.queries!r}.")
    if self.every < 1 or self.min_depth < 0:
      raise ValueError(
        f"every must be >= 1 and min_depth >= 0, got {self.every} and {self.min_depth}."
      )

  def layers(self, num_layers: int) -> tuple[int, ...]:
    """Depths of the hybrid layers of a decoder with `num_layers` layers."""
    return tuple(range(self.min_depth, min(self.max_depth, num_layers), self.every))

  def warm_up_factor(self, alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """What gates of a warm-up kind are multiplied with, of its scalar (semantics section 4)."""
    return alpha if self.queries == "all" else jnp.tanh(alpha)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlowKV:
  """Keys and values of the slow tokens at every hybrid layer: computed once a video."""

  k: Float[Array, "A B S K H"]
  v: Float[Array, "A B S K H"]

  @property
  def num_slots(self) -> int:
    return self.k.shape[2]

  def read(self, i: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Keys and values of the hybrid layer i."""
    return self.k[i], self.v[i]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlowLayers:
  """A `SlowKV` whose layers are arrays of their own, see `apart`.

  Attributes:
    k, v: keys and values of each layer.
    turned: whether keys are [B, K, H, S] and values [B, K, S, H]: so XLA for CPU takes them in
      products of several rows; in any other form it copies them at every step.
  """

  k: tuple[Float[Array, "B ..."], ...]
  v: tuple[Float[Array, "B ..."], ...]
  turned: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def of(cls, kv: SlowKV, *, turned: bool) -> "SlowLayers":
    if turned:
      return cls(tuple(jnp.moveaxis(kv.k, 2, 4)), tuple(kv.v.swapaxes(2, 3)), turned)
    return cls(tuple(kv.k), tuple(kv.v))

  @property
  def num_slots(self) -> int:
    return self.k[0].shape[-1 if self.turned else 1]

  def read(self, i: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Keys and values of the hybrid layer i."""
    k, v = self.k[i], self.v[i]
    return (jnp.moveaxis(k, 3, 1), v.swapaxes(1, 2)) if self.turned else (k, v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlowQuery:
  """Who reads what: querying positions, and the samples of queries and slow tokens."""

  text_index: Int[Array, "B X"]
  q_segments: Int[Array, "B X"]
  kv_segments: Int[Array, "B S"]


# (queries, keys, values, who reads what) -> what is read.
SlowRead = Callable[[Array, Array, Array, SlowQuery], Array]


def read_slow(
  q: Float[Array, "B X N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  query: SlowQuery,
) -> Float[Array, "B X N H"]:
  """Cross-attention of every querying position to the slow tokens of its own sample."""
  attention, mesh = cross_attention, mesh_in_force()
  if mesh is not None:
    layout = Layout(mesh, context=RULES["slow"], batch=RULES["batch"], heads=RULES["heads"])
    attention = functools.partial(cross_attention_on_mesh, layout=layout)
  return attention(
    q, k, v, q_segments=query.q_segments, kv_segments=query.kv_segments, return_lse=False
  )


class HybridAdapter(nnx.Module):
  """Slow keys and values, and the gate, of one hybrid layer."""

  def __init__(self, cfg: HybridConfig, decoder: DecoderConfig, *, rngs: Rngs):
    D, N, K, H = decoder.width, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    self.cfg = cfg
    # Head-major (K, 2, H), as in released checkpoints.
    self.kv = Projection(
      "...D,DKcH->...KcH",
      (D, K, 2, H),
      ("embed", "heads", None, None),
      bias=decoder.qkv_bias,
      rngs=rngs,
    )
    # The gate starts open at every position: the warm-up factor alone keeps it shut.
    self.gate = Projection(
      "...NH,NHo->...o",
      (N, H, 1),
      ("heads", None, None),
      bias=True,
      gain=0.1,
      bias_start=1.0,
      rngs=rngs,
    )
    self.warm_up = (
      make_param(nnx.initializers.zeros, rngs, (1,), (None,)) if "warmup" in cfg.gate else None
    )

  def keys_values(self, slow: Float[Array, "B S D"], norm: RMSNorm):
    """Keys and values [B, S, K, H] of the slow tokens, through the layer's own input norm."""
    k, v = einops.rearrange(self.kv(norm(slow)), "B S K c H -> c B S K H")
    return k, v

  def gate_values(self, o: Float[Array, "B X N H"]) -> Float[Array, "B X 1"]:
    """How much of the slow path each querying position lets in."""
    g = self.gate(o).astype(jnp.float32)
    if "tanh" in self.cfg.gate:
      g = jnp.tanh(g)
    if self.warm_up is not None:
      # float32: one scalar's gradient is a sum over every position and channel.
      g = g * self.cfg.warm_up_factor(self.warm_up[...])
    return g

  def __call__(
    self,
    q: Float[Array, "B T N H"],
    o: Float[Array, "B T N H"],
    kv: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    query: SlowQuery,
    attention: SlowRead | None = None,
  ) -> Float[Array, "B T N H"]:
    """`o + g * c` at the querying positions, `o` elsewhere; c comes from `attention`."""
    index = jnp.maximum(query.text_index, 0)[:, :, None, None]
    q_BXNH = jnp.take_along_axis(q, index, axis=1)
    o_BXNH = jnp.take_along_axis(o, index, axis=1)
    c_BXNH = (attention or read_slow)(q_BXNH, *kv, query)
    read = (self.gate_values(o_BXNH)[..., None] * c_BXNH).astype(o.dtype)
    # Index T lies outside and is dropped: positions of padding change nothing.
    target = jnp.where(query.text_index < 0, q.shape[1], query.text_index)
    rows = jnp.arange(q.shape[0])[:, None]
    return o.at[rows, target].add(read, mode="drop")


def slow_query(
  text_index: Int[Array, "B X"],
  segments: Int[Array, "B T"],
  frame_segments: Int[Array, "B F"],
  tokens_per_frame: int,
) -> SlowQuery:
  """Spells a batch's querying positions and frames out as segments of queries and keys."""
  of_query = jnp.take_along_axis(segments, jnp.maximum(text_index, 0), axis=1)
  return SlowQuery(
    text_index,
    jnp.where(text_index < 0, 0, of_query),
    jnp.repeat(frame_segments, tokens_per_frame, axis=1),
  )


def adapters_from_decoder(
  adapters: HybridAdapter, decoder: Decoder, depths: tuple[int, ...], *, reference: bool = False
) -> None:
  """Starts slow keys and values as the language model's own (semantics section 4).

  Head j of the slow keys takes head j of the layer's Wk, head j of the slow values its Wv, so a
  language model that already understands visual tokens can read slow tokens at once.

  Args:
    adapters: the stack that is filled.
    decoder: the language model.
    depths: its hybrid layers.
    reference: as the released code does, which lays all heads of Wk before all of Wv and then reads
      them as key, value, key, value: slow keys and values start scrambled.
  """
  index = jnp.array(depths)
  own = decoder.layers.attention
  pairs = [(own.k.kernel[...], own.v.kernel[...], adapters.kv.kernel)]
  if own.k.bias is not None and own.v.bias is not None and adapters.kv.bias is not None:
    pairs.append((own.k.bias[...], own.v.bias[...], adapters.kv.bias))
  for k, v, target in pairs:
    if reference:
      joined = jnp.concatenate([k[index], v[index]], axis=-2)
      target[...] = einops.rearrange(joined, "... (K c) H -> ... K c H", c=2)
    else:
      target[...] = jnp.stack([k[index], v[index]], axis=-2)
