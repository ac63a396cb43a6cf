# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy (semantics section 3), without the scores of all positions at once.

Scores of a 150,000-word vocabulary at every position would be the largest array of a step by far.
So positions that are learned are taken to the front, and scored some at a time, in the backward
pass once more; parts in which no position of the batch is learned are not scored at all. Where all
that may be learned are few enough, they are scored once and their scores kept.
"""

import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention.blocks import target_device_kind
from slowfast_jax.sharding import RULES, axes_that_divide, gather, mesh_in_force, state_specs

# Scores of a device that exist together: 256 MiB, and enough rows to fill a matrix unit.
SCORES_AT_ONCE = 2**26
# 1 GiB on v6e, whose memory is slow beside its matrix units: with each further part the gradient of
# the projection is read and written again.
SCORES_AT_ONCE_OF_V6E = 2**28

Project = Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]]


def next_token_loss(
  hidden: Float[Array, "B T D"],
  project: Project,
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  total: Float[Array, ""] | None = None,
  z_loss: float = 0.0,
  chunk: int | None = None,
  most: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean cross-entropy over weighted targets, and the share of them that is predicted right.

  Args:
    hidden: last hidden states.
    project: their scores of the vocabulary; a pytree, see `Decoder.projection`.
    targets: the next token of each position.
    weights: how much each counts; 0 where nothing is learned.
    total: what the sums are divided by; None: the weights' sum, at least 1.
    z_loss: weight of the mean squared log-partition, which keeps scores from drifting (PaLM,
      arXiv 2204.02311, section 5).
    chunk: positions of a row that are scored at a time; None: all.
    most: no row has more positions that are learned; None: all may be.

  Returns:
    What is minimised, and metrics: "loss" is the cross-entropy alone.
  """
  if total is None:
    total = total_weight(weights)

  arrays = (hidden, targets, weights)

  def sums(project: Project, *arrays: Array) -> Float[Array, " three"]:
    length = min(most or hidden.shape[1], hidden.shape[1])
    if chunk is None or chunk >= hidden.shape[1]:
      return _sums(project, *arrays)
    if chunk >= length:
      return _sums(project, *[x[0] for x in _chunks(arrays, length, length)])
    return _sum_chunks(project, *_chunks(arrays, chunk, length))

  found = _sum_devices(sums, project, arrays)
  nll, right, squares = found / total
  metrics = {"loss": nll, "token_accuracy": right}
  if z_loss:
    metrics["z_loss"] = z_loss * squares
  return nll + z_loss * squares, metrics


def total_weight(weights: Float[Array, "B T"]) -> Float[Array, ""]:
  """What a batch's losses are divided by. Without targets (all records failed): 1, not 0 / 0."""
  return jnp.maximum(jnp.sum(weights), 1.0)


