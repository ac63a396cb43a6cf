# SPDX-License-Identifier: Apache-2.0
"""What a training config names: records, tokenizer, and the state that a run starts from.

With `plan`, everything that a config can get wrong is found before anything is compiled.
"""

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export, VideoConfig
from slowfast_jax.checkpoints.open import load_checkpoint, open_checkpoint
from slowfast_jax.checkpoints.trees import flatten, unflatten
from slowfast_jax.data.mixture import open_mixture
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.tfds import open_records
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.hybrid import adapters_from_decoder
from slowfast_jax.models.lora import LORA, merge_lora
from slowfast_jax.models.slowfast import SlowFast, SlowFastConfig, abstract_params, graphdef_of
from slowfast_jax.shapes import Batch
from slowfast_jax.sharding import batch_sharding, sharded_init
from slowfast_jax.train.plan import Plan, make_plan
from slowfast_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Setup(Plan):
  """The parts of a run: its plan, and what that names.

  Attributes:
    tokenizer: the tokenizer of the text.
    pipeline: this process's rows of the batches.
    fingerprint: tells whether data are the same, wherever they lie.
    max_length, stop_ids: as of `Export`, those of `train.init_from`.
  """

  tokenizer: Tokenizer
  pipeline: TrainPipeline
  fingerprint: dict[str, Any]
  max_length: int | None
  stop_ids: tuple[int, ...]

  def export(self, params: nnx.State) -> Export:
    """The model that others open; what adapters have learned is in its kernels."""
    c = self.config
    video = VideoConfig(c.data.num_frames, c.video.sampler, c.video.target_fps, c.video.policy)
    model = dataclasses.replace(self.model, lora=None)
    if self.model.lora is not None:
      merged = merge_lora(flatten(params), self.model.lora)
      params = unflatten(abstract_params(model), merged)
    ends = self.max_length, self.stop_ids
    return Export(model, params, self.tokenizer, video, c.system, *ends)


def open_setup(config: ml_collections.ConfigDict) -> Setup:
  """Opens what the config names and checks that its parts fit each other.

  Raises:
    UserError: something does not exist or does not fit; names the field to change.
  """
  c, plan = config, make_plan(config)
  tokenizer = _open_tokenizer(c, plan.model)
  sources, weights = _open_records(c.data)
  index, count = local_rows(plan.mesh, c.data.batch_size)
  pipeline = TrainPipeline(
    sources,
    tokenizer,
    plan.geometry,
    c.data.batch_size,
    c.seed,
    process_index=index,
    process_count=count,
    read_threads=c.data.read_threads,
    system=c.system,
    targets=c.data.targets,
    weights=weights,
    pack=c.data.pack,
    buckets=plan.buckets,
    workers=c.data.workers,
    random_offset=c.data.random_offset,
    max_failure_rate=c.data.max_failure_rate,
  )
  fingerprint = {
    "records": sum(map(len, sources)),
    "samples": pipeline.num_samples,
    "bytes": sum(source.num_bytes for source in sources),
    "tokenizer": _digest(tokenizer),
  }
  if weights is not None:
    fingerprint["weights"] = weights
  start = open_checkpoint(c.train.init_from).export if c.train.init_from else None
  parts = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
  return Setup(
    **parts,
    tokenizer=tokenizer,
    pipeline=pipeline,
    fingerprint=fingerprint,
    max_length=None if start is None else start.max_length,
    stop_ids=() if start is None else start.stop_ids,
  )


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Which slice of a batch's rows this process's devices hold: (index, number of slices)."""
  places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  spans = {index[0].indices(batch_size)[:2] for index in places if index is not None}
  start, stop = min(s for s, _ in spans), max(s for _, s in spans)
  if sum(b - a for a, b in spans) != stop - start:
    raise UserError("mesh: the rows of a process do not lie together; change the axes' sizes.")
  return start // (stop - start), batch_size // (stop - start)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
  """This process's rows, as part of the global batch on the devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def check_batch(batch: Batch, pipeline: TrainPipeline) -> str:
  """Judges the first batch, before minutes are spent on compiling.

  Returns:
    What is wrong with some of its samples, or nothing.

  Raises:
    UserError: none of its samples can be learned from, so config and records do not fit.
  """
  rows, length = batch.tokens.shape
  learned = np.any(batch.loss_weights > 0, axis=1)
  if np.all(learned):
    return ""
  if pipeline.failures:
    failure = pipeline.failures[0]
    reason = f"record {failure.record} ({failure.id}): {failure.reason}"
  else:
    reason = f"their answers lie behind data.decoder_length = {length}; raise it"
  text = f"{rows - np.sum(learned)} of {rows} samples of the first batch teach nothing: {reason}"
  if np.any(learned):
    return text
  raise UserError(text)


