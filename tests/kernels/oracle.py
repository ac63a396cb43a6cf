# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention in NumPy float64, forward and backward, and masks to try it with."""

import numpy as np


def visibility(B, T, S, kv_lengths=None, q_segments=None, kv_segments=None):
  """Which key each query sees, bool [B, T, S]."""
  visible = np.ones((B, T, S), bool)
  if kv_lengths is not None:
    visible &= np.arange(S) < kv_lengths[:, None, None]
  if q_segments is not None:
    visible &= q_segments[:, :, None] == kv_segments[:, None]
    visible &= q_segments[:, :, None] > 0
  return visible


def forward(q, k, v, masks=(), scale=None):
  """Output, log-sum-exp and probabilities [B, K, G, T, S] of q [B, T, N, H], k, v [B, S, K, H]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  scale = H**-0.5 if scale is None else scale
  visible = visibility(B, T, S, **dict(masks))[:, None, None]
  scores = np.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, N // K, H), k, optimize=True) * scale
  scores = np.where(visible, scores, -np.inf)
  peak = scores.max(axis=-1, keepdims=True)
  peak = np.where(np.isneginf(peak), 0, peak)
  p = np.exp(scores - peak)
  total = p.sum(axis=-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = (np.log(total) + peak)[..., 0]
  p /= np.where(total == 0, 1, total)
  out = np.einsum("BKGTS,BSKH->BTKGH", p, v, optimize=True)
  return out.reshape(q.shape), np.moveaxis(lse, 3, 1).reshape(B, T, N), p


def backward(q, k, v, do, dlse, masks=(), scale=None):
  """Gradients of sum(out * do) + sum(lse * dlse), rows without keys left out."""
  q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
  B, T, N, H = q.shape
  K = k.shape[2]
  scale = H**-0.5 if scale is None else scale
  out, _, p = forward(q, k, v, masks, scale)
  heads = (B, T, K, N // K)
  delta = np.moveaxis(((out * do).sum(-1) - dlse).reshape(heads), 1, 3)
  do = do.reshape(*heads, H)
  dp = np.einsum("BTKGH,BSKH->BKGTS", do, v, optimize=True)
  ds = p * (dp - delta[..., None]) * scale
  dq = np.einsum("BKGTS,BSKH->BTKGH", ds, k, optimize=True).reshape(q.shape)
  dk = np.einsum("BKGTS,BTKGH->BSKH", ds, q.reshape(*heads, H), optimize=True)
  return dq, dk, np.einsum("BKGTS,BTKGH->BSKH", p, do, optimize=True)


def packed(rng, B, length, samples):
  """Contiguous segments 1..samples of random sizes, some absent, padding at the end."""
  rows = []
  for _ in range(B):
    ends = np.sort(rng.integers(0, length + 1, samples))
    rows.append(np.searchsorted(ends, np.arange(length), side="right") + 1)
  segments = np.array(rows, np.int32).reshape(B, length)
  return np.where(segments > samples, 0, segments).astype(np.int32)


def draw_masks(rng, kind, B, T, S):
  """Masks as keyword arguments; kind: "all", "lengths", "segments", "both" or "scattered"."""
  masks = {}
  if kind in ("lengths", "both"):
    lengths = rng.integers(0, S + 1, B)
    lengths[0] = 0 if B > 1 else S // 2
    masks["kv_lengths"] = lengths.astype(np.int32)
  if kind in ("segments", "both"):
    masks["q_segments"] = packed(rng, B, T, 3)
    masks["kv_segments"] = packed(rng, B, S, 4)
  if kind == "scattered":
    masks["q_segments"] = rng.integers(0, 4, (B, T)).astype(np.int32)
    masks["kv_segments"] = rng.integers(0, 3, (B, S)).astype(np.int32)
  return masks


def draw(rng, B, T, S, K, G, H):
  """q, k, v, and gradients of output and log-sum-exp."""
  shapes = ((B, T, K * G, H), (B, S, K, H), (B, S, K, H), (B, T, K * G, H), (B, T, K * G))
  return tuple(rng.normal(size=shape) for shape in shapes)
