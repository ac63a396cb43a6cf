# SPDX-License-Identifier: Apache-2.0
"""Which moments of a video a text read: the attention of its positions over the slow tokens.

Recomputed exactly, in the hooks of the hybrid layers of one full forward pass.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from slowfast_jax.generate.programs import Visual, embed_prompts, query_of
from slowfast_jax.generate.prompts import Prompts
from slowfast_jax.models.decoder import ReadSlow, causal_mask
from slowfast_jax.models.hybrid import SlowQuery
from slowfast_jax.models.layers import layer_of
from slowfast_jax.models.slowfast import SlowFast
from slowfast_jax.shapes import Array


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
  """

  weights: Float[np.ndarray, "A N X F"]
  gates: Float[np.ndarray, "A X"]
  tokens: Int[np.ndarray, " X"]
  question: Bool[np.ndarray, " X"]
  reply: Bool[np.ndarray, " X"]
  layers: tuple[int, ...]

  def profile(self, positions: Bool[np.ndarray, " X"] | None = None) -> Float[np.ndarray, " F"]:
    """Attention over time: the mean over layers, heads and positions, weighted by the gates.

    Args:
      positions: which ones count; None: the question's.
    """
    chosen = self.question if positions is None else positions
    gates = self.gates * chosen
    if not gates.any():  # Nothing is let in yet, but it is read all the same.
      gates = np.broadcast_to(chosen, self.gates.shape).astype(np.float32)
    profile = np.einsum("AX,ANXF->F", gates, self.weights)
    return (profile / profile.sum()).astype(np.float32)


def attend(
  model: SlowFast, prompts: Prompts, visual: Visual, tokens_per_frame: int
) -> tuple[Float[Array, "A B N X F"], Float[Array, "A B X"]]:
  """Attention to frames, and |g|, at every hybrid layer; zeros where a position queries nothing."""
  T = prompts.tokens.shape[1]
  query, adapters = query_of(prompts.text_index, visual), model.adapters
  if visual.kv is None or query is None or adapters is None:
    raise ValueError("Attention to slow tokens needs hybrid layers and a video.")
  seen: list[tuple[Array, Array]] = []

  def watched(i: int, read: ReadSlow, keys: Array, query: SlowQuery) -> ReadSlow:
    adapter = layer_of(adapters, i)

    def hook(q, o):
      index = jnp.maximum(query.text_index, 0)[:, :, None, None]
      weights = slow_weights(jnp.take_along_axis(q, index, axis=1), keys, query)
      gates = adapter.gate_values(jnp.take_along_axis(o, index, axis=1))[..., 0]
      frames = einops.reduce(weights, "B N X (F P) -> B N X F", "sum", P=tokens_per_frame)
      seen.append((frames, jnp.abs(gates) * query.q_segments))
      return read(q, o)

    return hook

  readers = {
    depth: watched(i, read, visual.kv.k[i], query)
    for i, (depth, read) in enumerate(model.readers(visual.kv, query).items())
  }
  x = embed_prompts(model, prompts, visual)
  valid = jnp.arange(T) < prompts.lengths[:, None]
  positions = jnp.broadcast_to(jnp.arange(T), valid.shape)
  model.decoder(x, positions, causal_mask(valid.astype(jnp.int32)), readers=readers)
  weights, gates = (jnp.stack(part) for part in zip(*seen))
  return weights, gates.astype(jnp.float32)


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
