# SPDX-License-Identifier: Apache-2.0
"""The training step: pure, and donated by whoever jits it."""

import dataclasses
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from slowfast_jax.models.slowfast import SlowFast, SlowFastConfig, abstract_params, graphdef_of
from slowfast_jax.shapes import Batch
from slowfast_jax.sharding import constrain, constrain_state
from slowfast_jax.train.losses import chunk_length, next_token_loss, total_weight
from slowfast_jax.train.optimizer import OptimizerConfig, make_optimizer, split_frozen

Metrics = dict[str, Array]


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
  return _start(nnx.state(SlowFast(cfg, rngs=nnx.Rngs(key))), optimizer_config)


def state_shapes(cfg: SlowFastConfig, optimizer_config: OptimizerConfig) -> TrainState:
  """Shapes, dtypes and axes of what `init_state` returns; nothing is computed."""
  return jax.eval_shape(lambda params: _start(params, optimizer_config), abstract_params(cfg))


def _start(params: nnx.State, optimizer_config: OptimizerConfig) -> TrainState:
  learning, _ = split_frozen(params, optimizer_config)
  return TrainState(
    jnp.zeros((), jnp.int32), params, make_optimizer(optimizer_config).init(learning)
  )


def make_train_step(
  cfg: SlowFastConfig,
  optimizer_config: OptimizerConfig,
  *,
  dtype: jnp.dtype,
  remat: str,
  frame_chunk: int = 0,
  accumulation: int = 1,
  z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """`(state, batch) -> (state, metrics)`.

  A step whose loss or gradient is not finite changes nothing but the number of steps, and has 1 as
  its metric "skipped".

  Args:
    cfg: the model.
    optimizer_config: who learns, and how.
    dtype: what the model computes in. Parameters, gradients and the optimiser are float32.
    remat: what the backward pass keeps of each layer, a name of `models.remat.REMAT`.
    frame_chunk: frames that a device encodes at a time, and again in the backward pass; 0: all.
    accumulation: parts of a batch that are computed one after the other; their mean gradient, by
      the weights of the whole batch, is that of the batch.
    z_loss: see `next_token_loss`.
  """
  graphdef, optimizer = graphdef_of(cfg), make_optimizer(optimizer_config)

  def loss_fn(learning: nnx.State, frozen: nnx.State, batch: Batch, total: Array):
    model = nnx.merge(graphdef, learning, frozen)
    hidden = model(batch, dtype=dtype, policy=remat, frame_chunk=frame_chunk)
    return _loss(model, hidden, batch, total, z_loss)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    learning, frozen = split_frozen(state.params, optimizer_config)
    total = total_weight(batch.loss_weights)

    def gradient(batch: Batch) -> tuple[nnx.State, Metrics]:
      gradients, metrics = jax.grad(loss_fn, has_aux=True)(learning, frozen, batch, total)
      return constrain_state(gradients), metrics

    gradients, metrics = _sum_parts(gradient, batch, accumulation)
    metrics |= gradient_norms(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, learning)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    learning, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (optax.apply_updates(learning, updates), opt_state),
      (learning, state.opt_state),
    )
    metrics["skipped"] = jnp.where(finite, 0, 1)
    return TrainState(state.step + 1, nnx.merge_state(learning, frozen), opt_state), metrics

  return train_step


def _loss(
  model: SlowFast, hidden: Float[Array, "B T D"], batch: Batch, total: Array, z_loss: float
) -> tuple[Array, Metrics]:
  """What is minimised, of a batch's last hidden states, and its metrics."""
  return next_token_loss(
    hidden,
    model.decoder.projection(),
    batch.targets,
    batch.loss_weights,
    total=total,
    z_loss=z_loss,
    chunk=chunk_length(len(batch.tokens), model.cfg.decoder.vocab_size),
    most=_most_learned(model.cfg, batch),
  )


def _most_learned(cfg: SlowFastConfig, batch: Batch) -> int:
  """Positions of a row that may be learned: their targets are text, which has a bound."""
  asking = "text-only" if cfg.hybrid is None else cfg.hybrid.queries
  # Text of a system's prompt, which does not ask here, may be a target.
  every = asking == "text-only-masksystem"
  return batch.tokens.shape[1] if every else batch.text_index.shape[1]


def gradient_norms(gradients: nnx.State) -> Metrics:
  """ "grad_norm" of all parameters that learn, and "grad_norm/PART" of each part of the model."""
  squares = {str(part): optax.tree.norm(tree, squared=True) for part, tree in gradients.items()}
  norms = {f"grad_norm/{part}": jnp.sqrt(square) for part, square in squares.items()}
  return {"grad_norm": jnp.sqrt(sum(squares.values(), jnp.zeros(()))), **norms}


def _sum_parts(
  function: Callable[[Batch], tuple[nnx.State, Metrics]], batch: Batch, count: int
) -> tuple[nnx.State, Metrics]:
  """The sum of `function` over `count` parts of a batch, with the memory of one part.

  Part i has every count-th row from row i on, so each device has its share of every part: rows
  stay where they are.
  """
  if count == 1:
    return function(batch)
  columns = jax.tree.map(lambda x: einops.rearrange(x, "(B n) ... -> B n ...", n=count), batch)

  def part(i: Array | int) -> tuple[nnx.State, Metrics]:
    def rows(x: Array) -> Array:
      return constrain(jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), "batch")

    return function(jax.tree.map(rows, columns))

  def body(done: tuple[nnx.State, Metrics], i: Array):
    return jax.tree.map(jnp.add, done, part(i)), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0))
  return jax.lax.scan(body, zeros, jnp.arange(count))[0]
