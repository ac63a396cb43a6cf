# SPDX-License-Identifier: Apache-2.0
"""AdamW with warm-up and cosine decay; learning-rate groups by parameter path."""

import dataclasses
import re

import jax
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """What one run of the optimiser does.

  Attributes:
    learning_rate: peak of the schedule.
    warmup_steps: linear rise from 0.
    total_steps: the cosine reaches `final_fraction` of the peak here.
    weight_decay: on matrices only; norms, biases and gates are excluded.
    max_grad_norm: gradients are scaled down to this global norm.
    groups: (regex on the parameter path, learning-rate factor); the first match counts. Factor 0
      freezes: such parameters get no gradient and no place in the optimiser's memory.
  """

  learning_rate: float
  warmup_steps: int
  total_steps: int
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.98
  max_grad_norm: float = 1.0
  groups: tuple[tuple[str, float], ...] = ()


def schedule(cfg: OptimizerConfig) -> optax.Schedule:
  """Learning rate by step."""
  return optax.warmup_cosine_decay_schedule(
    0.0,
    cfg.learning_rate,
    cfg.warmup_steps,
    max(cfg.total_steps, cfg.warmup_steps + 1),
    cfg.learning_rate * cfg.final_fraction,
  )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """The chain: clip, Adam, decay, group factors, schedule."""
  return optax.chain(
    optax.clip_by_global_norm(cfg.max_grad_norm),
    optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2),
    optax.add_decayed_weights(cfg.weight_decay, mask=_is_matrix),
    _scale_groups(cfg.groups),
    optax.scale_by_learning_rate(schedule(cfg)),
  )


def split_frozen(params: nnx.State, cfg: OptimizerConfig) -> tuple[nnx.State, nnx.State]:
  """The parameters that learn, and those that stay as they are; `nnx.merge_state` joins them."""

  def learns(path: tuple, _: object) -> bool:
    return _factor(cfg.groups, ".".join(map(str, path))) != 0

  learning, frozen = nnx.split_state(params, learns, ...)
  return learning, frozen


def parameter_paths(params: nnx.State) -> list[str]:
  """Dotted path of every parameter, in the order of the tree's leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)
  return [_dotted(path) for path, _ in flat]


def _scale_groups(groups: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
  def update(updates, state, params=None):
    del params
    scaled = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jax.tree.map(lambda x: x * _factor(groups, _dotted(path)), leaf),
      updates,
      is_leaf=_is_variable,
    )
    return scaled, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _factor(groups: tuple[tuple[str, float], ...], path: str) -> float:
  return next((factor for pattern, factor in groups if re.search(pattern, path)), 1.0)


def _is_matrix(params: nnx.State) -> nnx.State:
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.tree.map(
      lambda _: _dotted(path).endswith(("kernel", "embedding")), leaf
    ),
    params,
    is_leaf=_is_variable,
  )


def _is_variable(leaf: object) -> bool:
  return isinstance(leaf, nnx.Variable)


def _dotted(path: tuple) -> str:
  return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
