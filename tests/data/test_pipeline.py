# SPDX-License-Identifier: Apache-2.0
"""The training pipeline: what comes when, whoever asks, and what becomes of a damaged record."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg

from slowfast_jax.data.failures import IN_A_ROW, WINDOW
from slowfast_jax.data.packing import Geometry, collate
from slowfast_jax.data.pipeline import SampleOrder, TrainPipeline
from slowfast_jax.data.records import Record
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import Batch

TOKENIZER = train_tokenizer(["You are a helpful assistant.", "system user number"] * 9, 300)
GEOMETRY = Geometry(
  num_frames=2,
  decoder_length=48,
  text_bound=48,
  image_size=(8, 8),
  tokens_per_frame=1,
  temporal_stride=1,
)
NUM_RECORDS, NUM_SAMPLES, BATCH_SIZE = 5, 7, 4


def record(i, num_frames=2):
  image = np.full((8, 8, 3), 40 * i, np.uint8)
  jpeg = simplejpeg.encode_jpeg(image, quality=95)
  return Record(
    id=f"video{i}",
    source="",
    frames=[jpeg] * num_frames,
    timestamps=np.arange(num_frames, dtype=np.float32),
    frame_indices=np.arange(num_frames, dtype=np.int32),
    duration=1.0,
    fps=1.0,
    num_video_frames=num_frames,
    height=8,
    width=8,
    conversations=[
      [{"from": "human", "value": "<video>\nnumber"}, {"from": "gpt", "value": f"{i}{letter}"}]
      for letter in "ab"
    ],
    metadata={"kind": "video"},
  )


class FakeSource:
  """Five videos; the first two have two conversations."""

  def __init__(self, **replaced):
    self.index = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [3, 0], [4, 0]], np.int32)
    self.records = {i: record(i) for i in range(NUM_RECORDS)}
    self.records |= {int(name[1:]): value for name, value in replaced.items()}

  def __getitem__(self, i):
    if isinstance(self.records[i], Exception):
      raise self.records[i]
    return self.records[i]


def pipeline(source=None, geometry=GEOMETRY, batch_size=BATCH_SIZE, **options):
  options = {"seed": 3, "read_threads": 0} | options
  return TrainPipeline(source or FakeSource(), TOKENIZER, geometry, batch_size, **options)


def take(batches, count):
  return list(itertools.islice(batches, count))


def answers(batch):
  """The learned text of every row: the record's number and the conversation's letter."""
  rows = [targets[weights > 0] for targets, weights in zip(batch.targets, batch.loss_weights)]
  return [TOKENIZER.decode(row.tolist()) for row in rows]


def assert_equal(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected):
    for field in dataclasses.fields(Batch):
      np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


def test_the_order_is_pinned():
  """Changing it would change what an interrupted run trains on after the next release."""
  order = SampleOrder(NUM_SAMPLES, seed=3)
  assert [order[i] for i in range(14)] == [0, 3, 1, 2, 4, 5, 6, 4, 6, 0, 2, 5, 3, 1]
  batches = take(pipeline().iterate(), 2)
  assert [answers(batch) for batch in batches] == [
    ["0a", "1b", "0b", "1a"],
    ["2a", "3a", "4a", "2a"],
  ]


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_every_epoch_is_another_permutation(num_samples):
  order = SampleOrder(num_samples, seed=0)
  epochs = [[order[epoch * num_samples + i] for i in range(num_samples)] for epoch in range(6)]
  assert all(sorted(epoch) == list(range(num_samples)) for epoch in epochs)
  if num_samples >= 7:
    assert len(set(map(tuple, epochs))) == 6


def test_seeds_are_not_shifted_epochs_of_each_other():
  first, second = SampleOrder(50, seed=0), SampleOrder(50, seed=1)
  assert [first[50 + i] for i in range(50)] != [second[i] for i in range(50)]


def test_a_row_has_its_own_video():
  (batch,) = take(pipeline().iterate(), 1)
  numbers = [int(answer[0]) for answer in answers(batch)]
  np.testing.assert_array_equal(batch.frames[:, 0, 0, 0, 0], [40 * n for n in numbers])
  assert batch.frames.shape == (BATCH_SIZE, 2, 8, 8, 3)


def test_resuming_at_a_step_gives_the_same_batches():
  batches = take(pipeline().iterate(), 6)
  assert_equal(take(pipeline().iterate(start_step=4), 2), batches[4:])
  # The same object again, after others have been handed out.
  resumed = pipeline()
  take(resumed.iterate(), 3)
  assert_equal(take(resumed.iterate(start_step=1), 5), batches[1:])


@pytest.mark.parametrize("read_threads", [1, 3])
def test_threads_change_nothing(read_threads):
  expected = take(pipeline().iterate(start_step=2), 8)
  assert_equal(take(pipeline(read_threads=read_threads).iterate(start_step=2), 8), expected)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_build_slices_of_the_same_batch(process_count):
  expected = take(pipeline().iterate(start_step=1), 4)
  parts = [
    take(pipeline(process_index=i, process_count=process_count).iterate(start_step=1), 4)
    for i in range(process_count)
  ]
  assert all(len(batch.tokens) == BATCH_SIZE // process_count for batch in parts[0])
  assert_equal([collate(slices) for slices in zip(*parts)], expected)


def test_a_batch_may_be_larger_than_the_data():
  (batch,) = take(pipeline(batch_size=16).iterate(), 1)
  assert sorted(answers(batch)[:7]) == sorted(answers(batch)[7:14])


def damaged(i):
  good = record(i)
  return dataclasses.replace(good, frames=[good.frames[0], good.frames[1][:200]])


@pytest.mark.parametrize(
  ("broken", "record_id", "reason"),
  [
    (damaged(2), "video2", "RecordsError"),
    (record(2, num_frames=3), "video2", "num_frames is 2 and the row needs 3"),
    (
      dataclasses.replace(record(2), frames=[]),
      "video2",
      r"1 placeholder(s) <image>/<video> for 0",
    ),
    (dataclasses.replace(record(2), conversations=[]), "video2", "IndexError"),
    (OSError("a flipped byte"), "", "OSError: a flipped byte"),
  ],
)
def test_a_bad_record_is_a_row_of_padding(broken, record_id, reason):
  expected = take(pipeline().iterate(), 2)
  tested = pipeline(FakeSource(_2=broken), read_threads=2)
  batches = take(tested.iterate(), 2)
  assert_equal(batches[:1], expected[:1])
  assert answers(batches[1]) == ["", "3a", "4a", ""]
  for row in (0, 3):
    assert not any(
      getattr(batches[1], name)[row].any()
      for name in ("tokens", "kind", "segments", "loss_weights", "frame_segments", "pooling")
    )
    assert (batches[1].text_index[row] == -1).all()
  for field in dataclasses.fields(Batch):
    got, want = getattr(batches[1], field.name), getattr(expected[1], field.name)
    np.testing.assert_array_equal(got[1:3], want[1:3])
  assert tested.num_failures == 2
  assert [failure.position for failure in tested.failures] == [4, 7]
  failure = tested.failures[0]
  assert (failure.record, failure.conversation, failure.id) == (2, 0, record_id)
  assert reason in failure.reason


def test_samples_read_ahead_are_not_counted_yet():
  tested = pipeline(FakeSource(_2=damaged(2)), read_threads=2)
  batches = tested.iterate()
  next(batches)
  time.sleep(0.1)
  assert tested.num_failures == 0


def test_an_iterator_left_open_does_not_disturb_the_exit():
  code = "import test_pipeline as t; b = t.pipeline(read_threads=2).iterate(); next(b)"
  here = pathlib.Path(__file__).parent
  path = os.pathsep.join([str(here), str(here.parent.parent)])
  environment = os.environ | {"PYTHONPATH": path}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert "Exception" not in done.stderr


def test_nothing_but_failures_is_an_error():
  small = dataclasses.replace(GEOMETRY, image_size=(4, 4))
  tested = pipeline(geometry=small, read_threads=2)
  steps = IN_A_ROW // BATCH_SIZE
  with pytest.raises(UserError, match=r"samples in a row could not be used.*\(2, 4, 4, 3\), got"):
    take(tested.iterate(), steps)


def test_scattered_failures_stop_a_run_above_the_set_rate():
  """Two samples of seven are bad: the 101st bad one is above a tenth of the window."""
  steps = 2 * WINDOW // BATCH_SIZE
  allowed = pipeline(FakeSource(_2=damaged(2), _3=damaged(3)), max_failure_rate=0.3)
  take(allowed.iterate(), steps)
  assert allowed.num_failures == pytest.approx(2 / 7 * steps * BATCH_SIZE, abs=4)
  tested = pipeline(FakeSource(_2=damaged(2), _3=damaged(3)), max_failure_rate=0.1)
  words = r"101 of the latest \d+ samples .*data.max_failure_rate = 0.1 of 1000.*\(video[23]\)"
  with pytest.raises(UserError, match=words):
    take(tested.iterate(), steps)
  assert {failure.id for failure in tested.failures} == {"video2", "video3"}


def test_a_rate_of_zero_stops_at_the_first_failure():
  with pytest.raises(UserError, match="1 of the latest"):
    take(pipeline(FakeSource(_2=damaged(2)), max_failure_rate=0.0).iterate(), 3)


def test_without_random_offset_too_many_frames_are_an_error_and_with_it_a_choice():
  def shade(i):
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), 30 * i, np.uint8), quality=95)

  long = dataclasses.replace(record(2), frames=[shade(i) for i in range(8)])
  source = FakeSource(**{f"_{i}": long for i in range(NUM_RECORDS)})
  with pytest.raises(UserError, match="num_frames is 2 and the row needs 8"):
    take(pipeline(source).iterate(), IN_A_ROW // BATCH_SIZE)
  batches = take(pipeline(source, random_offset=True).iterate(), 50)
  pairs = {
    tuple(round(v / 30) for v in row) for b in batches for row in b.frames[:, :, 4, 4, 0].tolist()
  }
  assert pairs == {(i, i + 4) for i in range(4)}, "evenly spaced, from every offset"
  again = take(pipeline(source, random_offset=True).iterate(start_step=30), 20)
  assert_equal(again, batches[30:])


def test_text_without_a_video_trains_too():
  text = dataclasses.replace(
    record(2),
    frames=[],
    conversations=[[{"from": "human", "value": "number"}, {"from": "gpt", "value": "text"}]],
  )
  batch = take(pipeline(FakeSource(_2=text)).iterate(), 2)[1]
  assert answers(batch) == ["text", "3a", "4a", "text"]
  assert (batch.text_index[0] == -1).all()
  assert not batch.frame_segments[0].any()


def test_options_reach_the_text():
  default = take(pipeline().iterate(), 1)[0]
  brief = take(pipeline(system="user").iterate(), 1)[0]
  assert (brief.kind > 0).sum() < (default.kind > 0).sum()
  reference = take(pipeline(targets="reference").iterate(), 1)[0]
  assert reference.loss_weights.sum() > default.loss_weights.sum()


def test_wrong_arguments_are_named():
  with pytest.raises(UserError, match=r"multiple of the number of processes \(3\), got 4"):
    pipeline(process_count=3)
  with pytest.raises(UserError, match="seed must not be negative, got -1"):
    pipeline(seed=-1)
  empty = FakeSource()
  empty.index = empty.index[:0]
  with pytest.raises(UserError, match="no conversation"):
    pipeline(empty)
