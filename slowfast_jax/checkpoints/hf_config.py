# SPDX-License-Identifier: Apache-2.0
"""config.json of released checkpoints and of plain language models, to our configs and back.

Semantics section 7. A value that this code does not compute as the released code does is an error,
never a guess.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import nnx

from slowfast_jax.checkpoints.export import Export, VideoConfig
from slowfast_jax.checkpoints.hf_tower import Shapes, tower_config, tower_json, tower_name
from slowfast_jax.checkpoints.json_fields import Fields, parse_json
from slowfast_jax.checkpoints.source import parameter_shapes
from slowfast_jax.checkpoints.tables import vision_slots
from slowfast_jax.data.chat import SYSTEM_PROMPT
from slowfast_jax.errors import UserError
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import GATES, HybridConfig
from slowfast_jax.models.projector import projector_depth
from slowfast_jax.models.rope import LlamaRopeScaling
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig
from slowfast_jax.models.vision import VisionConfig

OFFICIAL_TYPE = "llava_qwen_slow_fast"
CONFIG_FILE, TOWER_FILE = "config.json", "vision_tower_config.json"
GENERATION_FILE = "generation_config.json"
# What the released configs have no key for.
OWN_SECTION = "slowfast_jax"

GATING_TYPES = {f"whole-{gate}": gate for gate in GATES}
IMPLEMENTATIONS = {
  "text-only-vanilla": "text-only",
  "text-only-vanilla-masksystem": "text-only-masksystem",
  "vanilla": "all",
}
_FLASH = "-flashattn"  # Another way to compute the same.

# (biases on q, k and v; norms of their heads) of each kind of language model.
_FAMILIES = {"qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)}
LLM_TYPES = tuple(_FAMILIES)

# Frames of the released settings: (sampling stride, temporal stride) -> frames.
RELEASED_FRAMES = {(1, 4): 64, (1, 6): 96, (2, 4): 128}
DEFAULT_FRAMES = 64


def parse_official(files: Mapping[str, bytes], folder: epath.Path, shapes: Shapes) -> Export:
  """A released checkpoint without its parameters.

  Args:
    files: config.json and its companions, by name.
    folder: where they are, for errors.
    shapes: of the vision encoder's tensors, by the names that they have in a file of their own.

  Raises:
    UserError: a key is missing or has a value that is not supported; says which are.
  """
  fields = Fields(parse_json(files[CONFIG_FILE], folder / CONFIG_FILE), folder / CONFIG_FILE)
  fields.choice("model_type", [OFFICIAL_TYPE])
  described = None
  if TOWER_FILE in files:
    described = Fields(parse_json(files[TOWER_FILE], folder / TOWER_FILE), folder / TOWER_FILE)
  fields.only("mm_vision_select_feature", "patch", "class tokens are not passed on")
  tower = tower_config(
    fields.text("mm_vision_tower", "" if described is None else TOWER_FILE),
    described,
    _select_layer(fields),
    shapes,
    fields.file,
  )
  decoder = parse_decoder(fields, "qwen2")
  fields.only("mm_hidden_size", tower.width, "the width of the vision encoder")
  projector = fields.text("mm_projector_type", "linear")
  try:
    projector_depth(projector)
  except ValueError:
    raise fields.error("mm_projector_type", '"linear" or "mlp<n>x_gelu"') from None
  compressor = _compressor(fields)
  hybrid = _hybrid(fields, decoder.num_layers)
  own = fields.section(OWN_SECTION)
  return Export(
    model=SlowFastConfig(tower, decoder, compressor, hybrid, projector),
    params=nnx.State({}),
    tokenizer=None,
    video=_video(own.section("video"), tower, compressor),
    system=own.text("system", SYSTEM_PROMPT),
    max_length=(
      fields.integer("tokenizer_model_max_length")
      if "tokenizer_model_max_length" in fields
      else None
    ),
    stop_ids=stop_ids(files, folder),
  )


def parse_decoder(fields: Fields, family: str) -> DecoderConfig:
  """The language model of a config.json.

  Args:
    fields: the file.
    family: one of LLM_TYPES.
  """
  qkv_bias, qk_norm = _FAMILIES[family]
  fields.only("hidden_act", "silu", "the activation of all these models")
  fields.only("use_sliding_window", False, "every layer sees all earlier positions")
  fields.only("mlp_bias", False, "there are no biases in the MLP")
  if family != "qwen2":
    fields.only("attention_bias", False, "there are no biases on attention's output")
  for kind in fields.values.get("layer_types") or ():
    if kind != "full_attention":
      raise fields.error("layer_types", '"full_attention" in every layer')
  width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
  head_dim = 128 if family == "qwen3" else max(width // heads, 1)
  theta, scaling = _rope(fields)
  try:
    return DecoderConfig(
      vocab_size=fields.integer("vocab_size"),
      width=width,
      num_layers=fields.integer("num_hidden_layers"),
      num_heads=heads,
      num_kv_heads=fields.integer("num_key_value_heads", heads),
      head_dim=fields.integer("head_dim", head_dim),
      mlp_width=fields.integer("intermediate_size"),
      rope_theta=theta,
      rope_scaling=scaling,
      norm_eps=fields.number("rms_norm_eps", 1e-6),
      qkv_bias=fields.boolean("attention_bias", qkv_bias),
      qk_norm=fields.boolean("qk_norm", qk_norm),
      tie_embeddings=fields.boolean("tie_word_embeddings", False),
    )
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{fields.file}: {error}") from error


def _rope(fields: Fields) -> tuple[float, LlamaRopeScaling | None]:
  """Base and scaling; transformers 5 writes both into rope_parameters."""
  fields.only("partial_rotary_factor", 1.0, "all of a head is rotated")
  section = fields.section("rope_parameters")
  theta = section.number("rope_theta", fields.number("rope_theta", 10000.0))
  if "rope_scaling" in fields:
    section = fields.section("rope_scaling")
  kind = section.text("rope_type", section.text("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    key = "rope_type" if "rope_type" in section else "type"
    raise section.error(key, 'one of "default", "llama3"')
  try:
    return theta, LlamaRopeScaling(
      factor=section.number("factor"),
      low_freq_factor=section.number("low_freq_factor"),
      high_freq_factor=section.number("high_freq_factor"),
      original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{section.file}: {error}") from error


def _select_layer(fields: Fields) -> int:
  if "mm_vision_select_layer" not in fields:
    return -2
  value = fields.values["mm_vision_select_layer"]
  if type(value) is not int:
    raise fields.error("mm_vision_select_layer", "a whole number, -2 for the last block's input")
  return value


def _compressor(fields: Fields) -> CompressorConfig:
  return CompressorConfig(
    video_pooling_stride=fields.integer("mm_video_pooling_stride", 1),
    sampling_stride=fields.integer("fast_token_temporal_sampling_stride", 1),
    temporal_stride=fields.integer("fast_token_temporal_stride", 1),
    spatial_stride=fields.integer("fast_token_spatial_stride", 1),
    min_fast_frames=fields.integer("min_fast_frames", 1),
  )


def _hybrid(fields: Fields, num_layers: int) -> HybridConfig | None:
  """None where no key speaks of cross-attention: a model of fast tokens alone."""
  if not any(key.startswith("cross_attn_") and key in fields for key in fields.values):
    return None
  gate = fields.choice("cross_attn_gating_type", list(GATING_TYPES))
  implementation = fields.text("cross_attn_implementation")
  queries = IMPLEMENTATIONS.get(implementation.removesuffix(_FLASH))
  if queries is None:
    names = ", ".join(json.dumps(name) for name in IMPLEMENTATIONS)
    raise fields.error("cross_attn_implementation", f'one of {names}, each also with "{_FLASH}"')
  return HybridConfig(
    every=fields.integer("cross_attn_every_n_layers"),
    min_depth=fields.integer("cross_attn_min_layer_depth", 0, least=0),
    max_depth=fields.integer("cross_attn_max_layer_depth", num_layers),
    gate=GATING_TYPES[gate],
    queries=queries,
  )


def _video(fields: Fields, tower: VisionConfig, compressor: CompressorConfig) -> VideoConfig:
  """How the released evaluation takes frames, where the file has not our own section."""
  strides = compressor.sampling_stride, compressor.temporal_stride
  policy = "siglip" if tower.family == "siglip" else "clip"
  return VideoConfig(
    num_frames=fields.integer("num_frames", RELEASED_FRAMES.get(strides, DEFAULT_FRAMES)),
    sampler=fields.choice("sampler", ["fps", "uniform"], "fps"),
    target_fps=fields.number("target_fps", 2.0),
    policy=fields.choice("policy", ["siglip", "clip", "pad"], policy),
  )


def stop_ids(files: Mapping[str, bytes], folder: epath.Path) -> tuple[int, ...]:
  """eos_token_id, a number or several, of the first file that has it."""
  for name in (GENERATION_FILE, CONFIG_FILE):
    if name in files:
      fields = Fields(parse_json(files[name], folder / name), folder / name)
      if "eos_token_id" in fields:
        value = fields.values["eos_token_id"]
        ids = value if isinstance(value, list) else [value]
        if not all(type(index) is int for index in ids):
          raise fields.error("eos_token_id", "a token id, or a list of them")
        return tuple(ids)
  return ()


# --- And back ---


def official_files(export: Export, dtype: str) -> dict[str, bytes]:
  """config.json and its companions of a model, by name.

  Those of the folder that the model came from stay as they were, as far as they still say the same.

  Args:
    export: the model; its parameters are not looked at.
    dtype: of the parameters, for instance "bfloat16".
  """
  files = {} if export.hub is None else dict(export.hub.files)
  before: dict[str, Any] = {}
  if CONFIG_FILE in files:
    before = parse_json(files[CONFIG_FILE], epath.Path(CONFIG_FILE))
    if _says_the_same(files, export):
      key = "dtype" if "dtype" in before and "torch_dtype" not in before else "torch_dtype"
      if before.get(key, dtype) != dtype:
        files[CONFIG_FILE] = _dump({**before, key: dtype})
      return files
  for key in ("rope_scaling", "rope_parameters", "dtype"):
    before.pop(key, None)
  files[CONFIG_FILE] = _dump({**before, **official_json(export, dtype)})
  files[TOWER_FILE] = _dump(tower_json(export.model.vision))
  return files


def _says_the_same(files: Mapping[str, bytes], export: Export) -> bool:
  shapes = {
    slot.source: slot.shape
    for slot in vision_slots(export.model, parameter_shapes(export.model), "")
  }
  try:
    found = parse_official(files, epath.Path(), shapes)
  except UserError:
    return False
  fields = ("model", "video", "system", "max_length")
  return all(getattr(found, name) == getattr(export, name) for name in fields)


def official_json(export: Export, dtype: str) -> dict[str, Any]:
  """config.json of a model that never had one."""
  model = export.model
  config: dict[str, Any] = {
    "architectures": ["LlavaQwenSlowFastForCausalLM"],
    "model_type": OFFICIAL_TYPE,
    "torch_dtype": dtype,
    **_decoder_json(model.decoder),
    "mm_vision_tower": tower_name(model.vision),
    "mm_hidden_size": model.vision.width,
    "mm_vision_select_layer": getattr(model.vision, "select_layer", -1),
    "mm_vision_select_feature": "patch",
    "mm_projector_type": model.projector,
    "mm_video_pooling_stride": model.compressor.video_pooling_stride,
    "fast_token_temporal_sampling_stride": model.compressor.sampling_stride,
    "fast_token_temporal_stride": model.compressor.temporal_stride,
    "fast_token_spatial_stride": model.compressor.spatial_stride,
    "min_fast_frames": model.compressor.min_fast_frames,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": export.max_length,
    "tokenizer_padding_side": "right",
    OWN_SECTION: {"video": dataclasses.asdict(export.video), "system": export.system},
  }
  if export.stop_ids:
    config["eos_token_id"] = list(export.stop_ids)
  if model.hybrid is None:
    return config
  gates = {gate: name for name, gate in GATING_TYPES.items()}
  implementations = {queries: name for name, queries in IMPLEMENTATIONS.items()}
  return config | {
    "cross_attn_every_n_layers": model.hybrid.every,
    "cross_attn_min_layer_depth": model.hybrid.min_depth,
    "cross_attn_max_layer_depth": model.hybrid.max_depth,
    "cross_attn_gating_type": gates[model.hybrid.gate],
    "cross_attn_implementation": implementations[model.hybrid.queries],
  }


def _decoder_json(decoder: DecoderConfig) -> dict[str, Any]:
  scaling = decoder.rope_scaling
  config: dict[str, Any] = {
    "vocab_size": decoder.vocab_size,
    "hidden_size": decoder.width,
    "num_hidden_layers": decoder.num_layers,
    "num_attention_heads": decoder.num_heads,
    "num_key_value_heads": decoder.num_kv_heads,
    "head_dim": decoder.head_dim,
    "intermediate_size": decoder.mlp_width,
    "hidden_act": "silu",
    "rope_theta": decoder.rope_theta,
    "rope_scaling": (
      None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    ),
    "rms_norm_eps": decoder.norm_eps,
    "tie_word_embeddings": decoder.tie_embeddings,
    "use_sliding_window": False,
  }
  # What Qwen2 has no keys for is only said where it is not as in Qwen2.
  if (decoder.qkv_bias, decoder.qk_norm) != _FAMILIES["qwen2"]:
    config |= {"attention_bias": decoder.qkv_bias, "qk_norm": decoder.qk_norm}
  return config


def _dump(values: Mapping[str, Any]) -> bytes:
  return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
