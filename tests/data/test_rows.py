# SPDX-License-Identifier: Apache-2.0
"""Packing and buckets: which samples share rows and steps, decided before the first step."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from slowfast_jax.data.mixture import Draws
from slowfast_jax.data.needs import Lengths, capacity, count_lengths, needs_of
from slowfast_jax.data.packing import Geometry, build_row
from slowfast_jax.data.pipeline import Bucket, TrainPipeline
from slowfast_jax.data.records import RecordSource, decode_frames, text_of
from slowfast_jax.data.rows import Rows, Schedule, plan_rows, single_rows
from slowfast_jax.errors import UserError
from tests.data.test_pipeline import TOKENIZER, record, take
from tests.train.tiny_run import write_records

GEOMETRY = Geometry(
  num_frames=8,
  decoder_length=256,
  text_bound=200,
  image_size=(8, 8),
  tokens_per_frame=4,
  temporal_stride=1,
  min_fast_frames=1,
)
SMALL = dataclasses.replace(GEOMETRY, num_frames=1, decoder_length=64, max_fast_frames=0)


def some_lengths(num_samples=3000, seed=0) -> Lengths:
  """Texts, images and short videos."""
  rng = np.random.default_rng(seed)
  frames = rng.choice([0, 1, 2, 8], num_samples, p=[0.4, 0.3, 0.2, 0.1])
  text = rng.integers(10, 120, num_samples)
  return Lengths(text, np.full(num_samples, 5), text * 2 // 3, frames)


def all_of(rows: Rows) -> list[int]:
  return [i for row in range(len(rows)) for i in rows[row]]


def test_packing_keeps_every_sample_once_and_every_bound():
  lengths = some_lengths()
  (rows,) = plan_rows(lengths, [GEOMETRY], True, seed=1)
  assert sorted(all_of(rows)) == list(range(3000))
  wanted = needs_of(lengths, GEOMETRY).stacked()
  for row in range(len(rows)):
    assert (wanted[rows[row]].sum(axis=0) <= capacity(GEOMETRY)).all()


def filled(lengths, rows):
  """The share of the rows' decoder positions that hold something."""
  positions, bounds = needs_of(lengths, GEOMETRY).stacked()[:, 0], capacity(GEOMETRY)[0]
  return np.minimum(positions[rows.samples], bounds).sum() / (bounds * len(rows))


def test_packed_rows_are_full():
  lengths = some_lengths()
  (packed,) = plan_rows(lengths, [GEOMETRY], True, seed=1)
  assert filled(lengths, single_rows(3000)) < 0.35
  assert filled(lengths, packed) >= 0.92
  assert len(packed.samples) / len(packed) > 2.5


def test_packing_depends_on_the_seed_alone():
  first, again, other = (
    all_of(plan_rows(some_lengths(500), [GEOMETRY], True, seed)[0]) for seed in (1, 1, 2)
  )
  assert first == again != other


def test_still_images_fit_no_row_that_pools_frames():
  pooling = dataclasses.replace(GEOMETRY, pooled=True, decoder_length=128, max_fast_frames=0)
  lengths = some_lengths(200)
  first, last = plan_rows(lengths, [pooling, GEOMETRY], True, seed=0)
  stills = set(np.flatnonzero(lengths.frames == 1))
  assert stills
  assert stills <= set(all_of(last))
  assert set(lengths.frames[all_of(first)]) == {0, 2, 8}


