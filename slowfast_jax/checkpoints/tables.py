# SPDX-License-Identifier: Apache-2.0
"""The names of tensors in released checkpoints, and of ours: a row a tensor (semantics section 7).

A row reads: this tensor is that parameter, with its axes rearranged so. The einops pattern serves
both directions. A row whose parameter a model does not have (a bias, a head beside tied embeddings)
is none of its rows. `{i}` counts the layers of a stack, `{s}` the stages of a ConvNeXt.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from slowfast_jax.models.convnext import ConvNeXtConfig
from slowfast_jax.models.projector import projector_depth
from slowfast_jax.models.slowfast import SlowFastConfig
from slowfast_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class Row:
  """A tensor.

  Attributes:
    source: its name in a released checkpoint.
    target: the dotted path of our parameter.
    pattern: from the released axes to ours; without the axis of layers.
    also: another name that files have for it.
  """

  source: str
  target: str
  pattern: str
  also: str | None = None


DECODER = (
  Row("model.embed_tokens.weight", "decoder.embed.embedding", "V D -> V D"),
  Row("model.norm.weight", "decoder.norm.scale", "D -> D"),
  Row("lm_head.weight", "decoder.head.kernel", "V D -> D V"),
)

DECODER_LAYER = (
  Row("input_layernorm.weight", "input_norm.scale", "D -> D"),
  Row("self_attn.q_proj.weight", "attention.q.kernel", "(N H) D -> D N H"),
  Row("self_attn.q_proj.bias", "attention.q.bias", "(N H) -> N H"),
  Row("self_attn.k_proj.weight", "attention.k.kernel", "(K H) D -> D K H"),
  Row("self_attn.k_proj.bias", "attention.k.bias", "(K H) -> K H"),
  Row("self_attn.v_proj.weight", "attention.v.kernel", "(K H) D -> D K H"),
  Row("self_attn.v_proj.bias", "attention.v.bias", "(K H) -> K H"),
  Row("self_attn.o_proj.weight", "attention.out.kernel", "D (N H) -> N H D"),
  Row("self_attn.q_norm.weight", "attention.q_norm.scale", "H -> H"),
  Row("self_attn.k_norm.weight", "attention.k_norm.scale", "H -> H"),
  Row("post_attention_layernorm.weight", "post_norm.scale", "D -> D"),
  Row("mlp.gate_proj.weight", "mlp.gate.kernel", "M D -> D M"),
  Row("mlp.up_proj.weight", "mlp.up.kernel", "M D -> D M"),
  Row("mlp.down_proj.weight", "mlp.down.kernel", "D M -> M D"),
)

# Keys and values lie head by head, so c (key, value) is inside of K.
HYBRID_LAYER = (
  Row("self_attn.cross_attn_kv_proj.weight", "kv.kernel", "(K c H) D -> D K c H"),
  Row("self_attn.cross_attn_kv_proj.bias", "kv.bias", "(K c H) -> K c H"),
  Row("self_attn.cross_attn_gate_proj.0.weight", "gate.kernel", "o (N H) -> N H o"),
  Row("self_attn.cross_attn_gate_proj.0.bias", "gate.bias", "o -> o"),
  Row("self_attn.cross_attn_warm_up_gate", "warm_up", "o -> o"),
)

PROJECTOR_LAYER = (
  Row("weight", "kernel", "D E -> E D"),
  Row("bias", "bias", "D -> D"),
)

VIT = (
  Row("embeddings.patch_embedding.weight", "patch.kernel", "E C h w -> h w C E"),
  Row("embeddings.patch_embedding.bias", "patch.bias", "E -> E"),
  Row("embeddings.position_embedding.weight", "position", "P E -> P E"),
  Row("embeddings.class_embedding", "class_token", "E -> E"),
  # So misspelt in every file.
  Row("pre_layrnorm.weight", "pre_norm.scale", "E -> E"),
  Row("pre_layrnorm.bias", "pre_norm.bias", "E -> E"),
)

VIT_LAYER = (
  Row("layer_norm1.weight", "norm1.scale", "E -> E"),
  Row("layer_norm1.bias", "norm1.bias", "E -> E"),
  Row("self_attn.q_proj.weight", "q.kernel", "(N H) E -> E N H"),
  Row("self_attn.q_proj.bias", "q.bias", "(N H) -> N H"),
  Row("self_attn.k_proj.weight", "k.kernel", "(N H) E -> E N H"),
  Row("self_attn.k_proj.bias", "k.bias", "(N H) -> N H"),
  Row("self_attn.v_proj.weight", "v.kernel", "(N H) E -> E N H"),
  Row("self_attn.v_proj.bias", "v.bias", "(N H) -> N H"),
  Row("self_attn.out_proj.weight", "out.kernel", "E (N H) -> N H E"),
  Row("self_attn.out_proj.bias", "out.bias", "E -> E"),
  Row("layer_norm2.weight", "norm2.scale", "E -> E"),
  Row("layer_norm2.bias", "norm2.bias", "E -> E"),
  Row("mlp.fc1.weight", "fc1.kernel", "M E -> E M"),
  Row("mlp.fc1.bias", "fc1.bias", "M -> M"),
  Row("mlp.fc2.weight", "fc2.kernel", "E M -> M E"),
  Row("mlp.fc2.bias", "fc2.bias", "E -> E"),
)

CONVNEXT = (
  Row("stem.0.weight", "stem.conv.kernel", "E C h w -> h w C E"),
  Row("stem.0.bias", "stem.conv.bias", "E -> E"),
  Row("stem.1.weight", "stem.norm.scale", "E -> E"),
  Row("stem.1.bias", "stem.norm.bias", "E -> E"),
)

CONVNEXT_STAGE = (
  Row("downsample.0.weight", "downsample_norm.scale", "E -> E"),
  Row("downsample.0.bias", "downsample_norm.bias", "E -> E"),
  Row("downsample.1.weight", "downsample.kernel", "O E h w -> h w E O"),
  Row("downsample.1.bias", "downsample.bias", "O -> O"),
)

CONVNEXT_BLOCK = (
  Row("conv_dw.weight", "depthwise.kernel", "E 1 h w -> h w E"),
  Row("conv_dw.bias", "depthwise.bias", "E -> E"),
  Row("norm.weight", "norm.scale", "E -> E"),
  Row("norm.bias", "norm.bias", "E -> E"),
  Row("mlp.fc1.weight", "fc1.kernel", "M E -> E M"),
  Row("mlp.fc1.bias", "fc1.bias", "M -> M"),
  Row("mlp.fc2.weight", "fc2.kernel", "E M -> M E"),
  Row("mlp.fc2.bias", "fc2.bias", "E -> E"),
  # timm and open_clip call it gamma; released checkpoints were renamed on the way.
  Row("weight", "layer_scale", "E -> E", also="gamma"),
)

OFFICIAL_VISION = "model.vision_tower.vision_tower."
# Where a file of the encoder alone has its tensors: timm; open_clip. Transformers' names have none.
CONVNEXT_PREFIXES = ("", "visual.trunk.")

# Buffers that are computed, and old files store; and a factor that only some gates have.
_BUFFERS = (
  r"(.*\.)?rotary_emb\.inv_freq",
  r"(.*\.)?embeddings\.position_ids",
  r"model\.layers\.\d+\.self_attn\.cross_attn_warm_up_gate",
)
_VIT_UNUSED = (r"(vision_model\.)?post_layernorm\..*", r"(vision_model\.)?head\..*")
_VIT_LAYER = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d+)\..*")
# The other half of a CLIP or SigLIP file, in transformers' names and open_clip's.
_TEXT_SIDE = (
  r"text_model\..*", r"logit_(scale|bias)", r"(text|visual)_projection\.weight",
  r"(text|transformer|ln_final|visual\.head)\..*", r"token_embedding\.weight",
  r"positional_embedding", r"text_projection(\..*)?",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slot:
  """A tensor of one checkpoint: where its numbers go.

  Attributes:
    source, also: its name, and the other name that it may have.
    param: the dotted path of the parameter.
    layer: its place in the parameter's stack; None: it is the whole parameter.
    pattern: of one layer, from the released axes to ours.
    shape: of the tensor.
    target_shape: of our layer, or whole parameter.
  """

  source: str
  also: str | None
  param: str
  layer: int | None
  pattern: str
  shape: tuple[int, ...]
  target_shape: tuple[int, ...]

  @property
  def sizes(self) -> dict[str, int]:
    """The sizes of the pattern's axes."""
    return dict(zip(self.pattern.split("->")[1].split(), self.target_shape))


