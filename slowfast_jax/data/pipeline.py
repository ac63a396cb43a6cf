# SPDX-License-Identifier: Apache-2.0
"""The training input: records to batches with Grain; batch n is a function of (seed, n) alone.

Nothing has to be saved to resume: the step says which samples come next, on any number of
processes. Each process decodes and builds only its own rows of the global batch. Several sources
are mixed by weight, short samples share rows, and steps may have one of several shapes.
"""

import atexit
import contextlib
import dataclasses
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from slowfast_jax.data.augment import offset_frames, sample_seed
from slowfast_jax.data.chat import SYSTEM_PROMPT, encode_chat
from slowfast_jax.data.failures import Failure, FailureCounter
from slowfast_jax.data.mixture import SampleOrder
from slowfast_jax.data.needs import TextSource, count_lengths
from slowfast_jax.data.packing import Geometry, Sample, build_row, collate, empty_row
from slowfast_jax.data.records import Record, decode_frames
from slowfast_jax.data.rows import Bucket, Rows, Schedule, plan_rows, single_rows
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.data.workers import follow_parent
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch

__all__ = ["Bucket", "Failure", "SampleOrder", "Source", "TrainPipeline"]


@runtime_checkable
class Source(Protocol):
  """What the pipeline needs of a `RecordSource`."""

  index: Int[np.ndarray, "n 2"]

  def __getitem__(self, i: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """A sample, or the failure that it is; of a sample, what its failure would be called."""

  failure: Failure
  sample: Sample | None = None


@jax.tree_util.register_dataclass  # So that its arrays leave a worker process in shared memory.
@dataclasses.dataclass(frozen=True)
class _Row:
  """A row, and for each of its samples None or the failure; no batch, where a step has fewer."""

  batch: Batch | None
  failures: list[Failure | None]


@dataclasses.dataclass(frozen=True)
class _LocalRows:
  """Grain's source: (step, row) of what this process builds, from a step on.

  Every step has as many elements as the bucket with the most rows needs.
  """

  rows_per_step: int
  start_step: int

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, i: int) -> tuple[int, int]:
    step, row = divmod(int(i), self.rows_per_step)
    return self.start_step + step, row


