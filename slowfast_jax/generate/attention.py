# SPDX-License-Identifier: Apache-2.0
"""Which moments of a video a text read: the attention of its positions over the slow tokens.

Recomputed exactly, in the hooks of the hybrid layers of one full forward pass.
"""

import dataclasses
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from slowfast_jax.generate.programs import Visual, embed_prompts, query_of, uncached
from slowfast_jax.generate.prompts import Prompts
from slowfast_jax.models.decoder import ReadSlow
from slowfast_jax.models.hybrid import HybridAdapter, SlowKV, SlowQuery
from slowfast_jax.models.layers import layer_of
from slowfast_jax.models.slowfast import SlowFast
from slowfast_jax.shapes import FAST, PROMPT, Array

# Points of the midpoint rule along the slow path's share; the test of the sum allows 2% of error.
_SHARES = 8


@dataclasses.dataclass(frozen=True)
class SlowAttention:
  """What one text read of its video.

  Attributes:
    weights: of each hybrid layer, head and querying position, its attention to each frame; sums to
      1 over the frames.
    gates: how much of what it read each position let in, |g|.
    tokens: the token at each position; 0 at fast positions, which query where all positions do.
    question: positions of the last question: its text behind the video, up to the reply.
    reply: positions of the reply's tokens.
    layers: depths of the hybrid layers.
    relevance: what the reply's first token owes to each frame, see `attend`.
  """

  weights: Float[np.ndarray, "A N X F"]
  gates: Float[np.ndarray, "A X"]
  tokens: Int[np.ndarray, " X"]
  question: Bool[np.ndarray, " X"]
  reply: Bool[np.ndarray, " X"]
  layers: tuple[int, ...]
  relevance: Float[np.ndarray, "A N X F"]

  def profile(self) -> Float[np.ndarray, " F"]:
    """Where in time the answer came from: each frame's share of all that spoke for the answer.

    Frames that spoke against it count 0; uniform where no frame spoke for it.
    """
    total = np.maximum(self.relevance.sum(axis=(0, 1, 2)), 0)
    even = np.full_like(total, 1 / len(total))
    return (total / total.sum() if total.any() else even).astype(np.float32)

  def read_by_reply(self) -> Float[np.ndarray, "tokens F"]:
    """What each token of the reply was written from: shares of the frames in what was let in.

    A token is written at the position before it: the first one at the prompt's last.
    """
    (written,) = np.nonzero(self.reply)
    let_in = np.einsum("ANXF,AX->XF", self.weights, self.gates)[written - 1]
    total = let_in.sum(axis=1, keepdims=True)
    even = np.full_like(let_in, 1 / let_in.shape[1])
    return np.where(total > 0, let_in / np.where(total > 0, total, 1), even).astype(np.float32)


def attend(
  model: SlowFast,
  prompts: Prompts,
  visual: Visual,
  tokens_per_frame: int,
  asked: Int[Array, " B"],
) -> tuple[Float[Array, "A B N X F"], Float[Array, "A B X"], Float[Array, "A B N X F"]]:
  """Attention to frames, |g|, and the relevance of the attention, at every hybrid layer.

  Relevance is self-attention attribution (Hao et al., arXiv 2004.11207): A times the integral over
  a in [0, 1] of dlog p(a A) / dA, with p the probability of the likeliest token at `asked`, the
  last position of each prompt. Summed over everything it is what the whole slow path adds to log p,
  so each frame's part is what the answer owes to that frame; it can be negative. All are zero where
  a position queries nothing.
  """
  query, kv = query_of(prompts.text_index, visual), visual.kv
  adapters = model.adapters
  if not isinstance(kv, SlowKV) or query is None or adapters is None:
    raise ValueError("Attention to slow tokens needs hybrid layers and a video.")
  log_probs = _log_probs(model, prompts, visual, query, kv, adapters, asked)
  num_heads = model.cfg.decoder.num_heads
  none = jnp.zeros((len(kv.k), len(asked), num_heads, query.q_segments.shape[1], kv.num_slots))
  full, weights, gates = log_probs(none, jnp.ones(()))
  answer = jnp.argmax(full, axis=-1)[:, None]

  def add_effect(total, share):
    def said(changes):
      return jnp.sum(jnp.take_along_axis(log_probs(changes, share)[0], answer, axis=1))

    return total + jax.grad(said)(none) / _SHARES, None

  middles = (jnp.arange(_SHARES) + 0.5) / _SHARES
  effect, _ = jax.lax.scan(add_effect, none, middles)

  def by_frame(values):
    return einops.reduce(values, "A B N X (F P) -> A B N X F", "sum", P=tokens_per_frame)

  return by_frame(weights), gates.astype(jnp.float32), by_frame(weights * effect)


