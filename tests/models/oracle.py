# SPDX-License-Identifier: Apache-2.0
"""The model's equations in plain NumPy float64: one sample, one layer, one head at a time.

Written from the equations of the paper's released models and from nothing else; slow and obvious.
`w` holds the weights by their dotted names, float64.
"""

import math
from fractions import Fraction

import numpy as np

PLACEHOLDER = -200


def logits(w, cfg, ids, videos, length, tokens_too=False):
  """Scores [L, V] of one sample.

  Args:
    w: all weights.
    cfg: a `SlowFastConfig`.
    ids: token ids, -200 where a video goes.
    videos: slow tokens [F, P, D] of each video or image.
    length: longer sequences are cut on the right.
    tokens_too: also return the last hidden states.
  """
  table, compressor = w["decoder.embed.embedding"], cfg.compressor
  strides = (compressor.sampling_stride, compressor.temporal_stride, compressor.spatial_stride)
  rest = list(videos)
  x, visual = [], []
  for token in ids:
    fast = token == PLACEHOLDER
    new = fast_tokens(rest.pop(0), *strides, compressor.min_fast_frames) if fast else [table[token]]
    x += list(new)
    visual += [fast] * len(new)
  x, visual = np.array(x[:length]), visual[:length]
  slow = [token for video in videos for frame in video for token in frame]
  for depth in range(cfg.decoder.num_layers):
    x = layer(w, cfg, depth, x, visual, slow)
  x = rms(x, w["decoder.norm.scale"], cfg.decoder.norm_eps)
  head = table.T if cfg.decoder.tie_embeddings else w["decoder.head.kernel"]
  return (x @ head, x) if tokens_too else x @ head


# --- Slow to fast ---


