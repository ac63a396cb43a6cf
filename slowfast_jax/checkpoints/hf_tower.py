# SPDX-License-Identifier: Apache-2.0
"""The sizes of a vision encoder: from its config, or the preset of its name, or its tensors.

Configs are those of transformers (SigLIP, CLIP), of timm and of open_clip (ConvNeXt).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from slowfast_jax.checkpoints.json_fields import Fields
from slowfast_jax.errors import UserError
from slowfast_jax.models import presets
from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.vision import VisionConfig
from slowfast_jax.models.vit import ViTConfig

Shapes = Mapping[str, tuple[int, ...]]

# What transformers leaves out of a config where it is the default.
_DEFAULTS: dict[Literal["siglip", "clip"], dict[str, Any]] = {
  "siglip": {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
  "clip": {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
}
# Head counts cannot be seen from shapes. Published encoders have heads of 64, but for these widths.
_HEADS = {1152: 16, 1536: 16}
# timm's and open_clip's names of a ConvNeXt, and the epsilon of its norms there.
_XXLARGE = re.compile(r"convnext_xxlarge.*")


def tower_config(
  name: str, described: Fields | None, select_layer: int, shapes: Shapes, file: object
) -> VisionConfig:
  """The config of an encoder.

  Args:
    name: as `mm_vision_tower` has it, or that of a folder.
    described: its own config.
    select_layer: which hidden state of a transformer is the output.
    shapes: of its tensors, by their names without what stands before all of them.
    file: where the name stands, for errors.

  Raises:
    UserError: an encoder of another kind, or a size that nothing tells.
  """
  try:
    if described is not None:
      tower = _described(described, shapes, name)
    else:
      known = presets.TOWERS.get(name.rstrip("/").split("/")[-1].lower())
      tower = _measured(name, shapes, file) if known is None else known
    if isinstance(tower, ViTConfig):
      tower = dataclasses.replace(tower, select_layer=select_layer)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{file if described is None else described.file}: {error}") from error
  return tower


def tower_json(tower: VisionConfig) -> dict[str, Any]:
  """vision_tower_config.json of an encoder."""
  if isinstance(tower, ConvNeXtConfig):
    return {
      "model_type": "convnext",
      "image_size": tower.image_size,
      "depths": tower.depths,
      "dims": tower.widths,
      "norm_eps": tower.norm_eps,
    }
  return {
    "model_type": f"{tower.family}_vision_model",
    "hidden_size": tower.width,
    "intermediate_size": tower.mlp_width,
    "num_hidden_layers": tower.num_layers,
    "num_attention_heads": tower.num_heads,
    "num_channels": 3,
    "image_size": tower.image_size,
    "patch_size": tower.patch_size,
    "layer_norm_eps": tower.norm_eps,
    "hidden_act": _DEFAULTS[tower.family]["hidden_act"],
  }


def tower_name(tower: VisionConfig) -> str:
  """`mm_vision_tower` of an encoder: the preset's name, if it is one."""

  def same(known: VisionConfig) -> bool:
    if isinstance(known, ViTConfig) and isinstance(tower, ViTConfig):
      known = dataclasses.replace(known, select_layer=tower.select_layer)
    return known == tower

  names = [name for name, known in presets.TOWERS.items() if same(known)]
  return names[0] if names else f"{tower.family}-{tower.image_size}"


def family_of(shapes: Shapes) -> str | None:
  """The kind of encoder that has these tensors."""
  if "stem.0.weight" in shapes:
    return "convnext"
  if "vision_model.embeddings.class_embedding" in shapes:
    return "clip"
  return "siglip" if "vision_model.embeddings.patch_embedding.weight" in shapes else None


def _described(fields: Fields, shapes: Shapes, name: str) -> VisionConfig:
  kind = fields.text("model_type", "") or fields.text("architecture", "")
  if "model_cfg" in fields:  # open_clip
    fields = fields.section("model_cfg")
  if "vision_cfg" in fields:
    fields = fields.section("vision_cfg")
    kind = fields.text("timm_model_name", "")
  if "vision_config" in fields:
    fields = fields.section("vision_config")
    kind = fields.text("model_type", kind)
  if kind.startswith("convnext") or "depths" in fields:
    return _described_convnext(fields, shapes, name, kind)
  if kind in ("siglip", "siglip_vision_model"):
    return _described_vit("siglip", fields)
  if kind in ("clip", "clip_vision_model"):
    return _described_vit("clip", fields)
  family = family_of(shapes)
  if kind or family is None:
    raise UserError(
      f"{fields.file}: the vision encoder is of kind {kind or None!r}; known are siglip, "
      'siglip_vision_model, clip, clip_vision_model (as "model_type") and convnext... (as '
      '"model_type" or "architecture").'
    )
  if family == "convnext":
    return _described_convnext(fields, shapes, name, kind)
  return _described_vit("siglip" if family == "siglip" else "clip", fields)


