# SPDX-License-Identifier: Apache-2.0
"""Teaches a fresh vision encoder words: the stand-in for the pretrained encoder of a real run.

SigLIP's loss (arXiv 2303.15343), with words for texts and quadrants for images: every pair of a
quadrant's visual token and a word is a yes or no question. It takes seconds, and without it the
language model would have to learn to see and to look things up at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from slowfast_jax.checkpoints.store import Export, VideoConfig
from slowfast_jax.data.records import RecordSource, decode_frames
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.models.slowfast import SlowFast, graphdef_of
from slowfast_jax.train.plan import model_config

# Logits of a pair start near SigLIP's: almost every pair is a no.
_SCALE, _BIAS = 4.0, -2.0
_BATCH, _WARMUP = 32, 30


def align(
  config: ml_collections.ConfigDict,
  source: RecordSource,
  tokenizer: Tokenizer,
  words: Sequence[str],
  steps: int,
  progress: Callable[[int, int, str], Any],
) -> Export:
  """Trains encoder, projector and the words' embeddings of a fresh fast-only model.

  Args:
    config: names the model, its seed and learning rate.
    source: stills whose annotations have `regions`, a list of words for each quadrant.
    tokenizer: the text side.
    words: what can be in a quadrant.
    steps: of the optimiser.
    progress: is told of every tenth step.
  """
  model = model_config(config.model)
  pictures, labels = _load(source, words)
  # A word inside a sentence has a blank before it, and so a token of its own.
  ids = jnp.array([tokenizer.encode(f" {word}")[0] for word in words])
  optimizer = optax.adam(
    optax.warmup_cosine_decay_schedule(0, config.optimizer.learning_rate, _WARMUP, steps)
  )
  params = jax.jit(lambda key: nnx.state(SlowFast(model, rngs=nnx.Rngs(key))))(
    jax.random.key(config.seed)
  )
  graphdef = graphdef_of(model)

  @jax.jit
  def step(params, opt_state, frames, targets):
    def loss_fn(params):
      return word_loss(nnx.merge(graphdef, params), frames, targets, ids)

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  opt_state = optimizer.init(params)
  rng = np.random.default_rng(config.seed)
  for i in range(1, steps + 1):
    rows = rng.integers(0, len(pictures), _BATCH)
    params, opt_state, loss = step(params, opt_state, pictures[rows], labels[rows])
    if i % 10 == 0:
      progress(i, steps, f"loss {float(loss):.4f}")
  return Export(model, params, tokenizer, VideoConfig(1), config.system)


def word_loss(
  model: SlowFast,
  frames: UInt8[Array, "B 1 h w 3"],
  targets: Float[Array, "B R W"],
  ids: Int[Array, " W"],
) -> Float[Array, ""]:
  """Sigmoid cross-entropy of every (quadrant, word) pair, summed over the words."""
  tokens = model.encode(frames, jnp.float32)[:, 0]
  half = model.cfg.vision.side // 2
  quadrants = einops.rearrange(tokens, "B (y h x w) D -> B (y x) (h w) D", y=2, x=2, h=half, w=half)
  embedding = model.decoder.embed.embedding[...][ids]
  logits = jnp.einsum("BRPD,WD->BRW", quadrants, embedding) / half**2 * _SCALE + _BIAS
  return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1))


def _load(
  source: RecordSource, words: Sequence[str]
) -> tuple[UInt8[np.ndarray, "n 1 h w 3"], Float[np.ndarray, "n R W"]]:
  pictures, labels = [], []
  for i in range(len(source)):
    record = source[i]
    pictures.append(decode_frames(record))
    regions = record.metadata["entries"][0]["regions"]
    labels.append([[float(word in region) for word in words] for region in regions])
  return np.stack(pictures), np.array(labels, np.float32)
