# SPDX-License-Identifier: Apache-2.0
"""What would make a program fit that does not: which field to change, and about how much it frees.

What lies in memory all the time (parameters, optimiser) is computed; what is kept for the backward
pass is estimated from the layers' sizes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections

from slowfast_jax.compile.programs import Request, bytes_of, programs_of
from slowfast_jax.compile.topology import GIB
from slowfast_jax.errors import UserError
from slowfast_jax.models.convnext import DOWNSAMPLE_STRIDE, MLP_RATIO, STEM_STRIDE
from slowfast_jax.models.remat import REMAT
from slowfast_jax.models.slowfast import abstract_params
from slowfast_jax.models.vision import VisionConfig
from slowfast_jax.models.vit import ViTConfig
from slowfast_jax.train.optimizer import split_frozen
from slowfast_jax.train.plan import Plan, make_plan, model_config


@dataclasses.dataclass(frozen=True)
class Advice:
  """One change.

  Attributes:
    change: as words of the command line.
    frees: bytes of a device.
  """

  change: str
  frees: float


def advise(
  config: ml_collections.ConfigDict, devices: list, what: str, request: Request, missing: float
) -> list[str]:
  """Lines of advice, the most helpful first; `missing` bytes are needed."""
  if what == "train":
    found = _changes(config, devices)
  else:
    found = _changes_of_answering(config, devices, what, request)
  found = sorted(found, key=lambda advice: -advice.frees)
  lines = [
    f"{one.change}: frees about {one.frees / GIB:.1f} GiB"
    + (", which is enough" if one.frees >= missing else "")
    for one in found
    if one.frees > 0.02 * missing
  ]
  return lines or ["more chips, or a smaller model: no single field frees enough"]


def _changes(config: ml_collections.ConfigDict, devices: list) -> list[Advice]:
  plan, c = make_plan(config, devices), config
  kept = kept_bytes(plan)
  parts = dict(plan.mesh.shape)
  spread = parts["data"] * parts["fsdp"]
  rows = c.data.batch_size // spread
  shares = [n for n in range(parts["fsdp"] + 1, spread + 1) if spread % n == 0]
  found = _try(
    plan,
    "mesh",
    [{"data": spread // n, "fsdp": n} for n in shares],
    devices,
  )
  # The largest is not always the best: parameters that it does not divide are on every device.
  found = sorted(found, key=lambda advice: -advice.frees)[:1]
  found += _try(plan, "optimizer", [{"name": "adafactor"}], devices)
  stricter = REMAT[REMAT.index(c.train.remat) + 1 :]
  for policy in stricter:
    frees = kept - kept_bytes(make_plan(_changed(c, "train", {"remat": policy}), devices))
    found.append(Advice(f"--config.train.remat={policy}", frees))
  if c.train.frame_chunk != 1:
    chunk = c.train.frame_chunk // 2 or 4
    after = kept_bytes(make_plan(_changed(c, "train", {"frame_chunk": chunk}), devices))
    found.append(Advice(f"--config.train.frame_chunk={chunk}", kept - after))
  if rows // c.train.accumulation > 1:
    twice = 2 * c.train.accumulation
    found.append(Advice(f"--config.train.accumulation={twice}", kept / 2))
    half = c.data.batch_size // 2
    found.append(Advice(f"--config.data.batch_size={half} (another recipe)", kept / 2))
  return found


def _changes_of_answering(
  config: ml_collections.ConfigDict, devices: list, what: str, request: Request
) -> list[Advice]:
  """The mesh that needs least, and half of what is asked for."""
  now = _needed(config, devices, what, request)
  found = []
  for fields in _meshes(config, len(devices)):
    words = " ".join(f"--config.mesh.{field}={size}" for field, size in fields.items())
    after = _needed(_changed(config, "mesh", fields), devices, what, request)
    found.append(Advice(words, now - after))
  found = sorted(found, key=lambda advice: -advice.frees)[:1]
  frames = request.frames or config.data.num_frames
  halves = {"rows": request.rows // 2, "text": request.text // 2}
  halves |= {"new_tokens": request.new_tokens // 2}
  # Longer videos are multiples of those of training.
  if frames // 2 % config.data.num_frames == 0:
    halves["frames"] = frames // 2
  for field, half in halves.items():
    if half:
      less = dataclasses.replace(request, **{field: half})
      found.append(Advice(f"--{field}={half}", now - _needed(config, devices, what, less)))
  return found


def _meshes(config: ml_collections.ConfigDict, count: int) -> list[dict[str, int]]:
  """All devices: heads over some, slow tokens over some, parameters over the rest."""
  heads = model_config(config.model).decoder.num_kv_heads
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  return [
    {"data": 1, "fsdp": count // tensor // context, "context": context, "tensor": tensor}
    for tensor in sizes
    for context in sizes
    if heads % tensor == 0 and count % (tensor * context) == 0
  ]


def _needed(config: ml_collections.ConfigDict, devices: list, what: str, request: Request) -> float:
  """Bytes of a device that the largest program of a kind is known to need."""
  programs = programs_of(config, devices, what, request)
  return max(sum(one.memory.values()) + sum(one.inside.values()) for one in programs)


def _try(plan: Plan, section: str, changes: list[dict[str, Any]], devices: list) -> list[Advice]:
  """What each change of a section frees of parameters, optimiser and gradients."""
  before, found = _state_bytes(plan), []
  for fields in changes:
    words = " ".join(f"--config.{section}.{field}={value}" for field, value in fields.items())
    try:
      after = make_plan(_changed(plan.config, section, fields), devices)
    except UserError:  # What the change leads to is not allowed.
      continue
    found.append(Advice(words, before - _state_bytes(after)))
  return found


def _changed(
  config: ml_collections.ConfigDict, section: str, fields: dict[str, Any]
) -> ml_collections.ConfigDict:
  copy = config.copy_and_resolve_references().unlock()
  copy[section].update(fields)
  return copy.lock()


def _state_bytes(plan: Plan) -> int:
  state = plan.abstract_state()
  learning, _ = split_frozen(state.params, plan.optimizer)
  return bytes_of(state) + bytes_of(learning)  # Gradients lie as their parameters do.


def kept_bytes(plan: Plan) -> float:
  """About what a device keeps of all layers for the backward pass."""
  c, model = plan.config, plan.model
  learning, _ = split_frozen(abstract_params(model), plan.optimizer)
  mesh = plan.mesh.shape
  rows = c.data.batch_size / (mesh["data"] * mesh["fsdp"] * c.train.accumulation)
  size, policy = jnp.dtype(c.train.dtype).itemsize, c.train.remat
  decoder = model.decoder
  heads = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_dim
  queries = decoder.num_heads * decoder.head_dim
  one = _kept(decoder.width, heads, queries, 3 * decoder.mlp_width, policy)
  total = rows * c.data.decoder_length * decoder.num_layers * one / mesh["tensor"]
  if "vision" in learning:
    frames = rows * c.data.num_frames / (mesh["tensor"] * mesh["context"])
    if 0 < c.train.frame_chunk < frames:
      frames, policy = c.train.frame_chunk, "dots"
    total += frames * _kept_of_frame(model.vision, policy)
  return total * size


def _kept_of_frame(vision: VisionConfig, policy: str) -> int:
  """Elements of a frame that all blocks of the encoder keep."""
  if isinstance(vision, ViTConfig):
    block = _kept(vision.width, 3 * vision.width, vision.width, 2 * vision.mlp_width, policy)
    return vision.tokens_per_frame * vision.num_blocks * block
  # Of a block the input; for `dots` the convolution's result and those of the MLP as well.
  each = {"none": 3 + 5 * MLP_RATIO, "dots": 3 + MLP_RATIO}.get(policy, 1)
  stages = enumerate(zip(vision.depths, vision.widths))
  return sum(
    depth * (vision.image_size // (STEM_STRIDE * DOWNSAMPLE_STRIDE**i)) ** 2 * width * each
    for i, (depth, width) in stages
  )


def _kept(width: int, heads: int, queries: int, mlp: int, policy: str) -> int:
  """Elements of a position that one layer keeps."""
  return {
    "none": 6 * width + 2 * heads + queries + mlp,
    "dots": 3 * width + heads + mlp,
    "minimal": width + heads + queries,
    "offload": width,
    "full": width,
  }[policy]