def _described_vit(family: Literal["siglip", "clip"], fields: Fields) -> ViTConfig:
  defaults = _DEFAULTS[family]
  fields.only("hidden_act", defaults["hidden_act"], f"the activation of {family}")
  fields.only("num_channels", 3, "pictures are red, green and blue")
  return ViTConfig(
    family,
    image_size=fields.integer("image_size", 224),
    patch_size=fields.integer("patch_size", defaults["patch_size"]),
    width=fields.integer("hidden_size", 768),
    num_layers=fields.integer("num_hidden_layers", 12),
    num_heads=fields.integer("num_attention_heads", 12),
    mlp_width=fields.integer("intermediate_size", 3072),
    norm_eps=fields.number("layer_norm_eps", defaults["layer_norm_eps"]),
  )


def _described_convnext(fields: Fields, shapes: Shapes, name: str, kind: str) -> ConvNeXtConfig:
  arguments = fields.section("model_args")  # timm
  depths, widths = _convnext_stages(shapes)
  for section in (arguments, fields):
    depths = section.integers("depths") if "depths" in section else depths
    for key in ("dims", "widths", "hidden_sizes"):
      widths = section.integers(key) if key in section else widths
  size = None
  for key in ("img_size", "image_size"):
    size = fields.integer(key) if key in fields else size
  if size is None and "input_size" in fields.section("pretrained_cfg"):
    size = fields.section("pretrained_cfg").integers("input_size")[-1]
  # All others of timm keep the default of its norms.
  default = 1e-6 if "_" in kind and not _XXLARGE.match(kind) else 1e-5
  eps = arguments.number("norm_eps", fields.number("norm_eps", default))
  return ConvNeXtConfig(
    image_size=size or _size_in(name, fields.file), depths=depths, widths=widths, norm_eps=eps
  )


def _measured(name: str, shapes: Shapes, file: object) -> VisionConfig:
  family = family_of(shapes)
  if family == "convnext":
    depths, widths = _convnext_stages(shapes)
    return ConvNeXtConfig(image_size=_size_in(name, file), depths=depths, widths=widths)
  if family is None:
    raise UserError(
      f"{file}: mm_vision_tower is {name!r}, which is none of {', '.join(presets.TOWERS)}, and the "
      "tensors are not those of a ConvNeXt, SigLIP or CLIP."
    )
  return _measured_vit("siglip" if family == "siglip" else "clip", name, shapes, file)


def _measured_vit(
  family: Literal["siglip", "clip"], name: str, shapes: Shapes, file: object
) -> ViTConfig:
  width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
  positions, _ = shapes["vision_model.embeddings.position_embedding.weight"]
  layers = [
    int(found[1])
    for found in (re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key) for key in shapes)
    if found is not None
  ]
  if width not in _HEADS and width % 64:
    raise UserError(
      f"{file}: mm_vision_tower is {name!r}, and shapes do not tell how many heads an encoder of "
      f"width {width} has; put the encoder's config.json beside it as vision_tower_config.json."
    )
  side = int((positions - (family == "clip")) ** 0.5)
  return ViTConfig(
    family,
    image_size=side * patch,
    patch_size=patch,
    width=width,
    num_layers=max(layers, default=-1) + 1,
    num_heads=_HEADS.get(width, width // 64),
    mlp_width=shapes.get("vision_model.encoder.layers.0.mlp.fc1.weight", (4 * width, width))[0],
    norm_eps=_DEFAULTS[family]["layer_norm_eps"],
  )


def _convnext_stages(shapes: Shapes) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Depths and widths of the stages that the tensors are of."""
  widths: dict[int, int] = {}
  depths: dict[int, int] = {}
  for key, shape in shapes.items():
    found = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight", key)
    if found:
      stage = int(found[1])
      widths[stage] = shape[0]
      depths[stage] = max(depths.get(stage, 0), int(found[2]) + 1)
  return (
    tuple(depths[stage] for stage in sorted(depths)),
    tuple(widths[stage] for stage in sorted(widths)),
  )


def _size_in(name: str, file: object) -> int:
  """The image size that ends a name, as in "convnext-576"."""
  found = re.search(r"[-_](\d{2,4})(px)?$", name.rstrip("/"))
  if found is None:
    raise UserError(
      f"{file}: nothing tells the image size of the vision encoder {name!r}; write "
      '{"image_size": N} into a vision_tower_config.json beside it.'
    )
  return int(found[1])
