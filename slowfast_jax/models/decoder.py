# SPDX-License-Identifier: Apache-2.0
"""The language model: one pre-norm decoder for Qwen2, Qwen2.5, Qwen3 and Llama.

Layers are stacked along a leading axis. The hybrid parts live in `hybrid.py` and are handed in:
hybridising is adding adapters to a decoder, not writing another decoder.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slowfast_jax.kernels.self_attention import Causal, self_attention
from slowfast_jax.models.apart import is_apart
from slowfast_jax.models.cache import FlatCache, KVCache
from slowfast_jax.models.layers import (
  Embedding,
  Projection,
  RMSNorm,
  Rngs,
  gradient_written,
  layer_of,
  linear,
  stack,
  unstack,
  written,
)
from slowfast_jax.models.remat import keep, remat
from slowfast_jax.models.rope import LlamaRopeScaling, frequencies, rope_table, rotate


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and variants of the language model.

  Attributes:
    qkv_bias: Qwen2 and Qwen2.5 have biases on q, k and v.
    qk_norm: Qwen3 normalises every head of q and k before the rotation.
    rope_scaling: Llama 3.1 and later stretch long wavelengths.
    tie_embeddings: the output projection is the embedding table.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  rope_theta: float = 1e6
  rope_scaling: LlamaRopeScaling | None = None
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  qk_norm: bool = False
  tie_embeddings: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      # Every integer is a size.
      if field.type is int and getattr(self, field.name) < 1:
        raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}.")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        "num_heads must be a multiple of num_kv_heads, "
        f"got {self.num_heads} and {self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")


# The hook of a hybrid layer: (rotated q, self-attention output o) -> o plus what was read.
ReadSlow = Callable[[Array, Array], Array]


class SelfAttention(nnx.Module):
  """Grouped-query attention up to, and from, the heads' outputs; the mixing is handed in."""

  def __init__(self, cfg: DecoderConfig, *, rngs: Rngs):
    D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    axes = ("embed", "heads", None)
    bias = cfg.qkv_bias
    self.q = Projection("...D,DNH->...NH", (D, N, H), axes, bias=bias, rngs=rngs)
    self.k = Projection("...D,DKH->...KH", (D, K, H), axes, bias=bias, rngs=rngs)
    self.v = Projection("...D,DKH->...KH", (D, K, H), axes, bias=bias, rngs=rngs)
    self.out = Projection(
      "...NH,NHD->...D", (N, H, D), ("heads", None, "embed"), gain=_residual_gain(cfg), rngs=rngs
    )
    self.q_norm = RMSNorm(H, eps=cfg.norm_eps, rngs=rngs) if cfg.qk_norm else None
    self.k_norm = RMSNorm(H, eps=cfg.norm_eps, rngs=rngs) if cfg.qk_norm else None

  def queries_keys_values(self, y: Float[Array, "B T D"], rope):
    """Rotated queries and keys, and values."""
    q_BTNH, k_BTKH, v_BTKH = self.q(y), self.k(y), self.v(y)
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return rotate(q_BTNH, rope), rotate(k_BTKH, rope), v_BTKH


class GatedMLP(nnx.Module):
  """`down(silu(gate x) * up x)`."""

  def __init__(self, cfg: DecoderConfig, *, rngs: Rngs):
    D, M = cfg.width, cfg.mlp_width
    self.gate = Projection("...D,DM->...M", (D, M), ("embed", "mlp"), rngs=rngs)
    self.up = Projection("...D,DM->...M", (D, M), ("embed", "mlp"), rngs=rngs)
    self.down = Projection(
      "...M,MD->...D", (M, D), ("mlp", "embed"), gain=_residual_gain(cfg), rngs=rngs
    )

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    # Fused into the product that reads it, what is computed element by element would be computed
    # again for each of its tiles. Fused behind the one that it comes from, forward and backward, it
    # costs next to nothing.
    x = jax.lax.optimization_barrier(x)
    gate, up = gradient_written((self.gate(x), self.up(x)))
    return self.down(written(jax.nn.silu(gate) * up))


class DecoderLayer(nnx.Module):
  """One layer; a hybrid layer is the same layer with a `read_slow` hook."""

  def __init__(self, cfg: DecoderConfig, *, rngs: Rngs):
    self.input_norm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
    self.attention = SelfAttention(cfg, rngs=rngs)
    self.post_norm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
    self.mlp = GatedMLP(cfg, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rope,
    mask: Causal | Bool[Array, "B 1 T L"],
    cache: KVCache | FlatCache | None = None,
    depth: int | Int[Array, ""] = 0,
    slots: Int[Array, "B T"] | None = None,
    read_slow: ReadSlow | None = None,
  ):
    """Returns the layer's output and its keys and values; or the cache with them in it."""
    q_BTNH, k, v = self.attention.queries_keys_values(self.input_norm(x), rope)
    q_BTNH, k, v = keep(q_BTNH, "queries"), keep(k, "keys"), keep(v, "values")
    if cache is not None and slots is not None:
      cache = cache.write(depth, slots, k, v)
      k, v = cache.read(depth)
    o_BTNH = self_attention(q_BTNH, k.astype(x.dtype), v.astype(x.dtype), mask)
    if read_slow is not None:
      o_BTNH = read_slow(q_BTNH, o_BTNH)
    x = x + self.attention.out(o_BTNH)
    return x + self.mlp(self.post_norm(x)), (k, v) if cache is None else cache