def chunk_length(batch_size: int, vocab_size: int) -> int:
  """Positions of every row that may be scored together, by what a device of the mesh holds."""
  mesh = mesh_in_force()

  def parts(name: str, size: int) -> int:
    rule = RULES[name]
    axes = (rule,) if isinstance(rule, str) else rule
    count = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    return count if size % count == 0 else 1

  scores = batch_size * vocab_size // parts("batch", batch_size) // parts("vocab", vocab_size)
  v6e = target_device_kind().startswith("TPU v6")
  return max((SCORES_AT_ONCE_OF_V6E if v6e else SCORES_AT_ONCE) // scores, 1)


def _sums(
  project: Project,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
) -> Float[Array, " three"]:
  """Weighted sums over positions: cross-entropy, right answers, squared log-partitions."""
  logits = project(hidden).astype(jnp.float32)
  partition = jax.nn.logsumexp(logits, axis=-1)
  # Not an index: a vocabulary that is spread over devices is summed where it lies.
  here = jnp.arange(logits.shape[-1]) == targets[..., None]
  picked = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
  right = jnp.argmax(logits, axis=-1) == targets
  parts = (partition - picked, right.astype(jnp.float32), jnp.square(partition))
  return jnp.stack([jnp.sum(part * weights) for part in parts])


def _sum_devices(
  sums: Callable[..., Float[Array, " three"]], project: Project, arrays: tuple[Array, ...]
) -> Float[Array, " three"]:
  """`sums(project, *arrays)`, on each device of its own rows.

  So what a projection is made of is gathered once, and its gradient added up over devices once, not
  with every chunk.
  """
  mesh = mesh_in_force()
  axes = () if mesh is None else axes_that_divide("batch", len(arrays[0]), mesh)
  if mesh is None or math.prod(mesh.shape[axis] for axis in axes) == 1:
    return sums(project, *arrays)
  specs = state_specs(project, mesh, axes)

  def local(project: Project, *arrays: Array) -> Float[Array, "devices three"]:
    return sums(gather(project, specs), *arrays)[None]

  lie = PartitionSpec(axes)
  # Unchecked: the projection's own derivative does not say over which axes it varies.
  parts = jax.shard_map(
    local,
    in_specs=(specs, *[lie] * len(arrays)),
    out_specs=lie,
    axis_names=set(axes),
    check_vma=False,
  )(project, *arrays)
  return parts.sum(axis=0)


def _chunks(arrays: tuple[Array, ...], chunk: int, length: int) -> list[Array]:
  """Of arrays [B, T, ...] so many positions as [n, B, t, ...], those that are learned first."""
  num_chunks = -(-length // chunk)
  size = -(-length // num_chunks)
  padding = [(0, 0), (0, size * num_chunks - length)]
  order = jnp.argsort(arrays[-1] == 0, axis=1, stable=True)[:, :length]

  def split(x: Array) -> Array:
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, axis=1)
    x = jnp.pad(x, padding + [(0, 0)] * (x.ndim - 2))
    return einops.rearrange(x, "B (n t) ... -> n B t ...", n=num_chunks)

  return [split(x) for x in arrays]


@jax.custom_vjp
def _sum_chunks(
  project: Project,
  hidden: Float[Array, "n B t D"],
  targets: Int[Array, "n B t"],
  weights: Float[Array, "n B t"],
) -> Float[Array, " three"]:
  """`_sums`, of one chunk after the other; chunks without weights are not scored.

  Its derivative is its own because JAX's would write a gradient of the projection for every chunk,
  zeros for those that are not scored, before it adds them up.
  """

  def body(done: Array, part: list[Array]) -> tuple[Array, None]:
    return jax.lax.cond(
      jnp.any(part[2] != 0), lambda: done + _sums(project, *part), lambda: done
    ), None

  return jax.lax.scan(body, jnp.zeros(3), [hidden, targets, weights])[0]


def _sum_chunks_forward(project: Any, *arrays: Any):
  learns = any(leaf.perturbed for leaf in jax.tree.leaves(project))
  values = jax.tree.map(lambda leaf: leaf.value, (project, *arrays))
  # An empty tuple or None, since what is kept must be arrays.
  return _sum_chunks(*values), (values, () if learns else None)


def _sum_chunks_backward(kept: tuple, dy: Float[Array, " three"]):
  (project, *parts), learns = kept

  def body(done: Any, part: list[Array]):
    hidden, targets, weights = part

    def scored():
      if learns is None:
        _, pull = jax.vjp(lambda *x: _sums(project, x[0], targets, x[1]), hidden, weights)
        return done, pull(dy)
      _, pull = jax.vjp(lambda p, *x: _sums(p, x[0], targets, x[1]), project, hidden, weights)
      more, *found = pull(dy)
      return jax.tree.map(jnp.add, done, more), tuple(found)

    def skipped():
      return done, (jnp.zeros_like(hidden), jnp.zeros_like(weights))

    return jax.lax.cond(jnp.any(weights != 0), scored, skipped)

  zeros = None if learns is None else jax.tree.map(jnp.zeros_like, project)
  dproject, (dhidden, dweights) = jax.lax.scan(body, zeros, parts)
  return dproject, dhidden, None, dweights


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward, symbolic_zeros=True)
