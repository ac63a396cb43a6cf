# SPDX-License-Identifier: Apache-2.0
"""A fresh slow-fast model of a language model and a vision encoder that are each trained already.

The projector and the gates are new; slow keys and values start as the language model's own.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export, HubFiles, VideoConfig
from slowfast_jax.checkpoints.hf_config import (
  CONFIG_FILE,
  LLM_TYPES,
  RELEASED_FRAMES,
  parse_decoder,
  stop_ids,
)
from slowfast_jax.checkpoints.hf_read import Tensors, match
from slowfast_jax.checkpoints.hf_tower import tower_config
from slowfast_jax.checkpoints.hub_files import open_tokenizer, small_files
from slowfast_jax.checkpoints.json_fields import Fields, read_json
from slowfast_jax.checkpoints.parts import Locate, Piece
from slowfast_jax.checkpoints.safetensors_files import SafetensorsFiles
from slowfast_jax.checkpoints.source import Source, parameter_cuts, parameter_shapes, place
from slowfast_jax.checkpoints.tables import (
  CONVNEXT_PREFIXES,
  decoder_slots,
  is_unused,
  vision_slots,
)
from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.data.chat import SYSTEM_PROMPT
from slowfast_jax.errors import UserError
from slowfast_jax.models.decoder import Decoder, DecoderConfig
from slowfast_jax.models.hybrid import HybridAdapter, HybridConfig, adapters_from_decoder
from slowfast_jax.models.projector import Projector
from slowfast_jax.models.slowfast import CompressorConfig, SlowFastConfig, make_adapters
from slowfast_jax.models.vision import VisionConfig

# Released settings by frames: strides of sampling and of pooling over time.
STRIDES = {frames: strides for strides, frames in RELEASED_FRAMES.items()}


@dataclasses.dataclass(frozen=True)
class FreshOptions:
  """What a language model and an encoder leave open; defaults are those of the released models.

  Attributes:
    num_frames: of a video: 64, 96 or 128, which also gives the strides.
    every: every how many layers slow tokens are read.
    gate, queries: as in HybridConfig.
    projector: "linear" or "mlp<n>x_gelu".
    select_layer: which hidden state of a vision transformer is the output.
    seed: of the fresh parameters.
  """

  num_frames: int = 64
  every: int = 8
  gate: str = "dynamic-tanh-warmup"
  queries: str = "text-only"
  projector: str = "mlp2x_gelu"
  select_layer: int = -2
  seed: int = 0


def load_parts(
  llm: str | os.PathLike,
  vision: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: str | None = None,
  **options: Any,
) -> Export:
  """Makes a slow-fast model of two trained parts.

  Args:
    llm: the folder of a Qwen2, Qwen2.5, Qwen3 or Llama.
    vision: the folder, or the .safetensors file, of a SigLIP, CLIP or ConvNeXt.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters; None: as they are stored, fresh ones as the language model's.
    **options: fields of FreshOptions.

  Raises:
    UserError: a part is of another kind, or its files do not fit each other.
  """
  return place(open_parts(llm, vision, **options), mesh, dtype)


def open_parts(llm: str | os.PathLike, vision: str | os.PathLike, **fields: Any) -> Source:
  """A fresh model whose trained parts are not read yet; arguments and errors as of `load_parts`."""
  options = FreshOptions(**fields)
  llm_path, vision_path = epath.Path(llm).absolute(), epath.Path(vision).absolute()
  decoder = _open_decoder_config(llm_path)
  vision_files = SafetensorsFiles(vision_path)
  prefix = _vision_prefix(vision_files)
  tower = _open_tower(vision_path, vision_files, prefix, options)
  model = _model_config(tower, decoder, options)
  shapes = parameter_shapes(model)
  text = match(
    SafetensorsFiles(llm_path),
    decoder_slots(model, shapes),
    functools.partial(is_unused, vision=tower, vision_prefix="\0"),  # It has no encoder.
  )
  eyes = match(
    vision_files,
    vision_slots(model, shapes, prefix),
    functools.partial(is_unused, vision=tower, vision_prefix=prefix, alone=True),
  )
  export = _export(model, llm_path, options)
  fresh_dtype = text.dtypes()["decoder.norm.scale"][0]
  fresh = {name: shapes[name] for name in shapes if name.startswith(("projector.", "adapters."))}

  def pieces(locate: Locate | None) -> Iterator[Piece]:
    with text.files, eyes.files:
      for tensors in (text, eyes):
        yield from tensors.pieces(parameter_cuts(model))
      for name, array in _fresh_parameters(model, text, options.seed).items():
        yield Piece(name, array.astype(fresh_dtype))

  count = sum(int(np.prod(shape)) for shape in fresh.values())
  return Source(
    export,
    {**text.dtypes(), **eyes.dtypes(), **dict.fromkeys(fresh, (fresh_dtype,))},
    pieces,
    text.num_bytes + eyes.num_bytes + count * fresh_dtype.itemsize,
  )


def _open_decoder_config(folder: epath.Path) -> DecoderConfig:
  fields = Fields(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
  return parse_decoder(fields, fields.choice("model_type", LLM_TYPES))


def _vision_prefix(files: SafetensorsFiles) -> str:
  for prefix in CONVNEXT_PREFIXES:
    if f"{prefix}stem.0.weight" in files.tensors:
      return prefix
  return ""


def _open_tower(
  path: epath.Path, files: SafetensorsFiles, prefix: str, options: FreshOptions
) -> VisionConfig:
  folder = path if path.is_dir() else path.parent
  described = None
  for name in (CONFIG_FILE, "open_clip_config.json"):
    if described is None and (folder / name).exists():
      described = Fields(read_json(folder / name), folder / name)
  shapes = {
    name.removeprefix(prefix): tensor.shape
    for name, tensor in files.tensors.items()
    if name.startswith(prefix)
  }
  return tower_config(folder.name, described, options.select_layer, shapes, folder)


def _model_config(
  tower: VisionConfig, decoder: DecoderConfig, options: FreshOptions
) -> SlowFastConfig:
  if options.num_frames not in STRIDES:
    raise UserError(f"num_frames must be one of {sorted(STRIDES)}, got {options.num_frames}.")
  sampling, temporal = STRIDES[options.num_frames]
  try:
    return SlowFastConfig(
      vision=tower,
      decoder=decoder,
      # Grids of a token or two are not pooled.
      compressor=CompressorConfig(
        video_pooling_stride=2 if tower.side > 2 else 1,
        sampling_stride=sampling,
        temporal_stride=temporal,
      ),
      hybrid=HybridConfig(
        every=options.every,
        max_depth=decoder.num_layers,
        gate=options.gate,
        queries=options.queries,
      ),
      projector=options.projector,
    )
  except ValueError as error:
    raise UserError(str(error)) from error


def _export(model: SlowFastConfig, llm: epath.Path, options: FreshOptions) -> Export:
  files = small_files(llm)
  # The config is that of another model; the rest is about text, which stays.
  text_files = {name: files[name] for name in files if name not in (CONFIG_FILE, "README.md")}
  policy = "siglip" if model.vision.family == "siglip" else "clip"
  return Export(
    model=model,
    params=nnx.State({}),
    tokenizer=open_tokenizer(llm),
    video=VideoConfig(options.num_frames, "fps", 2.0, policy),
    system=SYSTEM_PROMPT,
    stop_ids=stop_ids(files, llm),
    hub=HubFiles(text_files),
  )


def _fresh_parameters(model: SlowFastConfig, text: Tensors, seed: int) -> dict[str, np.ndarray]:
  """The projector and the adapters, as they start."""
  assert model.hybrid is not None
  projector_key, adapters_key = jax.random.split(jax.random.key(seed))
  projector: Projector = _random(
    lambda rngs: Projector(model.projector, model.vision.width, model.decoder.width, rngs=rngs),
    projector_key,
  )
  states = {"projector": nnx.state(projector)}
  if depths := model.hybrid_layers:
    hybrid = model.hybrid
    adapters: HybridAdapter = _random(
      lambda rngs: make_adapters(hybrid, model.decoder, rngs=rngs), adapters_key
    )
    decoder = _keys_and_values(model.decoder, text, depths)
    adapters_from_decoder(adapters, decoder, tuple(range(len(depths))))
    states["adapters"] = nnx.state(adapters)
  return {name: np.asarray(leaf) for name, leaf in flatten(states).items()}


def _random(make: Any, key: jax.Array) -> Any:
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  return nnx.merge(graphdef, jax.jit(lambda key: nnx.state(make(nnx.Rngs(key))))(key))


def _keys_and_values(cfg: DecoderConfig, text: Tensors, depths: tuple[int, ...]) -> Decoder:
  """A decoder of these layers alone, that has nothing but their key and value projections."""
  short = dataclasses.replace(cfg, num_layers=len(depths))
  decoder: Decoder = nnx.eval_shape(lambda: Decoder(short, rngs=nnx.Rngs(0)))
  attention = decoder.layers.attention
  for name, projection in (("k", attention.k), ("v", attention.v)):
    for kind in ("kernel", "bias"):
      param = getattr(projection, kind)
      if param is not None:
        slots = text.slots[f"decoder.layers.attention.{name}.{kind}"]
        layers = [text.read(slots[depth]).astype(np.float32) for depth in depths]
        setattr(projection, kind, param.replace(jax.numpy.asarray(np.stack(layers))))
  return decoder
