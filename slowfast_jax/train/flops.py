# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs by part, from sizes alone, and the peak of known chips: what MFU is made of.

A product of matrices [m, k] and [k, n] is 2 m k n FLOPs. Only such products and convolutions
count; norms, softmax and activations are a per cent or two of a real model. Attention counts all
pairs of positions, masked ones too, and a batch counts its padding: what the device computes, once,
whatever a remat policy computes again.
"""

from collections.abc import Collection

from slowfast_jax.models.convnext import (
  DOWNSAMPLE_STRIDE,
  KERNEL_SIZE,
  MLP_RATIO,
  STEM_STRIDE,
  ConvNeXtConfig,
)
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.lora import LoraConfig
from slowfast_jax.models.projector import projector_depth
from slowfast_jax.models.slowfast import SlowFastConfig
from slowfast_jax.models.vision import VisionConfig
from slowfast_jax.models.vit import ViTConfig

COLOURS = 3

# Part -> the part whose parameters it has, as `num_params_by_part` names them, or "lora".
PARTS = {
  "vision": "vision",
  "projector": "projector",
  "compressor": "",
  "decoder": "decoder",
  "lora": "lora",
  "cross_attention": "adapters",
  "vocabulary": "decoder",
}

# What the start of a device's kind tells: dense bfloat16 FLOPs a second, as its maker says.
_PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
  """FLOPs a second that a device (`jax.Device.device_kind`) can do at most; None: not known."""
  return next((peak for start, peak in _PEAKS.items() if device_kind.startswith(start)), None)


def model_flops(
  cfg: SlowFastConfig, *, num_frames: int, decoder_length: int, text_bound: int, fast_frames: int
) -> dict[str, float]:
  """FLOPs of one row, forward, by part.

  Args:
    cfg: the model.
    num_frames: F, frames of the row.
    decoder_length: T, decoder positions.
    text_bound: X, positions that query slow tokens.
    fast_frames: Q, frames that the compressor leaves.
  """
  pooling = cfg.compressor.video_pooling_stride if num_frames > 1 else 1
  tokens = (cfg.vision.side // pooling) ** 2
  D = cfg.decoder.width
  flops = {
    "vision": float(num_frames * _vision(cfg.vision)),
    "projector": float(num_frames * cfg.vision.tokens_per_frame * _projector(cfg)),
    "compressor": float(2 * fast_frames * num_frames * tokens * D),
    "decoder": float(_decoder(cfg.decoder, decoder_length)),
    "cross_attention": float(_cross_attention(cfg, num_frames * tokens, text_bound)),
    "vocabulary": float(2 * decoder_length * D * cfg.decoder.vocab_size),
  }
  if cfg.lora is not None:
    flops["lora"] = float(_lora(cfg.decoder, cfg.lora, decoder_length))
  return flops


def training_flops(forward: dict[str, float], learning: Collection[str]) -> dict[str, float]:
  """FLOPs of a training step, by part.

  A part costs its forward pass once more for the gradient of its parameters if they learn, and once
  more for the gradient of its inputs if it, or something before it, learns.

  Args:
    forward: what `model_flops` returns.
    learning: the parts of the model that learn, as `num_params_by_part` names them, and "lora".
  """
  flops, something_learns = {}, False
  for part, owner in PARTS.items():
    if part not in forward:
      continue
    if part == "decoder":  # Adapters, of either kind, feed the layers behind theirs.
      something_learns |= "adapters" in learning or "lora" in learning
    something_learns |= owner in learning
    flops[part] = forward[part] * (1 + (owner in learning or not owner) * something_learns)
    flops[part] += forward[part] * something_learns
  return flops


def _vision(cfg: VisionConfig) -> int:
  """Of one frame."""
  return _convnext(cfg) if isinstance(cfg, ConvNeXtConfig) else _vit(cfg)


def _vit(cfg: ViTConfig) -> int:
  E, patches = cfg.width, cfg.tokens_per_frame
  P = patches + (cfg.family == "clip")  # And the class token.
  block = 2 * P * (4 * E * E + 2 * E * cfg.mlp_width) + 4 * P * P * E
  return 2 * patches * cfg.patch_size**2 * COLOURS * E + cfg.num_blocks * block


def _convnext(cfg: ConvNeXtConfig) -> int:
  side, before, flops = cfg.image_size // STEM_STRIDE, COLOURS, 0
  for stage, (depth, width) in enumerate(zip(cfg.depths, cfg.widths)):
    stride = DOWNSAMPLE_STRIDE if stage else STEM_STRIDE
    side = side // DOWNSAMPLE_STRIDE if stage else side
    block = KERNEL_SIZE**2 * width + 2 * MLP_RATIO * width**2
    flops += 2 * side**2 * (stride**2 * before * width + depth * block)
    before = width
  return flops


def _projector(cfg: SlowFastConfig) -> int:
  """Of one token."""
  D = cfg.decoder.width
  return 2 * (cfg.vision.width * D + (projector_depth(cfg.projector) - 1) * D * D)


def _decoder(cfg: DecoderConfig, T: int) -> int:
  """Of all layers; embedding is a look-up."""
  D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
  weights = D * (N + 2 * K) * H + N * H * D + 3 * D * cfg.mlp_width
  return cfg.num_layers * (2 * T * weights + 4 * T * T * N * H)


def _lora(cfg: DecoderConfig, lora: LoraConfig, T: int) -> int:
  """Adapters of the decoder's projections, in all layers."""
  D, M, heads, kv_heads = (
    cfg.width, cfg.mlp_width, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
  )  # fmt: skip
  ends = {"q": D + heads, "out": D + heads} | dict.fromkeys(("k", "v"), D + kv_heads)
  sizes = [ends.get(name, D + M) for name in lora.modules]  # Inputs and outputs.
  return cfg.num_layers * 2 * T * lora.rank * sum(sizes)


def _cross_attention(cfg: SlowFastConfig, S: int, X: int) -> int:
  """Keys and values of the slow tokens, attention of the text to them, and its gate."""
  D, N, K, H = (getattr(cfg.decoder, n) for n in ("width", "num_heads", "num_kv_heads", "head_dim"))
  return len(cfg.hybrid_layers) * (2 * S * D * 2 * K * H + 4 * X * S * N * H + 2 * X * N * H)
