# SPDX-License-Identifier: Apache-2.0
"""Optimisers of Optax with a schedule, and who learns how fast, by parameter path."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from slowfast_jax.errors import UserError
from slowfast_jax.train.layer_decay import layer_factors

NAMES = ("adamw", "adafactor", "muon")
SCHEDULES = ("cosine", "wsd")
_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # Last names of what weight decay is for.

# (regex of parameter paths, factor of the learning rate[, factor of the weight decay]).
Group = tuple[str, float] | tuple[str, float, float]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """What one run of the optimiser does.

  Attributes:
    learning_rate: peak of the schedule.
    warmup_steps: linear rise from 0.
    total_steps: the schedule reaches `final_fraction` of the peak here.
    name: "adamw"; "adafactor", whose memory is that of two vectors a matrix; or "muon" (arXiv
      2502.16982), matrices by Muon at the size of Adam's updates, all else by Adam.
    schedule: "cosine", or "wsd": warm-up, stable, and a linear decay over the last `decay_steps`.
    decay_steps: of "wsd".
    weight_decay: on matrices only; norms, biases and gates are excluded.
    max_grad_norm: gradients are scaled down to this global norm; infinite: they never are.
    groups: (regex on the parameter path, learning-rate factor[, weight-decay factor]); the first
      match counts. Factor 0 freezes: such parameters get no gradient and no place in the
      optimiser's memory.
    layer_decay: each block of the encoder learns at this factor of the rate of the block above it.
  """

  learning_rate: float
  warmup_steps: int
  total_steps: int
  name: str = "adamw"
  schedule: str = "cosine"
  decay_steps: int = 0
  final_fraction: float = 0.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.98
  max_grad_norm: float = 1.0
  groups: tuple[Group, ...] = ()
  layer_decay: float = 1.0

  def __post_init__(self):
    for field, value, known in (
      ("name", self.name, NAMES),
      ("schedule", self.schedule, SCHEDULES),
    ):
      if value not in known:
        raise UserError(f"optimizer.{field} must be one of {known}, got {value!r}.")
    # As "not", so that NaN is none of them.
    for field in ("learning_rate", "max_grad_norm"):
      if not (value := getattr(self, field)) > 0:
        never = "; inf scales no gradient down" if field == "max_grad_norm" else ""
        raise UserError(f"optimizer.{field} must be above 0, got {value}{never}.")
    for field in ("warmup_steps", "decay_steps", "weight_decay", "final_fraction"):
      if not (value := getattr(self, field)) >= 0:
        raise UserError(f"optimizer.{field} must not be negative, got {value}.")
    for field in ("b1", "b2"):
      if not 0 <= (value := getattr(self, field)) < 1:
        raise UserError(f"optimizer.{field} must be at least 0 and below 1, got {value}.")
    if not 0 < self.layer_decay <= 1:
      raise UserError(f"optimizer.layer_decay must be above 0, at most 1, got {self.layer_decay}.")
    if self.schedule == "wsd" and not (
      1 <= self.decay_steps <= max(self.total_steps - self.warmup_steps, 1)
    ):
      raise UserError(
        "optimizer.decay_steps of the schedule 'wsd' must be at least 1 and fit between "
        f"warmup_steps = {self.warmup_steps} and train.steps = {self.total_steps}, "
        f"got {self.decay_steps}."
      )
    for group in self.groups:
      _check_group(group)


def schedule(cfg: OptimizerConfig) -> optax.Schedule:
  """Learning rate by step."""
  peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
  if cfg.schedule == "cosine":
    stop = max(cfg.total_steps, cfg.warmup_steps + 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, cfg.warmup_steps, stop, final)
  rise = optax.linear_schedule(0.0, peak, cfg.warmup_steps)
  fall = optax.linear_schedule(peak, final, cfg.decay_steps)
  bounds = [cfg.warmup_steps, cfg.total_steps - cfg.decay_steps]
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall], bounds)


def learning_rate(cfg: OptimizerConfig, opt_state: optax.OptState) -> jax.Array:
  """What the next update has, of `make_optimizer`. Updates that were skipped do not count."""
  *_, of_schedule = opt_state
  return jnp.asarray(schedule(cfg)(of_schedule.count), jnp.float32)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """The chain: clip, direction, decay, factors of groups and layers, schedule."""
  return optax.chain(
    optax.clip_by_global_norm(cfg.max_grad_norm),
    _direction(cfg),
    _add_decay(cfg),
    _scale_rates(cfg),
    optax.scale_by_learning_rate(schedule(cfg)),
  )


def split_frozen(params: nnx.State, cfg: OptimizerConfig) -> tuple[nnx.State, nnx.State]:
  """The parameters that learn, and those that stay as they are; `nnx.merge_state` joins them."""

  def learns(path: tuple, _: object) -> bool:
    return _factors(cfg.groups, ".".join(map(str, path)))[0] != 0

  learning, frozen = nnx.split_state(params, learns, ...)
  return learning, frozen


def parameter_paths(params: nnx.State) -> list[str]:
  """Dotted path of every parameter, in the order of the tree's leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)
  return [_dotted(path) for path, _ in flat]


