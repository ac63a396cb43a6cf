# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in the released layout, written by hand from its description.

Nothing of the package takes part: names and shapes are spelt out here a second time.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

D, N, K, H, M, V, L = 12, 4, 2, 4, 20, 40, 4
TOWER = "model.vision_tower.vision_tower."
DTYPES = {
  "float32": np.float32,
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
}

CONFIG = {
  "architectures": ["LlavaQwenSlowFastForCausalLM"],
  "model_type": "llava_qwen_slow_fast",
  "torch_dtype": "bfloat16",
  "hidden_size": D,
  "num_hidden_layers": L,
  "num_attention_heads": N,
  "num_key_value_heads": K,
  "head_dim": H,
  "intermediate_size": M,
  "vocab_size": V,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 1000000.0,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "eos_token_id": 7,
  "mm_projector_type": "mlp2x_gelu",
  "mm_video_pooling_stride": 2,
  "mm_vision_select_layer": -2,
  "fast_token_spatial_stride": 1,
  "fast_token_temporal_stride": 4,
  "fast_token_temporal_sampling_stride": 1,
  "min_fast_frames": 16,
  "cross_attn_every_n_layers": 3,
  "cross_attn_min_layer_depth": 0,
  "cross_attn_max_layer_depth": L,
  "cross_attn_gating_type": "whole-dynamic-tanh-warmup",
  "cross_attn_implementation": "text-only-vanilla-flashattn",
  "image_aspect_ratio": "pad",
  "tokenizer_model_max_length": 4096,
  "tokenizer_padding_side": "right",
  "a_key_of_theirs": [1, 2],
}

TOWERS: dict[str, dict[str, Any]] = {
  "convnext": {
    "config": {"mm_vision_tower": "convnext-64", "mm_hidden_size": 24},
    "file": None,
  },
  "siglip": {
    "config": {"mm_vision_tower": "somewhere/siglip-tiny", "mm_hidden_size": 16},
    "file": {
      "model_type": "siglip_vision_model",
      "hidden_size": 16,
      "intermediate_size": 24,
      "num_hidden_layers": 3,
      "num_attention_heads": 2,
      "image_size": 28,
      "patch_size": 7,
    },
  },
  "clip": {
    "config": {"mm_vision_tower": "somewhere/clip-tiny", "mm_hidden_size": 16},
    "file": {
      "model_type": "clip_vision_model",
      "hidden_size": 16,
      "intermediate_size": 24,
      "num_hidden_layers": 3,
      "num_attention_heads": 2,
      "image_size": 28,
      "patch_size": 7,
    },
  },
}


