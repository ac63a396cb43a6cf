# SPDX-License-Identifier: Apache-2.0
"""The training step: pure, and donated by whoever jits it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from slowfast_jax.models.slowfast import SlowFast, SlowFastConfig, graphdef_of
from slowfast_jax.shapes import Batch
from slowfast_jax.train.losses import next_token_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run carries from step to step."""

  step: Int[Array, ""]
  params: nnx.State
  opt_state: optax.OptState


def init_state(
  cfg: SlowFastConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """A fresh model and optimiser."""
  params = nnx.state(SlowFast(cfg, rngs=nnx.Rngs(key)))
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
  cfg: SlowFastConfig, optimizer: optax.GradientTransformation, *, dtype: jnp.dtype, remat: bool
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """`(state, batch) -> (state, metrics)`."""
  graphdef = graphdef_of(cfg)

  def loss_fn(params: nnx.State, batch: Batch):
    model = nnx.merge(graphdef, params)
    hidden = model(batch, dtype=dtype, remat=remat)
    return next_token_loss(model.decoder.logits(hidden), batch.targets, batch.loss_weights)

  def train_step(state: TrainState, batch: Batch):
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {"grad_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step
