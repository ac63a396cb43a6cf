# SPDX-License-Identifier: Apache-2.0
"""What a model is, in lines to read: parts, sizes, numbers of parameters and of tokens.

Nothing large is read: shapes follow from the config, dtypes stand where the tensors are listed.
"""

import os
import pathlib
from collections import Counter
from collections.abc import Iterable

from slowfast_jax.checkpoints.export import VideoConfig
from slowfast_jax.checkpoints.open import open_checkpoint
from slowfast_jax.checkpoints.source import Source
from slowfast_jax.checkpoints.store import CONFIG_FILE
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.presets import DECODERS, TOWERS, match_preset
from slowfast_jax.models.slowfast import SlowFastConfig, num_params_by_part
from slowfast_jax.models.vision import VisionConfig

# (what, its value)
Fact = tuple[str, str]


def describe_checkpoint(folder: str | os.PathLike) -> str:
  """What is in the folder of a checkpoint, or in that of a run that has one, as text.

  Raises:
    UserError: it holds no model, or a part of it is missing or damaged.
  """
  source, place = open_checkpoint(folder), pathlib.Path(folder)
  if not (place / CONFIG_FILE).exists():
    place = place / "export"  # The run's own states are not the model.
  return f"{place}\n{format_facts(source_facts(source, place))}"


def source_facts(source: Source, folder: pathlib.Path) -> list[Fact]:
  """The facts of a checkpoint whose parameters are not read."""
  export = source.export
  sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
  length = "no limit" if export.max_length is None else f"{export.max_length:,} positions"
  return [
    *model_facts(export.model),
    ("stored as", _dtypes(source)),
    ("size", f"{_bytes(source.num_bytes)} of parameters, {_bytes(sum(sizes))} on disk"),
    *video_facts(export.model, export.video),
    ("length", length),
    ("tokenizer", _tokenizer(export.tokenizer)),
    ("system prompt", repr(export.system)),
  ]


def model_facts(cfg: SlowFastConfig) -> list[Fact]:
  """Preset, parts and numbers of parameters."""
  decoder, compressor = cfg.decoder, cfg.compressor
  parts = ", ".join(f"{name} {_count(n)}" for name, n in num_params_by_part(cfg).items() if n)
  variants = {
    "biases on q, k, v": decoder.qkv_bias,
    "norms on q, k": decoder.qk_norm,
    "tied embeddings": decoder.tie_embeddings,
  }
  return [
    ("preset", match_preset(cfg) or _presets_of_parts(cfg)),
    ("parameters", f"{cfg.num_params:,}: {parts}"),
    ("vision", _vision(cfg.vision)),
    ("projector", f"{cfg.projector}, {cfg.vision.width} to {decoder.width}"),
    (
      "compressor",
      f"videos' tokens pooled by {compressor.video_pooling_stride}; then strides "
      f"{compressor.sampling_stride} sampling, {compressor.temporal_stride} temporal, "
      f"{compressor.spatial_stride} spatial; at least {compressor.min_fast_frames} fast frames",
    ),
    (
      "decoder",
      f"{decoder.num_layers} layers of width {decoder.width}, {decoder.num_heads} heads of "
      f"{decoder.head_dim} over {decoder.num_kv_heads}, MLP {decoder.mlp_width}, vocabulary "
      f"{decoder.vocab_size}",
    ),
    ("", ", ".join([*(name for name, has in variants.items() if has), _rope(cfg)])),
    ("hybrid layers", _hybrid(cfg)),
  ]


def video_facts(cfg: SlowFastConfig, video: VideoConfig) -> list[Fact]:
  """How a video is taken, and the tokens that it becomes."""
  rate = f" at {video.target_fps:g} a second" if video.sampler == "fps" else ""
  return [
    ("video", f"{video.num_frames} frames ({video.sampler}{rate}), made square as {video.policy}"),
    ("", f"{tokens_of(cfg, video.num_frames)}; a still image: {tokens_of(cfg, 1)}"),
  ]


def tokens_of(cfg: SlowFastConfig, num_frames: int) -> str:
  """Slow and fast tokens of a video."""
  c = cfg.compressor
  side = cfg.vision.side // (c.video_pooling_stride if num_frames > 1 else 1)
  strides = (c.sampling_stride, c.temporal_stride, c.min_fast_frames)
  fast = len(pooling_matrix(num_frames, *strides)) * (side // c.spatial_stride) ** 2
  return f"{num_frames * side**2:,} slow and {fast:,} fast tokens"


def format_facts(facts: Iterable[Fact]) -> str:
  """A line for each fact, their values below one another."""
  return "\n".join(f"{name:<15}{value}" for name, value in facts)


def _presets_of_parts(cfg: SlowFastConfig) -> str:
  """A model of known parts, as most are that are no known whole."""
  decoders = [name for name, preset in DECODERS.items() if preset == cfg.decoder]
  towers = [name for name, preset in TOWERS.items() if preset == cfg.vision]
  parts = {"decoder": decoders, "vision": towers}
  known = [f"{part} {' or '.join(names)}" for part, names in parts.items() if names]
  return f"none as a whole; {', '.join(known)}" if known else "none"


def _vision(cfg: VisionConfig) -> str:
  grid = f"{cfg.image_size} pixels to {cfg.side} x {cfg.side} tokens of {cfg.width}"
  if isinstance(cfg, ConvNeXtConfig):
    return f"ConvNeXt, {grid}; blocks {_list(cfg.depths)} of widths {_list(cfg.widths)}"
  name = {"siglip": "SigLIP", "clip": "CLIP"}[cfg.family]
  return (
    f"{name} ViT, {grid}; {cfg.num_layers} layers with {cfg.num_heads} heads, of which "
    f"{cfg.num_blocks} run, patches of {cfg.patch_size}"
  )


def _rope(cfg: SlowFastConfig) -> str:
  scaling = cfg.decoder.rope_scaling
  stretched = "" if scaling is None else f", stretched {scaling.factor:g} times"
  return f"rotary base {cfg.decoder.rope_theta:g}{stretched}"


def _hybrid(cfg: SlowFastConfig) -> str:
  if cfg.hybrid is None or not cfg.hybrid_layers:
    return "none: it sees fast tokens alone"
  return f"{_list(cfg.hybrid_layers)}; gate {cfg.hybrid.gate}; queries {cfg.hybrid.queries}"


def _dtypes(source: Source) -> str:
  """The dtypes, the most frequent first, with the number of parameters that have them."""
  found = Counter(" and ".join(sorted({d.name for d in each})) for each in source.dtypes.values())
  if len(found) == 1:
    return next(iter(found))
  return ", ".join(f"{name} ({count} arrays)" for name, count in found.most_common())


def _tokenizer(tokenizer: Tokenizer | None) -> str:
  return (
    "none: it takes token ids" if tokenizer is None else f"{tokenizer.vocab_size:,} ids, ChatML"
  )


def _list(numbers: Iterable[int]) -> str:
  return ", ".join(map(str, numbers))


def _count(number: int) -> str:
  """Parameters as people name them: 7.6B, 86.4M."""
  for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= unit:
      return f"{number / unit:.3g}{name}"
  return str(number)


def _bytes(number: int) -> str:
  for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if number >= unit:
      return f"{number / unit:.3g} {name}"
  return f"{number} bytes"