@dataclasses.dataclass
class Official:
  """A checkpoint that is not written yet; a test changes it first."""

  config: dict[str, Any]
  tower: dict[str, Any] | None
  tensors: dict[str, np.ndarray]

  def write(self, folder: Path, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(self.config, indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (folder / "preprocessor_config.json").write_text('{"crop_size": 64}')
    if self.tower is not None:
      (folder / "vision_tower_config.json").write_text(json.dumps(self.tower))
    names = list(self.tensors)
    if shards == 1:
      save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
      return folder
    weight_map = {}
    for i in range(shards):
      file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
      part = {name: self.tensors[name] for name in names[i::shards]}
      save_file(part, folder / file, {"format": "pt"})
      weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def official(tower: str = "convnext", dtype: str = "float32", **config: Any) -> Official:
  """A checkpoint of random numbers; `config` changes keys of config.json."""
  values = {**CONFIG, **TOWERS[tower]["config"], "torch_dtype": dtype, **config}
  return Official(values, TOWERS[tower]["file"], random_tensors(shapes(values, tower), dtype))


def random_tensors(described: dict[str, tuple[int, ...]], dtype: str = "float32"):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(0, 0.3, shape).astype(DTYPES[dtype]) for name, shape in described.items()
  }


def shapes(config: dict[str, Any], tower: str) -> dict[str, tuple[int, ...]]:
  """Every tensor of the released layout, with those that are not run."""
  projector = config["mm_projector_type"], config["mm_hidden_size"], config["hidden_size"]
  return (
    decoder_shapes(config)
    | hybrid_shapes(config)
    | projector_shapes(*projector)
    | {TOWER + name: shape for name, shape in tower_shapes(tower).items()}
  )


def decoder_shapes(config: dict[str, Any], bias: bool = True, norms: bool = False):
  width, mlp, words = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
  head = config["head_dim"]
  heads, kv_heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
  found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
  for i in range(config["num_hidden_layers"]):
    p = f"model.layers.{i}."
    for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
      found[f"{p}self_attn.{name}_proj.weight"] = (rows, width)
      if bias:
        found[f"{p}self_attn.{name}_proj.bias"] = (rows,)
    found[f"{p}self_attn.o_proj.weight"] = (width, heads)
    if norms:
      found |= {f"{p}self_attn.{name}_norm.weight": (head,) for name in "qk"}
    found |= {f"{p}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
    found[f"{p}mlp.down_proj.weight"] = (width, mlp)
    found |= {f"{p}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
  found["model.norm.weight"] = (width,)
  if not config["tie_word_embeddings"]:
    found["lm_head.weight"] = (words, width)
  return found


def hybrid_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  if config.get("cross_attn_every_n_layers") is None:
    return {}
  width, head, layers = (config[key] for key in ("hidden_size", "head_dim", "num_hidden_layers"))
  slow = 2 * config["num_key_value_heads"] * head
  first, last = config["cross_attn_min_layer_depth"], config["cross_attn_max_layer_depth"]
  found: dict[str, tuple[int, ...]] = {}
  for i in range(first, min(last, layers), config["cross_attn_every_n_layers"]):
    p = f"model.layers.{i}.self_attn.cross_attn_"
    found[f"{p}kv_proj.weight"] = (slow, width)
    found[f"{p}kv_proj.bias"] = (slow,)
    found[f"{p}gate_proj.0.weight"] = (1, config["num_attention_heads"] * head)
    found[f"{p}gate_proj.0.bias"] = (1,)
    if config["cross_attn_gating_type"].endswith("-warmup"):
      found[f"{p}warm_up_gate"] = (1,)
  return found


def projector_shapes(kind: str, source: int, target: int) -> dict[str, tuple[int, ...]]:
  if kind == "linear":
    return {"model.mm_projector.weight": (target, source), "model.mm_projector.bias": (target,)}
  found: dict[str, tuple[int, ...]] = {}
  for i in range(int(kind[3])):
    found[f"model.mm_projector.{2 * i}.weight"] = (target, source if i == 0 else target)
    found[f"model.mm_projector.{2 * i}.bias"] = (target,)
  return found


def tower_shapes(tower: str) -> dict[str, tuple[int, ...]]:
  return convnext_shapes() if tower == "convnext" else vit_shapes(tower)


def convnext_shapes(
  depths=(1, 2, 2, 1), widths=(4, 8, 12, 24), scale="weight", head=True
) -> dict[str, tuple[int, ...]]:
  first = widths[0]
  found: dict[str, tuple[int, ...]] = {"stem.0.weight": (first, 3, 4, 4)}
  found |= {f"{name}": (first,) for name in ("stem.0.bias", "stem.1.weight", "stem.1.bias")}
  for s, (depth, w) in enumerate(zip(depths, widths)):
    if s:
      before, p = widths[s - 1], f"stages.{s}.downsample."
      found |= {f"{p}0.weight": (before,), f"{p}0.bias": (before,)}
      found |= {f"{p}1.weight": (w, before, 2, 2), f"{p}1.bias": (w,)}
    for b in range(depth):
      p = f"stages.{s}.blocks.{b}."
      found |= {f"{p}conv_dw.weight": (w, 1, 7, 7), f"{p}conv_dw.bias": (w,)}
      found |= {f"{p}norm.weight": (w,), f"{p}norm.bias": (w,)}
      found |= {f"{p}mlp.fc1.weight": (4 * w, w), f"{p}mlp.fc1.bias": (4 * w,)}
      found |= {f"{p}mlp.fc2.weight": (w, 4 * w), f"{p}mlp.fc2.bias": (w,)}
      found[p + scale] = (w,)
  if head:
    w = widths[-1]
    found |= {"head.norm.weight": (w,), "head.norm.bias": (w,)}
    found |= {"head.fc.weight": (10, w), "head.fc.bias": (10,)}
  return found


def vit_shapes(family: str) -> dict[str, tuple[int, ...]]:
  width, mlp, layers, patch, side = 16, 24, 3, 7, 4
  p = "vision_model.embeddings."
  found: dict[str, tuple[int, ...]] = {f"{p}patch_embedding.weight": (width, 3, patch, patch)}
  if family == "siglip":
    found[f"{p}patch_embedding.bias"] = (width,)
  else:
    found[f"{p}class_embedding"] = (width,)
    found |= {f"vision_model.pre_layrnorm.{kind}": (width,) for kind in ("weight", "bias")}
  found[f"{p}position_embedding.weight"] = (side * side + (family == "clip"), width)
  for i in range(layers):
    p = f"vision_model.encoder.layers.{i}."
    for name in ("layer_norm1", "layer_norm2"):
      found |= {f"{p}{name}.{kind}": (width,) for kind in ("weight", "bias")}
    for name in "qkv":
      found |= {f"{p}self_attn.{name}_proj.weight": (width, width)}
      found |= {f"{p}self_attn.{name}_proj.bias": (width,)}
    found |= {f"{p}self_attn.out_proj.weight": (width, width)}
    found |= {f"{p}self_attn.out_proj.bias": (width,)}
    found |= {f"{p}mlp.fc1.weight": (mlp, width), f"{p}mlp.fc1.bias": (mlp,)}
    found |= {f"{p}mlp.fc2.weight": (width, mlp), f"{p}mlp.fc2.bias": (width,)}
  found |= {f"vision_model.post_layernorm.{kind}": (width,) for kind in ("weight", "bias")}
  if family == "siglip":
    found |= {"vision_model.head.probe": (1, 1, width), "vision_model.head.mlp.fc1.bias": (mlp,)}
  return found
