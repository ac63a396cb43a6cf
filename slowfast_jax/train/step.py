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
from slowfast_jax.train.optimizer import OptimizerConfig, make_optimizer, split_frozen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run carries from step to step.

  Attributes:
    step: steps done.
    params: all of the model's parameters.
    opt_state: the optimiser's memory of those that learn.
  """

  step: Int[Array, ""]
  params: nnx.State
  opt_state: optax.OptState


def init_state(
  cfg: SlowFastConfig, optimizer_config: OptimizerConfig, key: jax.Array
) -> TrainState:
  """A fresh model and optimiser."""
  params = nnx.state(SlowFast(cfg, rngs=nnx.Rngs(key)))
  learning, _ = split_frozen(params, optimizer_config)
  return TrainState(
    jnp.zeros((), jnp.int32), params, make_optimizer(optimizer_config).init(learning)
  )


def make_train_step(
  cfg: SlowFastConfig, optimizer_config: OptimizerConfig, *, dtype: jnp.dtype, remat: str
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """`(state, batch) -> (state, metrics)`."""
  graphdef, optimizer = graphdef_of(cfg), make_optimizer(optimizer_config)

  def loss_fn(learning: nnx.State, frozen: nnx.State, batch: Batch):
    model = nnx.merge(graphdef, learning, frozen)
    hidden = model(batch, dtype=dtype, policy=remat)
    return next_token_loss(model.decoder.logits(hidden), batch.targets, batch.loss_weights)

  def train_step(state: TrainState, batch: Batch):
    learning, frozen = split_frozen(state.params, optimizer_config)
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(learning, frozen, batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state, learning)
    params = nnx.merge_state(optax.apply_updates(learning, updates), frozen)
    metrics = metrics | {"grad_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step