def fast_tokens(slow, a, b, c, m):
  """The compressor: sampling stride a, temporal stride b, spatial stride c, at least m frames."""
  frames = list(slow)
  F = len(frames)
  if F > 1 and a > 1 and m <= F:
    k = max(F // a, m)
    frames = [frames[min(int(i * (F / k)), F - 1)] for i in range(k)]
  if F > 1 and b > 1:
    k = len(frames)
    if k // b >= m:
      frames = [np.mean(frames[i * b : (i + 1) * b], axis=0) for i in range(k // b)]
    else:
      o = min(k, m)
      edges = [
        (math.floor(Fraction(i * k, o)), math.ceil(Fraction((i + 1) * k, o))) for i in range(o)
      ]
      frames = [np.mean(frames[start:stop], axis=0) for start, stop in edges]
  return np.concatenate([pool(frame, c) for frame in frames])


def pool(tokens, c):
  """c x c averages of one frame's square grid of tokens."""
  side = math.isqrt(len(tokens))
  grid = tokens.reshape(side, side, -1)
  return np.array(
    [
      np.mean([grid[c * y + i, c * x + j] for i in range(c) for j in range(c)], axis=0)
      for y in range(side // c)
      for x in range(side // c)
    ]
  )


# --- The decoder ---


def layer(w, cfg, depth, x, visual, slow):
  """One layer on x [T, D]; `visual` marks fast positions, `slow` is the sample's slow tokens."""
  dec, T = cfg.decoder, len(x)
  N, K, H = dec.num_heads, dec.num_kv_heads, dec.head_dim

  def part(name):
    return w.get(f"decoder.layers.{name}", [None] * dec.num_layers)[depth]

  y = rms(x, part("input_norm.scale"), dec.norm_eps)
  q, k, v = (
    heads(y, part(f"attention.{name}.kernel"), part(f"attention.{name}.bias")) for name in "qkv"
  )
  if dec.qk_norm:
    q = rms(q, part("attention.q_norm.scale"), dec.norm_eps)
    k = rms(k, part("attention.k_norm.scale"), dec.norm_eps)
  angles = frequencies(dec)
  q, k = rope(q, angles), rope(k, angles)

  o = np.zeros((T, N, H))
  for t in range(T):
    for n in range(N):
      j = n // (N // K)
      o[t, n] = softmax(k[: t + 1, j] @ q[t, n] / math.sqrt(H)) @ v[: t + 1, j]

  if depth in hybrid_depths(cfg) and any(visual):
    o = read_slow(w, cfg, hybrid_depths(cfg).index(depth), part, q, o, visual, slow)
  x = x + np.einsum("TNH,NHD->TD", o, part("attention.out.kernel"))
  y = rms(x, part("post_norm.scale"), dec.norm_eps)
  gated = silu(y @ part("mlp.gate.kernel")) * (y @ part("mlp.up.kernel"))
  return x + gated @ part("mlp.down.kernel")


def hybrid_depths(cfg):
  if cfg.hybrid is None:
    return []
  depths, depth = [], cfg.hybrid.min_depth
  while depth < min(cfg.hybrid.max_depth, cfg.decoder.num_layers):
    depths.append(depth)
    depth += cfg.hybrid.every
  return depths


def read_slow(w, cfg, number, part, q, o, visual, slow):
  """o + g * c at the querying positions."""
  dec, result = cfg.decoder, o.copy()
  N, K, H = dec.num_heads, dec.num_kv_heads, dec.head_dim
  u = rms(np.array(slow), part("input_norm.scale"), dec.norm_eps)
  # Head-major: (K, 2, H).
  packed = u @ w["adapters.kv.kernel"][number].reshape(dec.width, K * 2 * H)
  if dec.qkv_bias:
    packed = packed + w["adapters.kv.bias"][number].reshape(K * 2 * H)
  ks = [packed[:, (2 * j) * H : (2 * j + 1) * H] for j in range(K)]
  vs = [packed[:, (2 * j + 1) * H : (2 * j + 2) * H] for j in range(K)]
  alpha = w["adapters.warm_up"][number][0] if "warmup" in cfg.hybrid.gate else None
  if alpha is not None and cfg.hybrid.queries != "all":
    alpha = np.tanh(alpha)
  for t in querying(cfg.hybrid.queries, visual):
    g = o[t].reshape(N * H) @ w["adapters.gate.kernel"][number].reshape(N * H, 1)
    g = g[0] + w["adapters.gate.bias"][number][0]
    if "tanh" in cfg.hybrid.gate:
      g = np.tanh(g)
    if alpha is not None:
      g = g * alpha
    for n in range(N):
      j = n // (N // K)
      result[t, n] = o[t, n] + g * softmax(ks[j] @ q[t, n] / math.sqrt(H)) @ vs[j]
  return result


def querying(queries, visual):
  """Positions that read slow tokens, of a sample that has some."""
  return {
    "text-only": [t for t, fast in enumerate(visual) if not fast],
    "text-only-masksystem": [
      t for t, fast in enumerate(visual) if not fast and t >= visual.index(True)
    ],
    "all": list(range(len(visual))),
  }[queries]


# --- The parts ---


def rms(x, weight, eps):
  return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def heads(y, kernel, bias):
  out = np.einsum("TD,DNH->TNH", y, kernel)
  return out if bias is None else out + bias


def frequencies(dec):
  """Radians per position of each pair of dimensions, as Llama 3.1 writes it: by wavelength."""
  found = []
  for i in range(dec.head_dim // 2):
    f, s = dec.rope_theta ** (-2 * i / dec.head_dim), dec.rope_scaling
    if s is not None:
      wavelength, old = 2 * math.pi / f, s.original_max_position_embeddings
      if wavelength > old / s.low_freq_factor:
        f = f / s.factor
      elif wavelength >= old / s.high_freq_factor:
        smooth = (old / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        f = (1 - smooth) * f / s.factor + smooth * f
    found.append(f)
  return np.array(found)


def rope(x, angles):
  """Pairs (i, i + H/2) as complex numbers, turned by position times angle."""
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  z = z * np.exp(1j * np.arange(len(x))[:, None, None] * angles)
  return np.concatenate([z.real, z.imag], axis=-1)


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / np.sum(e)


def silu(x):
  return x / (1 + np.exp(-x))


# --- Frames to slow tokens ---


def slow_tokens(w, cfg, frames):
  """Slow tokens [F, P, D] of uint8 frames [F, h, w, 3] of one video or image."""
  clip = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
  mean, std = ([0.5] * 3, [0.5] * 3) if cfg.vision.family == "siglip" else clip
  pixels = (frames / 255 - np.array(mean)) / np.array(std)
  slow = [projector(w, cfg.projector, encoded(w, cfg.vision, x)) for x in pixels]
  p = cfg.compressor.video_pooling_stride
  return np.array([pool(tokens, p) for tokens in slow] if len(frames) > 1 else slow)


def encoded(w, cfg, pixels):
  """The encoder's tokens [P, E] of one frame."""
  if cfg.family == "convnext":
    return convnext(w, cfg, pixels)
  return drop_class(cfg, hidden_states(w, cfg, pixels)[cfg.select_layer])


def drop_class(cfg, tokens):
  return tokens[1:] if cfg.family == "clip" else tokens


def hidden_states(w, cfg, pixels, prefix="vision."):
  """The input of the first block and the output of each block that has weights, for one frame.

  Where blocks are missing, None stands for their outputs.
  """

  def part(name, index=...):
    return w[prefix + name][index]

  p = cfg.patch_size
  side = cfg.image_size // p
  x = []
  for i in range(side):
    for j in range(side):
      square = pixels[i * p : (i + 1) * p, j * p : (j + 1) * p]
      x.append(np.einsum("hwc,hwce->e", square, part("patch.kernel")))
      if cfg.family == "siglip":
        x[-1] = x[-1] + part("patch.bias")
  if cfg.family == "clip":
    x.insert(0, part("class_token"))
  x = np.array(x) + part("position")
  if cfg.family == "clip":
    x = layer_norm(x, part("pre_norm.scale"), part("pre_norm.bias"), cfg.norm_eps)
  states = [x]
  for block in range(len(part("blocks.fc1.bias"))):
    x = vit_block(lambda name, b=block: part(f"blocks.{name}", b), cfg, x)
    states.append(x)
  return states + [None] * (cfg.num_layers + 1 - len(states))


def vit_block(part, cfg, x):
  y = layer_norm(x, part("norm1.scale"), part("norm1.bias"), cfg.norm_eps)
  q, k, v = (heads(y, part(f"{name}.kernel"), part(f"{name}.bias")) for name in "qkv")
  o, size = np.zeros_like(q), cfg.width // cfg.num_heads
  for t in range(len(x)):
    for n in range(cfg.num_heads):
      o[t, n] = softmax(k[:, n] @ q[t, n] / math.sqrt(size)) @ v[:, n]
  x = x + np.einsum("PNH,NHE->PE", o, part("out.kernel")) + part("out.bias")
  y = layer_norm(x, part("norm2.scale"), part("norm2.bias"), cfg.norm_eps)
  y = y @ part("fc1.kernel") + part("fc1.bias")
  y = gelu_tanh(y) if cfg.family == "siglip" else y / (1 + np.exp(-1.702 * y))
  return x + y @ part("fc2.kernel") + part("fc2.bias")


def convnext(w, cfg, pixels, prefix="vision."):
  """Tokens [P, E] of one normalised frame [h, w, 3]: the last stage's grid, row by row."""

  def part(name, index=...):
    return w[prefix + name][index]

  def norm(name, x):
    return layer_norm(x, part(f"{name}.scale"), part(f"{name}.bias"), cfg.norm_eps)

  x = strided(pixels, part("stem.conv.kernel"), part("stem.conv.bias"))
  x = norm("stem.norm", x)
  for s, depth in enumerate(cfg.depths):
    stage = f"stages.{s}"
    if s > 0:
      x = norm(f"{stage}.downsample_norm", x)
      x = strided(x, part(f"{stage}.downsample.kernel"), part(f"{stage}.downsample.bias"))
    for b in range(depth):
      x = convnext_block(lambda name, s=stage, b=b: part(f"{s}.blocks.{name}", b), cfg, x)
  return x.reshape(-1, cfg.widths[-1])


def convnext_block(part, cfg, x):
  y = depthwise(x, part("depthwise.kernel")) + part("depthwise.bias")
  y = layer_norm(y, part("norm.scale"), part("norm.bias"), cfg.norm_eps)
  y = gelu(y @ part("fc1.kernel") + part("fc1.bias")) @ part("fc2.kernel") + part("fc2.bias")
  return x + part("layer_scale") * y


def strided(x, kernel, bias):
  """A convolution whose stride is its kernel's size; what fills no kernel is left out."""
  p = len(kernel)
  return np.array(
    [
      [
        np.einsum("hwc,hwce->e", x[i : i + p, j : j + p], kernel) + bias
        for j in range(0, x.shape[1] - p + 1, p)
      ]
      for i in range(0, x.shape[0] - p + 1, p)
    ]
  )


def depthwise(x, kernel):
  """out[i, j] = sum of kernel[a, b] * x[i + a - 3, j + b - 3], for each channel; outside is 0."""
  out = np.zeros_like(x)
  for i, j, a, b in np.ndindex(*x.shape[:2], *kernel.shape[:2]):
    y, z = i + a - len(kernel) // 2, j + b - len(kernel) // 2
    if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
      out[i, j] += kernel[a, b] * x[y, z]
  return out


def projector(w, kind, x, prefix="projector."):
  depth = 1 if kind == "linear" else int(kind[3 : -len("x_gelu")])
  for i in range(depth):
    x = gelu(x) if i else x
    x = x @ w[f"{prefix}layers.{i}.kernel"] + w[f"{prefix}layers.{i}.bias"]
  return x


def layer_norm(x, weight, bias, eps):
  centred = x - np.mean(x, axis=-1, keepdims=True)
  return weight * centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) + bias


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x):
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