def initial_state(setup: Setup) -> TrainState:
  """The state of step 0: from `train.init_from`, or random."""
  key = jax.random.key(setup.config.seed)
  folder = setup.config.train.init_from
  if not folder:
    return sharded_init(setup.init, setup.mesh, key, compiler_options=_quickly())
  abstract = setup.abstract_state()
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  # float32 whatever is stored: updates are too small for less.
  export = load_checkpoint(folder, setup.mesh, dtype="float32")
  # A checkpoint without a tokenizer is taken at its word.
  known = None if export.tokenizer is None else _digest(export.tokenizer)
  if known is not None and known != setup.fingerprint["tokenizer"]:
    raise UserError(
      f"train.init_from={folder} was trained with another tokenizer than data.tokenizer="
      f"{setup.config.data.tokenizer}, so its embeddings mean other words; leave data.tokenizer "
      "empty to take the one of the export."
    )
  wanted = flatten(abstract.params)
  given = {name: x for name, x in flatten(export.params).items() if name in wanted}
  _check_fits(folder, given, wanted)

  def init(given: dict[str, jax.Array], key: jax.Array) -> TrainState:
    state = setup.init(key)  # What is replaced below is never computed: XLA drops it.
    fresh = flatten(state.params)
    params = unflatten(state.params, {name: given.get(name, fresh[name]) for name in fresh})
    if export.model.hybrid is None and setup.model.hybrid_layers:
      reference = setup.config.model.hybrid_init == "reference"
      params = _start_adapters(setup.model, params, reference=reference)
    return dataclasses.replace(state, params=params)

  # Donated: the parameters are never there twice.
  jitted = jax.jit(init, out_shardings=shardings, donate_argnums=0, compiler_options=_quickly())
  return jitted(given, key)


def _quickly() -> dict[str, Any]:
  """A program that runs once: optimising it takes five times as long as all the rest on a CPU."""
  return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def _start_adapters(model: SlowFastConfig, params: nnx.State, *, reference: bool) -> nnx.State:
  merged: SlowFast = nnx.merge(graphdef_of(model), params)
  assert merged.adapters is not None
  adapters_from_decoder(merged.adapters, merged.decoder, model.hybrid_layers, reference=reference)
  return nnx.state(merged)


def _check_fits(folder: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """All but hybrid parts and LoRA must come from the export, in the shape that this model has."""
  partly = any(name.startswith("adapters.") for name in given)
  fresh = (LORA,) if partly else (LORA, "adapters.")
  missing = [n for n in wanted if n not in given and not any(part in n for part in fresh)]
  if missing:
    raise UserError(f"train.init_from={folder}: it has no {missing[0]}; the models differ.")
  for name in wanted:
    if name in given and given[name].shape != wanted[name].shape:
      raise UserError(
        f"train.init_from={folder}: {name} has shape {given[name].shape} and this model needs "
        f"{wanted[name].shape}; make the fields of `model` the same."
      )


def num_params(abstract: Any) -> int:
  """How many numbers a tree of arrays, or of their shapes, holds."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def _open_tokenizer(c: ml_collections.ConfigDict, model: SlowFastConfig) -> Tokenizer:
  # An export has its tokenizer's files beside its config.
  folder = c.data.tokenizer or c.train.init_from
  folder = _required(folder, "data.tokenizer", "a folder with tokenizer.json")
  tokenizer = Tokenizer.from_dir(folder)
  if tokenizer.vocab_size > model.decoder.vocab_size:
    raise UserError(
      f"model.decoder.vocab_size is {model.decoder.vocab_size}, and the tokenizer {folder} has "
      f"{tokenizer.vocab_size} ids; raise it to at least that."
    )
  return tokenizer


def _open_records(data: Mapping[str, Any]) -> tuple[list[RecordSource], list[float] | None]:
  """The sources of data.mixture, or data.records: one folder, or several with commas between."""
  mixture = data["mixture"]
  if mixture and data["records"]:
    raise UserError("data.records and data.mixture are both given; leave one of them empty.")
  if mixture:
    return open_mixture(mixture)
  folders = _required(data["records"], "data.records", "a folder of records")
  return [open_records(folder) for folder in folders.split(",")], None


def _required(value: str, field: str, what: str) -> str:
  if not value:
    raise UserError(f"{field} is empty; give {what}: --config.{field}=DIR")
  return value


def _digest(tokenizer: Tokenizer) -> str:
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()
