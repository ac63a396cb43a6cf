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
    seed: of the row; equal prompts with equal seeds give equal samples.
  """

  temperature: Float[Array, " B"]
  top_p: Float[Array, " B"]
  seed: Int[Array, " B"]


def make_sampling(
  rows: int, num_samples: int, temperature: float, top_p: float, seed: int | Sequence[int]
) -> Sampling:
  """The same for all rows, save the seed where there is one a sample; rows of padding are greedy.

  Raises:
    UserError: a value out of its range, or not one seed a sample.
  """
  if temperature < 0:
    raise UserError(f"temperature must be 0 (greedy) or positive, got {temperature:g}.")
  if not 0 < top_p <= 1:
    raise UserError(f"top_p must lie above 0 and at most at 1, got {top_p:g}.")
  seeds = [seed] * num_samples if isinstance(seed, int) else list(seed)
  if len(seeds) != num_samples:
    raise UserError(f"seed must be one number or one a prompt ({num_samples}), got {len(seeds)}.")
  padding = rows - num_samples
  # Seeds of any size: what counts is that different ones differ.
  folded = [int(np.random.SeedSequence((abs(s), s < 0)).generate_state(1)[0] >> 1) for s in seeds]
  return Sampling(
    np.array([temperature] * num_samples + [0.0] * padding, np.float32),
    np.full(rows, top_p, np.float32),
    np.array(folded + [0] * padding, np.int32),
  )


def next_token(
  logits: Float[Array, "B V"], sampling: Sampling, step: Int[Array, ""] | int
) -> Int[Array, " B"]:
  """The token that each row takes at its step-th new position."""
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw() -> Array:
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(sampling.seed)
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, nucleus(scaled, sampling.top_p))
    return jnp.where(sampling.temperature > 0, drawn.astype(jnp.int32), greedy)

  # Greedy decoding must not pay for sorting the vocabulary.
  return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: greedy)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
  """-inf everywhere but at the fewest likeliest tokens whose probability reaches `top_p`."""
  order = jnp.sort(logits, axis=-1, descending=True)
  probabilities = jax.nn.softmax(order, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = (before < top_p[:, None]).at[:, 0].set(True)
  least = jnp.min(jnp.where(kept, order, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)
