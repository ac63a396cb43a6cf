# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy (semantics section 3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_loss(
  logits: Float[Array, "B T V"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean cross-entropy over weighted targets, and the share of them that is predicted right."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  # A batch without targets (all its records failed) has loss 0, not 0 / 0.
  total = jnp.maximum(jnp.sum(weights), 1.0)
  right = jnp.argmax(logits, axis=-1) == targets
  loss = -jnp.sum(picked * weights) / total
  return loss, {"loss": loss, "token_accuracy": jnp.sum(right * weights) / total}