class TrainPipeline:
  """Batches of samples, each with its video.

  Attributes:
    num_samples: conversations of all sources.
    schedule: what every step holds.
  """

  def __init__(
    self,
    source: Source | Sequence[Source],
    tokenizer: Tokenizer,
    geometry: Geometry,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 2,
    system: str = SYSTEM_PROMPT,
    targets: str = "assistant",
    weights: Sequence[float] | None = None,
    pack: bool = False,
    buckets: Sequence[Bucket] = (),
    workers: int = 0,
    random_offset: bool = False,
    max_failure_rate: float = 1.0,
  ):
    """Prepares to read. Packing and buckets count the tokens of all samples first.

    Args:
      source: records and the (record, conversation) pairs of an epoch; or several such.
      tokenizer: a ChatML tokenizer.
      geometry: static shapes of a row.
      batch_size: rows of the global batch, of all processes together.
      seed: of the order of the samples, not negative.
      process_index: which slice of the rows is built here.
      process_count: how many slices there are; must divide batch_size.
      read_threads: threads that read and decode; 0 reads when a batch is asked for.
      system: system prompt of conversations that bring none.
      targets: which tokens are learned, see `encode_chat`.
      weights: how often the samples of each source come, relative to each other's; None = by the
        sizes of the sources.
      pack: put several short samples in a row.
      buckets: smaller shapes, for the samples that fit them whole; the first that fits is taken.
        Each step has the shape of one bucket, which follows from its number alone.
      workers: processes that read and build rows, each with `read_threads`; 0 = this one does.
        Changes speed, never batches. A script needs `if __name__ == "__main__":` around its use.
      random_offset: of records with more frames than a row takes, show some at a random offset,
        another one in each epoch; see `offset_frames`.
      max_failure_rate: the share of bad samples that ends the run, see `FailureCounter`.
    """
    self._buckets = [*buckets, Bucket(geometry, batch_size)]
    batch_sizes = [bucket.batch_size for bucket in self._buckets]
    _check_numbers(
      batch_sizes, process_count, seed=seed, read_threads=read_threads, workers=workers
    )
    self._sources = list(source) if isinstance(source, Sequence) else [source]
    if weights is None:
      weights = [float(len(source.index)) for source in self._sources]
    if len(weights) != len(self._sources):
      raise UserError(f"There are {len(self._sources)} sources and {len(weights)} weights.")
    self.num_samples = sum(len(source.index) for source in self._sources)
    self._counter = FailureCounter(max_failure_rate)
    self._tokenizer, self._read_threads, self._workers = tokenizer, read_threads, workers
    self._seed, self._random_offset = seed, random_offset
    self._system, self._targets = system, targets
    self._process_index, self._process_count = process_index, process_count
    rows = [self._plan(source, pack, seed) for source in self._sources]
    self.schedule = Schedule(rows, weights, batch_sizes, seed)

  @property
  def num_failures(self) -> int:
    """Samples so far, in the batches handed out, that could not be used."""
    return self._counter.total

  @property
  def failures(self) -> list[Failure]:
    """The first hundred of them."""
    return self._counter.first

  def empty_batches(self) -> list[Batch]:
    """This process's rows without a sample: a batch of every shape that steps have."""
    used = {bucket: self._buckets[bucket].geometry for bucket in self.schedule.used}
    return [collate([empty_row(used[i])] * self._local_rows(i)) for i in used]

  def records_of(self, step: int) -> list[dict[str, Any]]:
    """Which records a step shows, of all processes together: source, record, conversation, id."""
    place = self.schedule.place(step)
    rows = self._buckets[place.bucket].batch_size
    found: list[dict[str, Any]] = []
    for position in range(place.ordinal * rows, (place.ordinal + 1) * rows):
      source, numbers = self.schedule.row(place.bucket, position)
      for number in numbers:
        record, conversation = map(int, self._sources[source].index[number])
        path = str(getattr(self._sources[source], "path", ""))
        name = {"source": path, "record": record, "conversation": conversation}
        found.append(name | {"id": self._id(source, record)})
    return found

  def _id(self, source: int, record: int) -> str:
    try:
      return self._sources[source][record].id
    except Exception:  # Told by its number alone.
      return ""

  def _plan(self, source: Source, pack: bool, seed: int) -> list[Rows]:
    if not pack and len(self._buckets) == 1:
      return [single_rows(len(source.index))]
    if not isinstance(source, TextSource):
      raise UserError(f"{source} cannot tell its texts, which packing and buckets need.")
    lengths = count_lengths(source, self._tokenizer, self._system, self._targets)
    if self._random_offset:
      shown = np.minimum(lengths.frames, self._num_frames)
      lengths = dataclasses.replace(lengths, frames=shown)
    return plan_rows(lengths, [bucket.geometry for bucket in self._buckets], pack, seed)

  def iterate(self, start_step: int = 0) -> Iterator[Batch]:
    """This process's rows of every batch from `start_step` on, without end.

    Raises:
      UserError: no sample can be used, so the records and the configuration do not fit.
    """
    batches = self._batches(start_step)
    # Left open until the interpreter ends, Grain's iterators trip over modules that are gone.
    atexit.register(_close, weakref.ref(batches))
    return batches

  def _batches(self, start_step: int) -> Generator[Batch, None, None]:
    self._counter.restart()
    with contextlib.closing(iter(self._dataset(start_step))) as iterator:
      for batch, failures in self._watched(iterator):
        for failure in failures:
          self._counter.add(failure)
        yield batch

  def _watched(self, iterator: Iterator[tuple]) -> Iterator[tuple]:
    try:
      yield from iterator
    except RuntimeError as error:  # What Grain raises when a worker is gone.
      if not self._workers:
        raise
      raise UserError(
        f"One of data.workers = {self._workers} processes that read data has ended ({error}). Out "
        "of memory? Give fewer, or 0; the same command goes on where this run stopped."
      ) from error

  def _dataset(self, start_step: int) -> grain.IterDataset:
    rows = max(self._local_rows(bucket) for bucket in self.schedule.used)
    # Grain's default buffers 500 elements: gigabytes of frames.
    buffered = max(rows, 2 * self._read_threads)
    options = grain.ReadOptions(num_threads=self._read_threads, prefetch_buffer_size=buffered)
    dataset = grain.MapDataset.source(_LocalRows(rows, start_step)).map(self._load)
    dataset = dataset.to_iter_dataset(options)
    if self._workers:
      dataset = self._spread_over_workers(dataset, rows)
    # Only now: batches that the workers make would depend on their number.
    dataset = dataset.batch(rows, drop_remainder=True, batch_fn=_collate)
    if self._read_threads == self._workers == 0:
      return dataset
    # Collating copies every frame: one batch ahead, away from the thread that trains.
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)

  def _spread_over_workers(self, dataset: grain.IterDataset, rows: int) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():  # Grain reads its own, which only absl's programs have parsed.
      flags.FLAGS.mark_as_parsed()
    ahead = max(rows // self._workers, 1)
    options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=ahead)
    return dataset.mp_prefetch(options, worker_init_fn=_begin_worker)

  @property
  def _num_frames(self) -> int:
    return self._buckets[-1].geometry.num_frames

  def _local_rows(self, bucket: int) -> int:
    return self._buckets[bucket].batch_size // self._process_count

  def _load(self, where: tuple[int, int]) -> _Row:
    """A row of a step. Never raises: Grain would lose its place."""
    step, row = where
    place = self.schedule.place(step)
    local = self._local_rows(place.bucket)
    if row >= local:
      return _Row(None, [])  # Not None: Grain would leave it out.
    row += self._process_index * local
    position = place.ordinal * self._buckets[place.bucket].batch_size + row
    source, numbers = self.schedule.row(place.bucket, position)
    epoch = self.schedule.epoch(place.bucket, position)
    loaded = [self._load_sample(position, source, number, epoch) for number in numbers]
    return self._build(loaded, self._buckets[place.bucket].geometry)

  def _load_sample(self, position: int, source: int, number: int, epoch: int = 0) -> _Loaded:
    record_index, conversation = map(int, self._sources[source].index[number])
    path = str(getattr(self._sources[source], "path", "")) if len(self._sources) > 1 else ""
    failure = Failure(position, record_index, conversation, "", "", path)
    try:
      record = self._sources[source][record_index]
      failure = dataclasses.replace(failure, id=record.id)
      if self._random_offset:
        seed = sample_seed(self._seed, source, number, epoch)
        chosen = offset_frames(len(record.frames), self._num_frames, seed)
        record = dataclasses.replace(record, frames=[record.frames[i] for i in chosen])
      return _Loaded(failure, self._sample(record, conversation))
    except Exception as error:
      return _Loaded(dataclasses.replace(failure, reason=_reason(error)))

  def _build(self, loaded: Sequence[_Loaded], geometry: Geometry) -> _Row:
    """The row of all samples that can be used."""
    try:
      samples = [one.sample for one in loaded if one.sample is not None]
      row = build_row(samples, geometry) if samples else empty_row(geometry)
      return _Row(row, [None if one.sample else one.failure for one in loaded])
    except Exception as error:
      if len(samples) == 1:
        failed: list[Failure | None] = [
          dataclasses.replace(one.failure, reason=_reason(error)) if one.sample else one.failure
          for one in loaded
        ]
        return _Row(empty_row(geometry), failed)
    # One spoils all: find out which, each alone in a row.
    alone = [self._build([one], geometry).failures[0] if one.sample else None for one in loaded]
    judged = [one if failure is None else _Loaded(failure) for one, failure in zip(loaded, alone)]
    if not any(alone):  # They fit one by one, not together: their texts are not what was counted.
      reason = "its row overflows, for the records' texts have changed; prepare them again"
      judged = [
        _Loaded(dataclasses.replace(one.failure, reason=reason)) if one.sample else one
        for one in loaded
      ]
    return self._build(judged, geometry)

  def _sample(self, record: Record, conversation: int) -> Sample:
    turns = record.conversations[conversation]
    num_media = 1 if record.frames else 0
    chat = encode_chat(self._tokenizer, turns, self._system, self._targets, num_media)
    if not record.frames:
      return Sample(chat.ids, chat.loss_mask)
    return Sample(chat.ids, chat.loss_mask, (len(record.frames),), decode_frames(record))


def _check_numbers(batch_sizes: Sequence[int], process_count: int, **not_negative: int) -> None:
  for size in batch_sizes:
    if size < 1 or size % process_count:
      raise UserError(
        f"batch_size must be a positive multiple of the number of processes ({process_count}), "
        f"got {size}."
      )
  for name, value in not_negative.items():
    if value < 0:
      raise UserError(f"{name} must not be negative, got {value}.")


def _reason(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"


def _collate(rows: Sequence[_Row]) -> tuple[Batch, list[Failure | None]]:
  failures = [failure for row in rows for failure in row.failures]
  # Views of the plain class: a worker's arrays carry their shared memory with them.
  batches = [jax.tree.map(np.asarray, row.batch) for row in rows if row.batch is not None]
  return collate(batches), failures


def _begin_worker(index: int, count: int) -> None:
  del index, count
  follow_parent()  # Grain's own would outlive a trainer that is killed.


def _close(batches: weakref.ref) -> None:
  generator = batches()
  if generator is not None:
    with contextlib.suppress(ValueError):  # Another thread is in it: then that thread's to close.
      generator.close()
