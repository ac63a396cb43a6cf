# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy (semantics section 3), without the scores of all positions at once.

Scores of a 150,000-word vocabulary at every position would be the largest array of a step by far.
So positions that are learned are taken to the front, and scored some at a time, in the backward
pass once more; parts in which no position of the batch is learned are not scored at all.
"""

import functools
import math
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from slowfast_jax.sharding import RULES, axes_that_divide, mesh_in_force

# Scores of a device that exist together: 256 MiB, and enough rows to fill a matrix unit.
SCORES_AT_ONCE = 2**26

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
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mean cross-entropy over weighted targets, and the share of them that is predicted right.

  Args:
    hidden: last hidden states.
    project: their scores of the vocabulary; on a mesh a pytree, see `Decoder.projection`.
    targets: the next token of each position.
    weights: how much each counts; 0 where nothing is learned.
    total: what the sums are divided by; None: the weights' sum, at least 1.
    z_loss: weight of the mean squared log-partition, which keeps scores from drifting (PaLM,
      arXiv 2204.02311, section 5).
    chunk: positions of a row that are scored at a time; None: all.

  Returns:
    What is minimised, and metrics: "loss" is the cross-entropy alone.
  """
  if total is None:
    total = total_weight(weights)

  def sums(project: Project, hidden: Array, targets: Array, weights: Array):
    logits = project(hidden).astype(jnp.float32)
    partition = jax.nn.logsumexp(logits, axis=-1)
    # Not an index: a vocabulary that is spread over devices is summed where it lies.
    here = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    right = jnp.argmax(logits, axis=-1) == targets
    parts = (partition - picked, right.astype(jnp.float32), jnp.square(partition))
    return jnp.stack([jnp.sum(part * weights) for part in parts])

  arrays = (hidden, targets, weights)
  whole = chunk is None or chunk >= hidden.shape[1]

  def all_sums(project: Project, *arrays: Array) -> Float[Array, " three"]:
    some = functools.partial(sums, project)
    return some(*arrays) if whole else _sum_chunks(some, arrays, chunk or 1)

  found = _sum_devices(all_sums, project, arrays)
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
  return max(SCORES_AT_ONCE // scores, 1)


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

  def local(project: Project, *arrays: Array) -> Float[Array, "devices three"]:
    return sums(project, *arrays)[None]

  lie = PartitionSpec(axes)
  # Unchecked: the projection's own derivative does not say over which axes it varies.
  parts = jax.shard_map(
    local,
    in_specs=(PartitionSpec(), *[lie] * len(arrays)),
    out_specs=lie,
    axis_names=set(axes),
    check_vma=False,
  )(project, *arrays)
  return parts.sum(axis=0)


def _sum_chunks(
  sums: Callable[..., Float[Array, " three"]], arrays: tuple[Array, ...], chunk: int
) -> Float[Array, " three"]:
  """`sums(*arrays)`, of some positions of every row at a time, learned ones first."""
  hidden, targets, weights = arrays
  num_chunks = -(-hidden.shape[1] // chunk)
  size = -(-hidden.shape[1] // num_chunks)
  padding = [(0, 0), (0, size * num_chunks - hidden.shape[1])]
  order = jnp.argsort(weights == 0, axis=1, stable=True)

  def split(x: Array) -> Array:
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    x = jnp.take_along_axis(x, index, axis=1)
    x = jnp.pad(x, padding + [(0, 0)] * (x.ndim - 2))
    return einops.rearrange(x, "B (n t) ... -> n B t ...", n=num_chunks)

  @jax.checkpoint
  def one(hidden: Array, targets: Array, weights: Array) -> Float[Array, " three"]:
    def nothing(*_: Array) -> Float[Array, " three"]:
      return jnp.zeros(3)

    return jax.lax.cond(jnp.any(weights != 0), sums, nothing, hidden, targets, weights)

  def body(done: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
    return done + one(*part), None

  parts = (split(hidden), split(targets), split(weights))
  return jax.lax.scan(body, jnp.zeros(3), parts)[0]
