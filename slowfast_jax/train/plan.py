# SPDX-License-Identifier: Apache-2.0
"""What a training config means before anything is opened: model, mesh, shapes, optimiser, the step.

Enough to compile a run's program on any machine; what it also needs to run is in `setup`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from slowfast_jax.checkpoints.trees import flatten, with_shardings
from slowfast_jax.data.packing import Geometry, empty_row
from slowfast_jax.data.pipeline import Bucket
from slowfast_jax.errors import UserError
from slowfast_jax.models.hybrid import INITS
from slowfast_jax.models.lora import LORA, LoraConfig
from slowfast_jax.models.presets import build_config
from slowfast_jax.models.remat import REMAT
from slowfast_jax.models.slowfast import SlowFastConfig
from slowfast_jax.shapes import Batch
from slowfast_jax.sharding import batch_sharding, make_mesh
from slowfast_jax.train.optimizer import OptimizerConfig, split_frozen
from slowfast_jax.train.options import options_of
from slowfast_jax.train.step import TrainState, init_state, make_train_step, state_shapes

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
  """The program of a run, without its data.

  Attributes:
    config: what the parts were made of.
    model: sizes and variants of the model.
    mesh: all devices.
    optimizer: its numbers.
    geometry: shapes of a batch's rows.
    buckets: further shapes that steps have.
  """

  config: ml_collections.ConfigDict
  model: SlowFastConfig
  mesh: Mesh
  optimizer: OptimizerConfig
  geometry: Geometry
  buckets: list[Bucket]

  def init(self, key: jax.Array) -> TrainState:
    """A fresh state; to be run under jit."""
    return init_state(self.model, self.optimizer, key)

  def abstract_state(self) -> TrainState:
    """The state's shapes and its place on the mesh."""
    return with_shardings(state_shapes(self.model, self.optimizer), self.mesh)

  def abstract_batches(self) -> list[Batch]:
    """The shapes that steps have, and their place on the mesh: the first is the config's own."""
    sizes = [(self.geometry, self.config.data.batch_size)]
    sizes += [(bucket.geometry, bucket.batch_size) for bucket in self.buckets]
    return [_abstract_batch(geometry, rows, self.mesh) for geometry, rows in sizes]

  def train_step(self):
    """The step as a function of state and batch; see `make_train_step`."""
    train = self.config.train
    return make_train_step(
      self.model,
      self.optimizer,
      dtype=jnp.dtype(train.dtype),
      remat=train.remat,
      frame_chunk=train.frame_chunk,
      accumulation=train.accumulation,
      z_loss=train.z_loss,
    )


def make_plan(config: ml_collections.ConfigDict, devices: list | None = None) -> Plan:
  """Checks all that a config says of the program; no file is opened.

  Args:
    config: its fields are those of `defaults.training_defaults`.
    devices: what the mesh is made of, described ones too; None: those of this machine.

  Raises:
    UserError: something does not exist or does not fit; names the field to change.
  """
  c = config
  _check_train(c)
  mesh = make_mesh(c.mesh.to_dict(), devices)
  model = model_config(c.model)
  geometry, buckets = geometry_of(model, c.data), _buckets(model, c.data)
  _check_rows(mesh, c.data.batch_size, c.train.accumulation)
  for i, bucket in enumerate(buckets):
    _check_rows(mesh, bucket.batch_size, c.train.accumulation, _in_bucket(i))
  plan = Plan(c, model, mesh, optimizer_config(c), geometry, buckets)
  params = state_shapes(model, plan.optimizer).params
  learning = flatten(split_frozen(params, plan.optimizer)[0])
  if not learning:
    raise UserError(f"optimizer.groups freezes every parameter: {plan.optimizer.groups}.")
  if model.lora is not None and not any(LORA in name for name in learning):
    raise UserError(
      f"optimizer.groups freezes the adapters of model.lora: {plan.optimizer.groups}; "
      'give them a group of their own before the others: ("lora", 1.0).'
    )
  return plan


def model_config(c: ml_collections.ConfigDict) -> SlowFastConfig:
  """The preset with the config's changes; without `slow` the model has the fast tokens alone."""
  changes: dict[str, Any] = {
    part: c[part].to_dict() for part in ("vision", "decoder", "compressor")
  }
  changes["hybrid"] = c.hybrid.to_dict() if c.slow else None
  changes["lora"] = _lora_config(c.lora) if c.lora.rank else None
  return build_config(c.preset, changes)


def _lora_config(c: ml_collections.ConfigDict) -> LoraConfig:
  try:
    return LoraConfig(**c.to_dict() | {"modules": tuple(c.modules)})
  except (TypeError, ValueError) as error:
    raise UserError(f"model.lora: {error}") from error