def _direction(cfg: OptimizerConfig) -> optax.GradientTransformation:
  adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2)
  if cfg.name == "adamw":
    return adam
  if cfg.name == "adafactor":
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  muon = optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=_matrix_axes),
    optax.stateless(lambda updates, _: _as_large_as_adams(updates)),
  )
  return optax.partition({"muon": muon, "adam": adam}, _muon_or_adam)


def _as_large_as_adams(updates: nnx.State) -> nnx.State:
  """Orthogonal matrices, scaled to elements of 0.2: one learning rate serves Muon and Adam."""

  def scale(update: jax.Array, axes: Any) -> jax.Array:
    sizes = [math.prod(update.shape[i] for i in part) for part in axes]
    return 0.2 * max(sizes) ** 0.5 * update

  return jax.tree.map(scale, updates, _matrix_axes(updates))


def _matrix_axes(params: nnx.State) -> nnx.State:
  """Which axes of a kernel are inputs and which outputs; those before are layers."""

  def of(leaf: nnx.Variable) -> nnx.Variable:
    value = leaf.get_value()
    if isinstance(value, optax.MaskedNode):
      return leaf
    metadata = leaf.get_metadata()
    first = int(metadata["axes"][0] == "layers")
    split = first + metadata["inputs"]
    inputs, outputs = tuple(range(first, split)), tuple(range(split, value.ndim))
    return leaf.replace(optax.contrib.MuonDimensionNumbers(inputs, outputs))

  return jax.tree.map(of, params, is_leaf=_is_variable)


def _muon_or_adam(params: nnx.State) -> nnx.State:
  """Embeddings and the output projection are tables of words, not maps: Adam's, as vectors are."""

  def of(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
    matrix = "inputs" in leaf.get_metadata() and not _dotted(path).startswith("decoder.head")
    return leaf.replace("muon" if matrix else "adam")

  return jax.tree_util.tree_map_with_path(of, params, is_leaf=_is_variable)


def _add_decay(cfg: OptimizerConfig) -> optax.GradientTransformation:
  def decay(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
    rate = cfg.weight_decay * _factors(cfg.groups, path)[1]
    return update + rate * param if rate and path.endswith(_MATRICES) else update

  def of_all(updates: nnx.State, params: nnx.State | None) -> nnx.State:
    assert params is not None
    return _map_with_path(decay, updates, params)

  return optax.stateless(of_all)


def _scale_rates(cfg: OptimizerConfig) -> optax.GradientTransformation:
  def of_all(updates: nnx.State, params: nnx.State | None) -> nnx.State:
    del params
    paths, leaves = parameter_paths(updates), jax.tree.leaves(updates)
    lengths = {path: len(leaf) if leaf.ndim else 1 for path, leaf in zip(paths, leaves)}
    layers = layer_factors(lengths, cfg.layer_decay)

    def scale(path: str, update: jax.Array) -> jax.Array:
      factor = jnp.asarray(layers.get(path, 1.0)) * _factors(cfg.groups, path)[0]
      factor = factor.reshape(-1, *[1] * (update.ndim - 1)) if factor.ndim else factor
      return update * factor.astype(update.dtype)

    return _map_with_path(scale, updates)

  return optax.stateless(of_all)


def _factors(groups: tuple[Group, ...], path: str) -> tuple[float, float]:
  """Factors of the learning rate and of the weight decay."""
  group = next((group for group in groups if re.search(group[0], path)), ("", 1.0))
  return group[1], group[2] if len(group) > 2 else 1.0


def _check_group(group: Any) -> None:
  expected = "(regex, learning-rate factor[, weight-decay factor])"
  numbers = group[1:] if isinstance(group, tuple | list) else ()
  if not 1 <= len(numbers) <= 2 or not all(isinstance(x, int | float) for x in numbers):
    raise UserError(f"optimizer.groups: each must be {expected}, got {group!r}.")
  if min(numbers) < 0:
    raise UserError(f"optimizer.groups: factors must not be negative, got {group!r}.")
  try:
    re.compile(group[0])
  except (re.error, TypeError) as error:
    raise UserError(f"optimizer.groups: {group[0]!r} is no regex ({error}).") from error


def _map_with_path(function: Any, tree: nnx.State, *rest: nnx.State) -> nnx.State:
  """`function(dotted path, array, ...)` of every parameter."""

  def of(path: tuple, leaf: Any, *others: Any) -> Any:
    name = _dotted(path)
    return jax.tree.map(lambda *arrays: function(name, *arrays), leaf, *others)

  return jax.tree_util.tree_map_with_path(of, tree, *rest, is_leaf=_is_variable)


def _is_variable(leaf: object) -> bool:
  return isinstance(leaf, nnx.Variable)


def _dotted(path: tuple) -> str:
  return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