def official_slots(cfg: SlowFastConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
  """All tensors of a model in the released layout, in the order of its files.

  Args:
    cfg: the model.
    shapes: of all its parameters, by dotted path.
  """
  rows = [
    *_decoder_rows(cfg.decoder.num_layers),
    *_hybrid_rows(cfg),
    *_projector_rows(cfg),
    *_vision_rows(cfg.vision, OFFICIAL_VISION),
  ]
  return _existing(rows, shapes)


def decoder_slots(cfg: SlowFastConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
  """The tensors of the language model alone."""
  return _existing(_decoder_rows(cfg.decoder.num_layers), shapes)


def vision_slots(
  cfg: SlowFastConfig, shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> list[Slot]:
  """The tensors of the vision encoder in a file of its own."""
  slots = _existing(_vision_rows(cfg.vision, prefix), shapes)
  # transformers 5 saves a SigLIP or CLIP encoder without what stood before its names.
  inner = f"{prefix}vision_model."
  return [
    dataclasses.replace(slot, also=slot.source.removeprefix(inner))
    if slot.source.startswith(inner)
    else slot
    for slot in slots
  ]


def is_unused(name: str, vision: VisionConfig, vision_prefix: str, *, alone: bool = False) -> bool:
  """Whether a tensor is known to be one that the model does not run.

  Args:
    name: a tensor that has no slot.
    vision: the encoder.
    vision_prefix: where the encoder's tensors are.
    alone: the file is one of the encoder, perhaps with a text encoder beside it.
  """
  patterns = list(_BUFFERS) + (list(_TEXT_SIDE) if alone else [])
  if any(re.fullmatch(pattern, name) for pattern in patterns):
    return True
  if not name.startswith(vision_prefix):
    return False
  inner = name.removeprefix(vision_prefix)
  if isinstance(vision, ConvNeXtConfig):
    return inner.startswith("head.")
  layer = _VIT_LAYER.fullmatch(inner)
  if layer:
    return vision.num_blocks <= int(layer[1]) < vision.num_layers
  return any(re.fullmatch(pattern, inner) for pattern in _VIT_UNUSED)


def split_axis(pattern: str) -> int | None:
  """Our axis that the tensor's rows run along; None where rows are no axis of ours."""
  source, target = (side.split() for side in pattern.split("->"))
  return None if source[0].startswith("(") else target.index(source[0])


def source_shape(pattern: str, target: tuple[int, ...]) -> tuple[int, ...]:
  """The tensor's shape, from ours: every axis stands alone in our half of a pattern."""
  left, right = pattern.split("->")
  sizes = dict(zip(right.split(), target))
  shape = []
  for group in re.findall(r"\([^)]*\)|\S+", left):
    size = 1
    for axis in group.strip("()").split():
      size *= sizes.get(axis, 1)  # A literal 1 has no name.
    shape.append(size)
  return tuple(shape)


# (row, place in the stack)
_Placed = tuple[Row, int | None]


def _decoder_rows(num_layers: int) -> Iterator[_Placed]:
  embed, *rest = DECODER
  yield embed, None
  for i in range(num_layers):
    yield from _prefixed(DECODER_LAYER, f"model.layers.{i}.", "decoder.layers.", i)
  for row in rest:
    yield row, None


def _hybrid_rows(cfg: SlowFastConfig) -> Iterator[_Placed]:
  for i, depth in enumerate(cfg.hybrid_layers):
    yield from _prefixed(HYBRID_LAYER, f"model.layers.{depth}.", "adapters.", i)


def _projector_rows(cfg: SlowFastConfig) -> Iterator[_Placed]:
  for i in range(projector_depth(cfg.projector)):
    # The layers of an mlp are counted with the activations between them.
    place = "" if cfg.projector == "linear" else f"{2 * i}."
    yield from _prefixed(
      PROJECTOR_LAYER, f"model.mm_projector.{place}", f"projector.layers.{i}.", None
    )


def _vision_rows(vision: VisionConfig, prefix: str) -> Iterator[_Placed]:
  if not isinstance(vision, ConvNeXtConfig):
    yield from _prefixed(VIT, f"{prefix}vision_model.", "vision.", None)
    for i in range(vision.num_blocks):
      layer = f"{prefix}vision_model.encoder.layers.{i}."
      yield from _prefixed(VIT_LAYER, layer, "vision.blocks.", i)
    return
  yield from _prefixed(CONVNEXT, prefix, "vision.", None)
  for s, depth in enumerate(vision.depths):
    source, target = f"{prefix}stages.{s}.", f"vision.stages.{s}."
    yield from _prefixed(CONVNEXT_STAGE, source, target, None)
    for i in range(depth):
      yield from _prefixed(CONVNEXT_BLOCK, f"{source}blocks.{i}.", f"{target}blocks.", i)


def _prefixed(
  rows: tuple[Row, ...], source: str, target: str, layer: int | None
) -> Iterator[_Placed]:
  for row in rows:
    also = None if row.also is None else source + row.also
    yield Row(source + row.source, target + row.target, row.pattern, also), layer


def _existing(rows: Iterable[_Placed], shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
  """The rows whose parameter the model has."""
  slots = []
  for row, layer in rows:
    if row.target in shapes:
      target = shapes[row.target] if layer is None else shapes[row.target][1:]
      shape = source_shape(row.pattern, target)
      slots.append(Slot(row.source, row.also, row.target, layer, row.pattern, shape, target))
  return slots
