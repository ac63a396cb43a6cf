# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention on NVIDIA GPUs, by cuDNN's fused attention where that knows the case."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention.blocks import target_platform
from slowfast_jax.kernels.cross_attention.xla import cross_attention_xla

MAX_HEAD_DIM = 128


def cross_attention_cudnn(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Attention output and log-sum-exp; arguments as in `cross_attention`.

  cuDNN takes lengths, but no segments, and only half precision; all else is XLA's blockwise form.
  So is the log-sum-exp, which JAX hands out in half precision only: under `jax.jit` it costs
  nothing where nobody asks for it.

  Raises:
    ValueError: what is compiled for is not a GPU.
  """
  if target_platform() not in ("gpu", "cuda"):
    raise ValueError(
      f'implementation "cudnn" runs on NVIDIA GPUs, and this is compiled for {target_platform()}; '
      "leave `implementation` out to get the best of the platform."
    )
  masks = (kv_lengths, q_segments, kv_segments)
  out, lse = cross_attention_xla(q, k, v, *masks, scale=scale)
  if q_segments is not None or not _known(q, k, v):
    return out, lse
  if kv_lengths is None:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), lse
  lengths = jnp.clip(kv_lengths, 0, k.shape[1]).astype(jnp.int32)
  # Of a row without keys nothing is asked, neither forward nor backward.
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    key_value_seq_lengths=jnp.maximum(lengths, 1),
    implementation="cudnn",
  )
  return jnp.where(lengths[:, None, None, None] > 0, out, 0), lse


def _known(q, k, v):
  half = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
  return half and q.shape[3] % 8 == 0 and q.shape[3] <= MAX_HEAD_DIM and k.size > 0
