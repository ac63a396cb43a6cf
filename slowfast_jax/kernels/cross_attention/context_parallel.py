# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention on a mesh, with the slow tokens of a video spread over one of its axes.

Every device attends to its own part of the keys and values, which never travel: what does is the
output and the log-sum-exp of the queries, by which the parts merge, and on the way back dq. So the
bytes on the wire are proportional to the text, and frames scale with devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention import pallas_tpu, xla
from slowfast_jax.kernels.cross_attention.ops import check_call, implementation_of


@dataclasses.dataclass(frozen=True)
class Part:
  """How a device attends to its part of the keys.

  Attributes:
    forward: (q, k, v, masks, scale) -> output and log-sum-exp of the part.
    backward: (q, k, v, masks, out, lse, d_out, d_lse, scale) -> dq, dk, dv, where out and lse are
      those of all parts. The dq of the parts add up.
  """

  forward: Callable
  backward: Callable


# cuDNN takes no log-sum-exp of others, so the parts on a GPU are XLA's.
PARTS = {
  "xla": Part(xla.forward, xla.backward),
  "cudnn": Part(xla.forward, xla.backward),
  "pallas_tpu": Part(pallas_tpu.forward_part, pallas_tpu.backward_part),
  "pallas_tpu_interpret": Part(
    functools.partial(pallas_tpu.forward_part, interpret=True),
    functools.partial(pallas_tpu.backward_part, interpret=True),
  ),
}


# One axis of a mesh, or several that work as one.
Axes = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Mesh axes on which the axes of a call lie; what does not divide is replicated.

  Attributes:
    mesh: the mesh, or its shape alone where it is in force.
    context: of the slow tokens.
    batch: of the rows.
    heads: of the heads, query and KV heads alike.
  """

  mesh: Mesh | AbstractMesh
  context: Axes
  batch: Axes = ()
  heads: Axes = ()

  def size(self, axes: Axes) -> int:
    """Devices along some axes together."""
    return math.prod(self.mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))

  def specs(self, rows: int, kv_heads: int) -> tuple[PartitionSpec, PartitionSpec]:
    """Where queries [B, T, N, H] and keys [B, S, K, H] lie; masks lie as they do."""
    batch = self.batch if rows % self.size(self.batch) == 0 else None
    heads = self.heads if kv_heads % self.size(self.heads) == 0 else None
    return PartitionSpec(batch, None, heads), PartitionSpec(batch, self.context, heads)


def cross_attention_on_mesh(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  layout: Layout,
  scale: float | None = None,
  implementation: str | None = None,
  return_lse: bool = True,
):
  """`cross_attention` of arrays that lie on a mesh: the same arguments, results and gradients.

  Keys whose number is not a multiple of the context axis are padded, which copies them.

  Args:
    q, k, v, kv_lengths, q_segments, kv_segments: as in `cross_attention`.
    layout: where they lie, or are brought to.
    scale, implementation, return_lse: as in `cross_attention`; "cudnn" is "xla" here.

  Returns:
    Output and log-sum-exp, alike on all devices of the context axis.

  Raises:
    ValueError: as `cross_attention`.
  """
  masks = (kv_lengths, q_segments, kv_segments)
  check_call(q, k, v, *masks)
  name = implementation_of(implementation)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  missing = -k.shape[1] % layout.size(layout.context)
  if missing:
    k, v, masks = _pad_keys(k, v, masks, missing)
  dtype = jnp.result_type(q, k, v)
  out, lse = _attention(*(x.astype(dtype) for x in (q, k, v)), masks, scale, name, layout)
  out = out.astype(q.dtype)
  return (out, lse) if return_lse else out


def _pad_keys(k, v, masks, missing):
  lengths, q_segments, kv_segments = masks
  if lengths is None:
    lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32)
  if kv_segments is not None:
    kv_segments = jnp.pad(kv_segments, ((0, 0), (0, missing)))
  k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k, v))
  return k, v, (jnp.minimum(lengths, k.shape[1] - missing), q_segments, kv_segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, masks, scale, name, layout):
  return _attention_forward(q, k, v, masks, scale, name, layout)[0]


def _attention_forward(q, k, v, masks, scale, name, layout):
  def part(q, k, v, masks):
    masks = _masks_of_part(masks, k.shape[1], layout)
    out, lse = PARTS[name].forward(q, k, v, masks, scale)
    return _merge(out, lse, layout)

  of_q, of_k = layout.specs(k.shape[0], k.shape[2])
  inputs = (of_q, of_k, of_k, _mask_specs(masks, of_q, of_k))
  out, lse = _on_devices(part, layout, inputs, (of_q, of_q))(q, k, v, masks)
  return (out, lse), (q, k, v, masks, out, lse)


def _attention_backward(scale, name, layout, saved, cotangents):
  def part(q, k, v, masks, out, lse, d_out, d_lse):
    masks = _masks_of_part(masks, k.shape[1], layout)
    dq, dk, dv = PARTS[name].backward(q, k, v, masks, out, lse, d_out, d_lse, scale)
    if layout.size(layout.context) > 1:
      dq = jax.lax.psum(dq.astype(jnp.float32), layout.context).astype(q.dtype)
    return dq, dk, dv

  _, k, _, masks, *_ = saved
  of_q, of_k = layout.specs(k.shape[0], k.shape[2])
  inputs = (of_q, of_k, of_k, _mask_specs(masks, of_q, of_k), of_q, of_q, of_q, of_q)
  gradients = _on_devices(part, layout, inputs, (of_q, of_k, of_k))(*saved, *cotangents)
  return (*gradients, None)


_attention.defvjp(_attention_forward, _attention_backward)


def _on_devices(part, layout, in_specs, out_specs):
  # Unchecked: what a kernel writes does not say over which axes it varies.
  return jax.shard_map(
    part, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _mask_specs(masks, of_q, of_k):
  """Lengths [B], segments of queries [B, T] and of keys [B, S] lie as what they describe."""
  specs = PartitionSpec(of_q[0]), PartitionSpec(*of_q[:2]), PartitionSpec(*of_k[:2])
  return tuple(None if mask is None else spec for mask, spec in zip(masks, specs))


def _masks_of_part(masks, keys, layout):
  """Of the valid keys, those in this device's part."""
  lengths, q_segments, kv_segments = masks
  if lengths is not None:
    first = jax.lax.axis_index(layout.context) * keys
    lengths = jnp.clip(lengths - first, 0, keys)
  return lengths, q_segments, kv_segments


def _merge(out, lse, layout):
  """Output and log-sum-exp over all parts."""
  if layout.size(layout.context) == 1:
    return out, lse
  peak = jax.lax.pmax(lse, layout.context)
  # Of a query that sees no key at all; -inf - -inf would be NaN.
  peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
  share = jnp.exp(lse - peak)
  read = out.astype(jnp.float32) * share[..., None]
  read, total = jax.lax.psum((read, share), layout.context)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  merged = (read / total[..., None]).astype(out.dtype)
  return merged, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)
