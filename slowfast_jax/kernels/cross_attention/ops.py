# SPDX-License-Identifier: Apache-2.0
"""The public function of slow cross-attention: checks the call, then picks an implementation."""

import functools
from collections.abc import Callable

from jaxtyping import Array, Float, Int

from slowfast_jax.kernels.cross_attention.blocks import target_platform
from slowfast_jax.kernels.cross_attention.cudnn import cross_attention_cudnn
from slowfast_jax.kernels.cross_attention.pallas_tpu import cross_attention_pallas_tpu
from slowfast_jax.kernels.cross_attention.xla import cross_attention_xla

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
  "pallas_tpu": cross_attention_pallas_tpu,
  "pallas_tpu_interpret": functools.partial(cross_attention_pallas_tpu, interpret=True),
  "xla": cross_attention_xla,
  "cudnn": cross_attention_cudnn,
}
# The best of a platform; "xla" elsewhere.
BEST = {"tpu": "pallas_tpu"}


def cross_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  kv_lengths: Int[Array, " B"] | None = None,
  q_segments: Int[Array, "B T"] | None = None,
  kv_segments: Int[Array, "B S"] | None = None,
  *,
  scale: float | None = None,
  implementation: str | None = None,
  return_lse: bool = True,
):
  """Few queries over many keys with grouped heads; linear in the number of keys.

  Args:
    q: queries; the heads of one group share a key/value head.
    k: keys.
    v: values.
    kv_lengths: valid prefix of S in each row; all of S where absent.
    q_segments: packing id of each query, 0 = padding. Given together with `kv_segments`.
    kv_segments: packing id of each key; a query sees keys of its own segment only.
    scale: factor on the logits, 1 / sqrt(H) where absent.
    implementation: one of IMPLEMENTATIONS, or None for the best of the platform that is compiled
      for. All agree. "pallas_tpu_interpret" runs the TPU kernel slowly anywhere, for tests.
    return_lse: also return the log-sum-exp of each query's logits.

  Returns:
    The output in q's shape and dtype, and with `return_lse` the float32 log-sum-exp [B, T, N]. A
    query that sees no key gets 0 and -inf.

  Raises:
    ValueError: shapes that do not belong together, or an unknown implementation.
  """
  check_call(q, k, v, kv_lengths, q_segments, kv_segments)
  attend = IMPLEMENTATIONS[implementation_of(implementation)]
  out, lse = attend(q, k, v, kv_lengths, q_segments, kv_segments, scale=scale)
  return (out, lse) if return_lse else out


def implementation_of(name: str | None) -> str:
  """The implementation of this name; of none, the best of the platform that is compiled for.

  Raises:
    ValueError: there is no such implementation.
  """
  name = name or BEST.get(target_platform(), "xla")
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"Unknown implementation {name!r} of cross_attention; choose from {sorted(IMPLEMENTATIONS)}."
    )
  return name


def check_call(
  q: Array,
  k: Array,
  v: Array,
  kv_lengths: Array | None,
  q_segments: Array | None,
  kv_segments: Array | None,
) -> None:
  """
  Raises:
    ValueError: shapes that do not belong together.
  """
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(
      "cross_attention takes q [B, T, N, H] and k, v [B, S, K, H], "
      f"got q {q.shape}, k {k.shape}, v {v.shape}."
    )
  if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
    raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head size.")
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f"query heads must be a multiple of kv heads, got {q.shape[2]} and {k.shape[2]}."
    )
  if (q_segments is None) != (kv_segments is None):
    raise ValueError("q_segments and kv_segments must be given together.")
  expected = {
    "kv_lengths": (kv_lengths, (q.shape[0],)),
    "q_segments": (q_segments, q.shape[:2]),
    "kv_segments": (kv_segments, k.shape[:2]),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")