class Decoder(nnx.Module):
  """Embedding, stacked layers, final norm and output projection."""

  def __init__(self, cfg: DecoderConfig, *, rngs: Rngs):
    self.cfg = cfg
    self.embed = Embedding(cfg.vocab_size, cfg.width, rngs=rngs)
    self.layers = stack(lambda r: DecoderLayer(cfg, rngs=r), cfg.num_layers, rngs=rngs)
    self.norm = RMSNorm(cfg.width, eps=cfg.norm_eps, rngs=rngs)
    self.head = (
      None
      if cfg.tie_embeddings
      else Projection("...D,DV->...V", (cfg.width, cfg.vocab_size), ("embed", "vocab"), rngs=rngs)
    )

  @property
  def is_apart(self) -> bool:
    """Whether its layers' parameters are arrays of their own, see `apart`."""
    return is_apart(self.layers.input_norm.scale.get_value())

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Causal | Bool[Array, "B 1 T L"],
    *,
    cache: KVCache | FlatCache | None = None,
    readers: dict[int, ReadSlow] | None = None,
    policy: str = "none",
  ) -> tuple[Float[Array, "B T D"], KVCache | FlatCache]:
    """Runs all layers.

    Args:
      x: embedded tokens.
      positions: rotary positions; with a cache also the slots that are written.
      mask: which key each position sees.
      cache: keys and values so far; the new ones are written into it.
      readers: the hook of each hybrid layer.
      policy: what the backward pass keeps of each layer, a name of `remat.REMAT`.

    Returns:
      The last hidden state after the final norm, and every layer's keys and values.
    """
    readers = readers or {}
    freq = frequencies(self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
    rope = rope_table(positions, freq)
    collected: list[tuple[Array, Array]] = []

    def run(layer, x, cache, depth, read_slow=None):
      return layer(x, rope, mask, cache, depth, positions, read_slow)

    alone = range(self.cfg.num_layers) if self.is_apart else sorted(readers)
    for start, stop, is_alone in _runs(self.cfg.num_layers, alone):
      if is_alone:
        layer, read_slow = layer_of(self.layers, start), readers.get(start)

        def one_layer(x, cache, layer=layer, depth=start, read_slow=read_slow):
          return run(layer, x, cache, depth, read_slow)

        x, found = remat(one_layer, policy)(x, cache)
        if cache is None:
          collected.append(jax.tree.map(lambda array: array[None], found))
        else:
          cache = found
        continue
      graphdef, states = unstack(self.layers, start, stop)

      def body(carry, inputs, graphdef=graphdef):
        x, cache = carry
        state, depth = inputs
        x, found = run(nnx.merge(graphdef, state), x, cache, depth)
        return ((x, None), found) if cache is None else ((x, found), None)

      (x, cache), kv = jax.lax.scan(
        remat(body, policy), (x, cache), (states, jnp.arange(start, stop))
      )
      collected.append(kv)
    if cache is None:
      cache = KVCache(*(jnp.concatenate(parts) for parts in zip(*collected)))
    return self.norm(x), cache

  def projection(self) -> Callable[[Float[Array, "*L D"]], Float[Array, "*L V"]]:
    """`logits` as a function that is a pytree of the arrays that it needs."""
    graphdef, state = nnx.split(self.embed if self.head is None else self.head)
    return jax.tree_util.Partial(functools.partial(_project, graphdef), state)

  def logits(self, hidden: Float[Array, "*L D"]) -> Float[Array, "*L V"]:
    """Float32 scores of the vocabulary."""
    return self.projection()(hidden)


def _project(
  graphdef: nnx.GraphDef, state: nnx.State, hidden: Float[Array, "*L D"]
) -> Float[Array, "*L V"]:
  head: Embedding | Projection = nnx.merge(graphdef, state)
  if isinstance(head, Embedding):
    return head.attend(hidden)
  return linear(head.equation, hidden, head.kernel[...], jnp.float32)


def _residual_gain(cfg: DecoderConfig) -> float:
  """2 L branches add to the residual; together they start at the variance of one."""
  return (2 * cfg.num_layers) ** -0.5


def _runs(num_layers: int, alone: Sequence[int]) -> list[tuple[int, int, bool]]:
  """Layers as (start, stop, is alone): those alone, and the ones between them together."""
  runs, start = [], 0
  for index in [*alone, num_layers]:
    if index > start:
      runs.append((start, index, False))
    if index < num_layers:
      runs.append((index, index + 1, True))
    start = index + 1
  return runs