def describe(
  attended: tuple[Array, Array, Array],
  built: Prompts,
  *,
  reply: int,
  num_frames: int,
  turn_start: int,
  layers: tuple[int, ...],
) -> SlowAttention:
  """What `attend` found for the first row, without padding.

  Args:
    attended: of `attend`.
    built: the prompts.
    reply: tokens of the row's reply, which are its last.
    num_frames: of the video.
    turn_start: the token that begins a turn.
    layers: depths of the hybrid layers.
  """
  weights, gates, relevance = (np.asarray(part)[:, 0] for part in attended)
  index, kind, tokens = built.text_index[0], built.kind[0], built.tokens[0]
  index = index[index >= 0]
  # In a conversation the last turn but one is what was asked.
  starts = np.flatnonzero((tokens == turn_start) & (kind == PROMPT))
  visual_stop = np.flatnonzero(kind == FAST)[-1] + 1
  behind = index >= max(visual_stop, starts[-2] if len(starts) > 1 else 0)
  replied = index >= int(built.lengths[0]) - reply
  return SlowAttention(
    weights[:, :, : len(index), :num_frames],
    gates[:, : len(index)],
    tokens[index],
    behind & ~replied,
    replied,
    layers,
    relevance[:, :, : len(index), :num_frames],
  )


def _log_probs(
  model: SlowFast,
  prompts: Prompts,
  visual: Visual,
  query: SlowQuery,
  kv: SlowKV,
  adapters: HybridAdapter,
  asked: Int[Array, " B"],
) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
  """One forward pass, as a function of what is done to the slow attention.

  Returns:
    `(changes [A, B, N, X, S] added to the attention, share of it that is let in)` to the log
    probabilities [B, V] of the tokens at `asked`, the attention, and |g| [A, B, X].
  """
  x = embed_prompts(model, prompts, visual)
  positions, mask = uncached(prompts)

  def log_probs(changes: Float[Array, "A B N X S"], share: Float[Array, ""]):
    seen: list[tuple[Array, Array]] = []

    def reader(i: int) -> ReadSlow:
      adapter = layer_of(adapters, i)

      def attention(q, k, v, query):
        weights = slow_weights(q, k, query)
        seen.append((weights, q))
        return mix(share * weights + changes[i], v).astype(q.dtype)

      def hook(q, o):
        read = adapter(q, o, (kv.k[i], kv.v[i]), query, attention)
        index = jnp.maximum(query.text_index, 0)[:, :, None, None]
        gates = adapter.gate_values(jnp.take_along_axis(o, index, axis=1))[..., 0]
        seen[-1] = (seen[-1][0], jnp.abs(gates) * query.q_segments)
        return read

      return hook

    readers = {depth: reader(i) for i, depth in enumerate(model.cfg.hybrid_layers)}
    hidden, _ = model.decoder(x, positions, mask, readers=readers)
    last = jnp.take_along_axis(hidden, asked[:, None, None], axis=1)[:, 0]
    weights, gates = (jnp.stack(part) for part in zip(*seen))
    return jax.nn.log_softmax(model.decoder.logits(last)), weights, gates

  return log_probs


def mix(weights: Float[Array, "B N X S"], v: Float[Array, "B S K H"]) -> Float[Array, "B X N H"]:
  """Values under given attention weights, grouped heads."""
  grouped = einops.rearrange(weights, "B (K G) X S -> B K G X S", K=v.shape[2])
  mixed = jnp.einsum("BKGXS,BSKH->BXKGH", grouped, v.astype(jnp.float32))
  return einops.rearrange(mixed, "B X K G H -> B X (K G) H")


def slow_weights(
  q: Float[Array, "B X N H"], k: Float[Array, "B S K H"], query: SlowQuery
) -> Float[Array, "B N X S"]:
  """The softmax of slow cross-attention, in float32."""
  q_BXKGH = einops.rearrange(q.astype(jnp.float32), "B X (K G) H -> B X K G H", K=k.shape[2])
  logits = jnp.einsum("BXKGH,BSKH->BKGXS", q_BXKGH * q.shape[-1] ** -0.5, k.astype(jnp.float32))
  visible = query.q_segments[:, :, None] == query.kv_segments[:, None, :]
  visible &= query.q_segments[:, :, None] > 0
  weights = jax.nn.softmax(logits, where=visible[:, None, None], axis=-1)
  return einops.rearrange(weights, "B K G X S -> B (K G) X S")
