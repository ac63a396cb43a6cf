# SPDX-License-Identifier: Apache-2.0
"""The next token of every row: greedy, or drawn with a temperature from the likeliest tokens.

Each row has its own temperature, nucleus and seed, and the draw of a step depends on nothing else:
a sample does not change with what stands beside it in a batch.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How each row picks its tokens.

  Attributes:
    temperature: 0 is greedy.
    top_p: only the likeliest tokens, which together have this probability, can be drawn.
    top_k: only so many of the likeliest can be drawn; 0: all.
    seed: of the row; equal prompts with equal seeds give equal samples.
  """

  temperature: Float[Array, " B"]
  top_p: Float[Array, " B"]
  top_k: Int[Array, " B"]
  seed: Int[Array, " B"]


def make_sampling(
  num_samples: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  top_k: int = 0,
  seed: int | Sequence[int] = 0,
) -> Sampling:
  """The same for all samples, save the seed where there is one a sample.

  Raises:
    UserError: a value out of its range, or not one seed a sample.
  """
  if not temperature >= 0 or temperature == float("inf"):
    raise UserError(f"temperature must be 0 (greedy) or positive, got {temperature:g}.")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p must lie above 0 and at most at 1, got {top_p:g}.")
  if top_k < 0:
    raise UserError(f"top_k must be 0 (all tokens) or positive, got {top_k}.")
  seeds = [seed] * num_samples if isinstance(seed, int) else list(seed)
  if len(seeds) != num_samples:
    raise UserError(f"seed must be one number or one a prompt ({num_samples}), got {len(seeds)}.")
  # Seeds of any size: what counts is that different ones differ.
  folded = [int(np.random.SeedSequence((abs(s), s < 0)).generate_state(1)[0] >> 1) for s in seeds]
  return Sampling(
    np.full(num_samples, temperature, np.float32),
    np.full(num_samples, top_p, np.float32),
    # More than there are tokens is all of them, whatever the vocabulary.
    np.full(num_samples, min(top_k, 2**31 - 1), np.int32),
    np.array(folded, np.int32),
  )


def next_token(
  logits: Float[Array, "B V"], sampling: Sampling, steps: Int[Array, " B"]
) -> Int[Array, " B"]:
  """The token that each row takes; it is the row's steps-th new one."""
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw() -> Array:
    keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(sampling.seed, steps)
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    kept = likeliest(scaled, sampling.top_p, sampling.top_k)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(sampling.temperature > 0, drawn.astype(jnp.int32), greedy)

  # Greedy decoding must not pay for sorting the vocabulary.
  return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def likeliest(
  logits: Float[Array, "B V"], top_p: Float[Array, " B"], top_k: Int[Array, " B"]
) -> Float[Array, "B V"]:
  """-inf everywhere but at the tokens that can be drawn.

  Those are the `top_k` likeliest, and of them the fewest likeliest whose probability, among the
  `top_k`, reaches `top_p`. Tokens as likely as the last of these stay too.
  """
  V = logits.shape[-1]
  order = jnp.sort(logits, axis=-1, descending=True)
  count = jnp.where(top_k == 0, V, jnp.minimum(top_k, V))
  order = jnp.where(jnp.arange(V) < count[:, None], order, -jnp.inf)
  probabilities = jax.nn.softmax(order, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = ((before < top_p[:, None]) & jnp.isfinite(order)).at[:, 0].set(True)
  least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)