def test_what_does_not_fit_a_row_has_one_of_its_own():
  text = np.array([999, 20, 30, 20])
  lengths = Lengths(text, np.zeros(4, int), text // 2, np.array([0, 99, 0, 1]))
  (rows,) = plan_rows(lengths, [GEOMETRY], True, seed=0)
  companies = sorted(map(sorted, (rows[i] for i in range(len(rows)))))
  assert [0] in companies
  assert [1] in companies or [1, 2] in companies, "its frames leave no room for other frames"
  assert sorted(all_of(rows)) == [0, 1, 2, 3]


@pytest.mark.parametrize("pack", [False, True])
def test_a_sample_goes_to_the_first_bucket_that_holds_it_whole(pack):
  lengths = some_lengths()
  small, large = plan_rows(lengths, [SMALL, GEOMETRY], pack, seed=1)
  fits = (lengths.frames <= 1) & (lengths.text + 4 * lengths.frames <= 64)
  assert sorted(all_of(small)) == np.flatnonzero(fits).tolist()
  assert sorted(all_of(large)) == np.flatnonzero(~fits).tolist()


# Schedules.


def test_an_epoch_of_several_buckets_is_every_row_once():
  rows = [[single_rows(300), single_rows(100)]]
  schedule = Schedule(rows, [1.0], batch_sizes=[3, 2], seed=0)
  seen = collections.Counter()
  steps = 300 // 3 + 100 // 2
  kinds = []
  for step in range(steps):
    place = schedule.place(step)
    kinds.append(place.bucket)
    size = (3, 2)[place.bucket]
    for row in range(size):
      seen[place.bucket, schedule.row(place.bucket, place.ordinal * size + row)[1][0]] += 1
  # Shares are spread evenly, so the epochs of the buckets end within a few steps of each other.
  assert kinds.count(0) == pytest.approx(100, abs=6)
  assert len(seen) >= 385
  assert max(seen.values()) <= 2


def test_empty_buckets_get_no_step():
  empty = Rows(np.zeros(0, int), np.zeros(1, int))
  schedule = Schedule([[empty, single_rows(5)]], [1.0], [4, 4], seed=0)
  assert {schedule.place(step).bucket for step in range(50)} == {1}
  with pytest.raises(UserError, match="no conversation"):
    Schedule([[empty]], [1.0], [4], seed=0)


def test_weights_count_samples_whether_packed_or_not():
  """The first source has ten samples a row, the second one."""
  packed = Rows(np.arange(1000), np.arange(0, 1001, 10))
  schedule = Schedule([[packed], [single_rows(50)]], [0.8, 0.2], [1], seed=0)
  samples = collections.Counter()
  for position in range(10_000):
    source, numbers = schedule.row(0, position)
    samples[source] += len(numbers)
  assert samples[0] / samples.total() == pytest.approx(0.8, rel=0.01)


# In the pipeline.


class Texts:
  """A source that knows its texts: records i have i % 3 frames, and two conversations each."""

  def __init__(self, count=40, first=0):
    self.records = [self._record(i) for i in range(first, first + count)]
    self.index = np.array([(i, j) for i in range(count) for j in range(2)], np.int32)

  def _record(self, i):
    one = record(i % 6, num_frames=i % 3)
    asked = "<video>\nnumber" if one.frames else "number"
    talks = [
      [{"from": "human", "value": asked}, {"from": "gpt", "value": f"{i}{letter}"}]
      for letter in "ab"
    ]
    return dataclasses.replace(one, id=str(i), conversations=talks)

  def __getitem__(self, i):
    return self.records[i]

  def texts(self):
    return (text_of(record) for record in self.records)


def answers(batch):
  """The learned text of every sample of every row."""
  found = []
  for targets, weights, segments in zip(batch.targets, batch.loss_weights, batch.segments):
    for segment in range(1, segments.max(initial=0) + 1):
      mine = (segments == segment) & (weights > 0)
      found.append(TOKENIZER.decode(targets[mine].tolist()))
  return found


ROW = dataclasses.replace(
  GEOMETRY, num_frames=4, decoder_length=120, text_bound=100, max_fast_frames=0
)
BUCKETS = [Bucket(dataclasses.replace(ROW, num_frames=1, decoder_length=48, max_fast_frames=0), 2)]


def packed(source=None, **options):
  options = {"seed": 3, "read_threads": 0, "pack": True} | options
  return TrainPipeline(source or Texts(), TOKENIZER, ROW, 4, **options)


def assert_equal(batches, expected):
  for batch, other in itertools.zip_longest(batches, expected):
    for field in dataclasses.fields(batch):
      np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


def test_a_packed_epoch_has_every_sample_once():
  pipeline = packed()
  rows = len(pipeline.schedule._rows[0][0])
  assert rows < 40
  got = [answer for batch in take(pipeline.iterate(), rows // 4) for answer in answers(batch)]
  expected = collections.Counter(
    turns[-1]["value"] for one in Texts().records for turns in one.conversations
  )
  assert not collections.Counter(got) - expected
  assert sum(expected.values()) - len(got) <= 3 * 6, "only the last, cut, batch is missing"


@pytest.mark.parametrize("options", [{}, {"buckets": BUCKETS}, {"pack": False, "buckets": BUCKETS}])
def test_packed_steps_resume_and_split_over_processes(options):
  expected = take(packed(**options).iterate(), 8)
  if options:
    assert len({batch.tokens.shape for batch in expected}) == 2
  assert_equal(take(packed(**options).iterate(start_step=5), 3), expected[5:])
  assert_equal(take(packed(read_threads=2, **options).iterate(start_step=5), 3), expected[5:])
  parts = [
    take(packed(process_index=i, process_count=2, **options).iterate(start_step=2), 6)
    for i in range(2)
  ]
  for whole, *slices in zip(expected[2:], *parts):
    for field in dataclasses.fields(whole):
      together = np.concatenate([getattr(part, field.name) for part in slices])
      np.testing.assert_array_equal(together, getattr(whole, field.name))


def test_packed_samples_are_those_that_stand_alone():
  """Every sample's tokens, targets and frames are found again in its row."""
  pipeline = packed()
  (batch,) = take(pipeline.iterate(), 1)
  source = Texts()
  for row in range(4):
    _, numbers = pipeline.schedule.row(0, row)
    at = frame = 0
    for segment, number in enumerate(numbers, start=1):
      record, conversation = source.index[number]
      sample = pipeline._sample(source[record], conversation)
      alone = build_row([sample], ROW)
      count = int((alone.segments > 0).sum())
      for name in ("tokens", "kind", "positions", "targets", "loss_weights"):
        together = getattr(batch, name)[row, at : at + count]
        np.testing.assert_array_equal(together, getattr(alone, name)[0, :count])
      assert (batch.segments[row, at : at + count] == segment).all()
      images = decode_frames(source[record])
      shown = batch.frames[row, frame : frame + len(images)]
      np.testing.assert_array_equal(shown, images.reshape(shown.shape))
      at, frame = at + count, frame + len(images)
    assert not batch.segments[row, at:].any()


def test_a_bad_sample_leaves_its_company_alone():
  source = Texts()
  expected = take(packed(source).iterate(), 3)
  bad = next(i for i, one in enumerate(source.records) if len(one.frames) == 2)
  broken = Texts()
  broken.records[bad] = dataclasses.replace(
    broken.records[bad], frames=[b"no jpeg"] * 2, id="broken"
  )
  pipeline = packed(broken)
  batches = take(pipeline.iterate(), len(pipeline.schedule._rows[0][0]) // 4)
  lost = {turns[-1]["value"] for turns in source.records[bad].conversations}
  got = [answer for batch in batches[:3] for answer in answers(batch)]
  assert got == [a for batch in expected for a in answers(batch) if a not in lost]
  assert {failure.id for failure in pipeline.failures} <= {"broken"}
  assert 1 <= pipeline.num_failures <= 2


def test_sources_are_mixed_by_weight_and_named_in_failures():
  first, second = Texts(), Texts(first=60)
  second.path = "records/second"
  pipeline = TrainPipeline([first, second], TOKENIZER, ROW, 4, 0, read_threads=0, weights=[1, 3])
  got = [int(a.rstrip("ab")) >= 60 for b in take(pipeline.iterate(), 100) for a in answers(b)]
  assert np.mean(got) == pytest.approx(0.75, abs=0.01)
  second.records = [dataclasses.replace(one, conversations=[]) for one in second.records]
  take(pipeline.iterate(), 4)
  assert {failure.source for failure in pipeline.failures} == {"records/second"}
  by_size = TrainPipeline([Texts(5), Texts(15)], TOKENIZER, ROW, 4, 0)
  assert by_size.schedule._draws[0] == Draws((10.0, 30.0), by_size.schedule._draws[0].seed)
  with pytest.raises(UserError, match="2 sources and 1 weights"):
    TrainPipeline([first, second], TOKENIZER, ROW, 4, 0, weights=[1])


# Counting.


def test_counted_needs_are_what_rows_take():
  source = Texts()
  for query_set in ("text-only", "text-only-masksystem", "all"):
    geometry = dataclasses.replace(ROW, query_set=query_set)
    needs = needs_of(count_lengths(source, TOKENIZER, "Be brief."), geometry)
    pipeline = packed(source, system="Be brief.", pack=False)
    for i, (number, conversation) in enumerate(source.index):
      row = build_row([pipeline._sample(source[number], conversation)], geometry)
      assert needs.positions[i] == (row.segments > 0).sum()
      asks = (row.text_index >= 0).sum()
      assert needs.queries[i] == (asks if needs.frames[i] else (row.loss_weights > 0).sum())
      assert needs.frames[i] == (row.frame_segments > 0).sum()
      assert needs.fast_frames[i] == row.pooling.any(axis=-1).sum()


def test_tokens_are_counted_once(tmp_path, monkeypatch):
  write_records(tmp_path / "records", [record(i) for i in range(3)])
  source = RecordSource(tmp_path / "records")
  first = count_lengths(source, TOKENIZER, "Hi.")
  monkeypatch.setattr(RecordSource, "texts", lambda self: pytest.fail("counted again"))
  again = count_lengths(source, TOKENIZER, "Hi.")
  for field in dataclasses.fields(Lengths):
    np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
  with pytest.raises(pytest.fail.Exception):
    count_lengths(source, TOKENIZER, "Other.")
  with pytest.raises(pytest.fail.Exception):
    count_lengths(source, TOKENIZER, "Hi.", targets="reference")


def test_samples_that_cannot_be_encoded_need_nothing():
  source = Texts(3)
  source.records[1] = dataclasses.replace(source.records[1], frames=[])
  lengths = count_lengths(source, TOKENIZER, "")
  assert lengths.text.tolist()[2:4] == [0, 0]
  assert (lengths.text > 0).sum() == 4
