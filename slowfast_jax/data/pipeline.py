# SPDX-License-Identifier: Apache-2.0
"""The training input: records to batches with Grain; batch n is a function of (seed, n) alone.

Nothing has to be saved to resume: the step says which samples come next, on any number of
processes. Each process decodes and builds only its own rows of the global batch.
"""

import atexit
import contextlib
import dataclasses
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from slowfast_jax.data.chat import SYSTEM_PROMPT, encode_chat
from slowfast_jax.data.packing import Geometry, Sample, build_row, collate, empty_row
from slowfast_jax.data.records import Record, decode_frames
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch

# So many bad samples in a row are no accident: the records do not fit the configuration.
FAILURES_IN_A_ROW = 32


@runtime_checkable
class Source(Protocol):
  """What the pipeline needs of a `RecordSource`."""

  index: Int[np.ndarray, "n 2"]

  def __getitem__(self, i: int) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Failure:
  """A sample that could not be used; its row of the batch is padding.

  Attributes:
    position: of the sample in the endless stream, from 0 at step 0.
    record: number of the record in its source.
    conversation: number of the conversation in the record.
    id: of the record; empty where it could not even be read.
    reason: the error's message.
  """

  position: int
  record: int
  conversation: int
  id: str
  reason: str


@dataclasses.dataclass(frozen=True)
class SampleOrder:
  """The endless stream of samples: every epoch is a new permutation of the conversations."""

  num_samples: int
  seed: int

  def __getitem__(self, position: int) -> int:
    epoch, i = divmod(position, self.num_samples)
    # Hashed, not added: else epoch 1 of seed 0 would be epoch 0 of seed 1.
    epoch_seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
    return grain.experimental.index_shuffle(
      i, max_index=self.num_samples - 1, seed=epoch_seed, rounds=4
    )


@dataclasses.dataclass(frozen=True)
class _LocalPositions:
  """Grain's source: positions in the stream that this process builds, from a step on."""

  batch_size: int
  rows: range
  start_step: int

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, i: int) -> int:
    step, row = divmod(int(i), len(self.rows))
    return (self.start_step + step) * self.batch_size + self.rows[row]


class TrainPipeline:
  """Batches of single samples, each with its video.

  Attributes:
    num_samples: samples of an epoch, one for each conversation of the source.
    num_failures: samples so far, in the batches handed out, whose row is padding.
    failures: the first hundred of them.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    geometry: Geometry,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int = 2,
    system: str = SYSTEM_PROMPT,
    targets: str = "assistant",
  ):
    """Prepares to read; nothing is opened yet.

    Args:
      source: records and the (record, conversation) pairs of an epoch.
      tokenizer: a ChatML tokenizer.
      geometry: static shapes of a row.
      batch_size: rows of the global batch, of all processes together.
      seed: of the order of the samples, not negative.
      process_index: which slice of the rows is built here.
      process_count: how many slices there are; must divide batch_size.
      read_threads: threads that read and decode; 0 reads when a batch is asked for.
      system: system prompt of conversations that bring none.
      targets: which tokens are learned, see `encode_chat`.
    """
    if batch_size < 1 or batch_size % process_count:
      raise UserError(
        f"batch_size must be a positive multiple of the number of processes ({process_count}), "
        f"got {batch_size}."
      )
    if seed < 0:
      raise UserError(f"seed must not be negative, got {seed}.")
    if len(source.index) == 0:
      raise UserError("The records hold no conversation to train on.")
    self.num_samples = len(source.index)
    self.num_failures = 0
    self.failures: list[Failure] = []
    self._source, self._tokenizer, self._geometry = source, tokenizer, geometry
    self._batch_size, self._read_threads = batch_size, read_threads
    self._system, self._targets = system, targets
    self._order = SampleOrder(self.num_samples, seed)
    local = batch_size // process_count
    self._rows = range(process_index * local, (process_index + 1) * local)

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
    self._failed_in_a_row = 0
    with contextlib.closing(iter(self._dataset(start_step))) as iterator:
      for batch, failures in iterator:
        for failure in failures:
          self._count(failure)
        yield batch

  def _dataset(self, start_step: int) -> grain.IterDataset:
    rows = len(self._rows)
    # Grain's default buffers 500 elements: gigabytes of frames.
    buffered = max(rows, 2 * self._read_threads)
    options = grain.ReadOptions(num_threads=self._read_threads, prefetch_buffer_size=buffered)
    positions = _LocalPositions(self._batch_size, self._rows, start_step)
    dataset = grain.MapDataset.source(positions).map(self._load).to_iter_dataset(options)
    dataset = dataset.batch(rows, drop_remainder=True, batch_fn=_collate)
    if self._read_threads == 0:
      return dataset
    # Collating copies every frame: one batch ahead, away from the thread that trains.
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)

  def _load(self, position: int) -> tuple[Batch, Failure | None]:
    """The row of a sample. Never raises: Grain would lose its place in the stream."""
    record_index, conversation = map(int, self._source.index[self._order[position]])
    record_id = ""
    try:
      record = self._source[record_index]
      record_id = record.id
      return build_row([self._sample(record, conversation)], self._geometry), None
    except Exception as error:
      reason = f"{type(error).__name__}: {error}"
      failure = Failure(position, record_index, conversation, record_id, reason)
      return empty_row(self._geometry), failure

  def _sample(self, record: Record, conversation: int) -> Sample:
    turns = record.conversations[conversation]
    num_media = 1 if record.frames else 0
    chat = encode_chat(self._tokenizer, turns, self._system, self._targets, num_media)
    if not record.frames:
      return Sample(chat.ids, chat.loss_mask)
    return Sample(chat.ids, chat.loss_mask, (len(record.frames),), decode_frames(record))

  def _count(self, failure: Failure | None) -> None:
    if failure is None:
      self._failed_in_a_row = 0
      return
    self.num_failures += 1
    self._failed_in_a_row += 1
    name = f"record {failure.record} ({failure.id or 'unreadable'})"
    if len(self.failures) < 100:
      self.failures.append(failure)
      logging.warning(
        "Left out %s, conversation %d: %s", name, failure.conversation, failure.reason
      )
    if self._failed_in_a_row == FAILURES_IN_A_ROW:
      raise UserError(
        f"{FAILURES_IN_A_ROW} samples in a row could not be used; the last was {name}, "
        f"conversation {failure.conversation}: {failure.reason}"
      )


def _collate(
  elements: Sequence[tuple[Batch, Failure | None]],
) -> tuple[Batch, list[Failure | None]]:
  rows, failures = zip(*elements)
  return collate(rows), list(failures)


def _close(batches: weakref.ref) -> None:
  generator = batches()
  if generator is not None:
    with contextlib.suppress(ValueError):  # Another thread is in it: then that thread's to close.
      generator.close()