def geometry_of(model: SlowFastConfig, data: Mapping[str, Any], place: str = "data.") -> Geometry:
  """Static shapes of the rows that this model is trained on.

  Args:
    model: what is trained.
    data: num_frames, decoder_length and text_bound.
    place: what stands before their names in errors.

  Raises:
    UserError: the bounds leave no room, or the strides do not fit the frames' token grid.
  """
  vision, compressor = model.vision, model.compressor
  # As SlowFast.encode does: only videos are pooled before the compressor.
  pooled = compressor.video_pooling_stride if data["num_frames"] > 1 else 1
  side = vision.side // pooled // compressor.spatial_stride
  if side < 1:
    raise UserError(
      f"model.compressor: strides {pooled} and {compressor.spatial_stride} leave nothing of "
      f"{vision.side} x {vision.side} tokens of a frame."
    )
  for field in ("num_frames", "decoder_length", "text_bound"):
    if data[field] < 1:
      raise UserError(f"{place}{field} must be at least 1, got {data[field]}.")
  geometry = Geometry(
    num_frames=data["num_frames"],
    decoder_length=data["decoder_length"],
    text_bound=data["text_bound"],
    image_size=(vision.image_size, vision.image_size),
    tokens_per_frame=side**2,
    sampling_stride=compressor.sampling_stride,
    temporal_stride=compressor.temporal_stride,
    min_fast_frames=compressor.min_fast_frames,
    query_set="text-only" if model.hybrid is None else model.hybrid.queries,
    pooled=pooled > 1,
    slow=bool(model.hybrid_layers),
  )
  fast = geometry.num_fast_tokens(geometry.num_frames)
  if fast >= geometry.decoder_length:
    raise UserError(
      f"{place}decoder_length is {geometry.decoder_length}, and the {fast} fast tokens of "
      f"{geometry.num_frames} frames leave no room in it for text; raise it, or compress more."
    )
  return geometry


def optimizer_config(c: ml_collections.ConfigDict) -> OptimizerConfig:
  """The optimiser's numbers: those of the config, and what follows from its other fields.

  Raises:
    UserError: there is no such field.
  """
  fields = c.optimizer.to_dict()
  known = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"total_steps"}
  if unknown := sorted(set(fields) - known):
    raise UserError(f"optimizer.{unknown[0]}: no such field; optimizer has {sorted(known)}.")
  groups = tuple(tuple(group) for group in fields.pop("groups", ()))
  if c.model.lora.rank:  # The decoder's own parameters stay as they are, whatever else learns.
    groups = ((rf"^decoder(?!.*{re.escape(LORA)})", 0.0), *groups)
  return OptimizerConfig(total_steps=c.train.steps, groups=groups, **fields)


def _check_train(c: ml_collections.ConfigDict) -> None:
  options_of(c)  # Which checks its own.
  for field, value, known in (
    ("train.dtype", c.train.dtype, DTYPES),
    ("train.remat", c.train.remat, REMAT),
    ("model.hybrid_init", c.model.hybrid_init, INITS),
  ):
    if value not in known:
      raise UserError(f"{field} must be one of {known}, got {value!r}.")
  if c.train.accumulation < 1:
    raise UserError(f"train.accumulation must be at least 1, got {c.train.accumulation}.")
  if any(len(option) != 2 for option in c.train.compiler_options):
    raise UserError(
      "train.compiler_options must be pairs of a name and a value, "
      f"got {tuple(c.train.compiler_options)}."
    )
  for field in ("frame_chunk", "z_loss"):
    if c.train[field] < 0:
      raise UserError(f"train.{field} must not be negative, got {c.train[field]}.")


def _check_rows(mesh: Mesh, batch_size: int, accumulation: int, place: str = "data.") -> None:
  """Every device must have as many rows of every part of a batch."""
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size < 1 or batch_size % (parts * accumulation):
    by = f" x train.accumulation = {parts * accumulation}" if accumulation > 1 else f" = {parts}"
    raise UserError(
      f"{place}batch_size must be a multiple of mesh.data x mesh.fsdp{by}, got {batch_size}."
    )


def _abstract_batch(geometry: Geometry, rows: int, mesh: Mesh) -> Batch:
  row = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, empty_row(geometry)))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh)),
    row,
  )


def _buckets(model: SlowFastConfig, data: Mapping[str, Any]) -> list[Bucket]:
  """The further shapes of data.buckets: (num_frames, decoder_length, text_bound, batch_size)."""
  names = ("num_frames", "decoder_length", "text_bound", "batch_size")
  buckets = []
  for i, shape in enumerate(data["buckets"]):
    if len(shape) != len(names):
      raise UserError(f"data.buckets[{i}] must be {names}, got {tuple(shape)}.")
    fields = dict(zip(names, shape))
    geometry = geometry_of(model, {**data, **fields}, _in_bucket(i))
    buckets.append(Bucket(geometry, fields["batch_size"]))
  return buckets


def _in_bucket(i: int) -> str:
  """What errors put before the name of a number of data.buckets."""
  return f"data.buckets[{i}]: "
