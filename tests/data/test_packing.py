# SPDX-License-Identifier: Apache-2.0
"""Rows of `Batch`, against arrays written by hand, and packing that nobody notices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.data.packing import Geometry, Sample, build_row, collate, empty_row
from slowfast_jax.errors import UserError
from slowfast_jax.models.compressor import compress
from slowfast_jax.shapes import FAST, Batch

# Two frames are averaged into one fast frame of two tokens.
GEOMETRY = Geometry(
  num_frames=6,
  decoder_length=20,
  text_bound=10,
  image_size=(1, 2),
  tokens_per_frame=2,
  temporal_stride=2,
  min_fast_frames=1,
)
V = IMAGE_TOKEN


def frames(*values):
  """Frames of one colour each."""
  return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 3), np.uint8)


def pad(values, length, filler=0):
  return [*values, *[filler] * (length - len(values))]


def test_one_video():
  row = build_row([Sample([7, V, 8, 9, 5], [0, 1, 0, 1, 1], (4,), frames(1, 2, 3, 4))], GEOMETRY)
  np.testing.assert_array_equal(row.tokens[0], pad([7, 0, 0, 0, 0, 8, 9, 5], 20))
  np.testing.assert_array_equal(row.kind[0], pad([1, 3, 3, 3, 3, 1, 2, 2], 20))
  np.testing.assert_array_equal(row.positions[0], pad(range(8), 20))
  np.testing.assert_array_equal(row.segments[0], pad([1] * 8, 20))
  np.testing.assert_array_equal(row.targets[0], pad([0, 0, 0, 0, 8, 9, 5], 20))
  np.testing.assert_array_equal(row.loss_weights[0], pad([0, 0, 0, 0, 0, 1, 1], 20))
  np.testing.assert_array_equal(row.frames[0, :, 0, 0, 0], [1, 2, 3, 4, 0, 0])
  np.testing.assert_array_equal(row.frame_segments[0], [1, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(
    row.pooling[0], [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0] * 6]
  )
  np.testing.assert_array_equal(row.text_index[0], pad([0, 5, 6, 7], 10, -1))


def test_three_samples_in_a_row():
  """A text; an image and a video in one sample, with text between; a video."""
  geometry = dataclasses.replace(GEOMETRY, max_fast_frames=4)
  row = build_row(
    [
      Sample([4, 6], [0, 1]),
      Sample([V, 7, V, 8], [0, 1, 0, 1], (1, 2), frames(1, 2, 3)),
      Sample([V, 9], [0, 1], (2,), frames(4, 5)),
    ],
    geometry,
  )
  np.testing.assert_array_equal(row.tokens[0], pad([4, 6, 0, 0, 7, 0, 0, 8, 0, 0, 9], 20))
  np.testing.assert_array_equal(row.kind[0], pad([1, 2, 3, 3, 2, 3, 3, 2, 3, 3, 2], 20))
  np.testing.assert_array_equal(row.positions[0], pad([0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2], 20))
  np.testing.assert_array_equal(row.segments[0], pad([1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3], 20))
  np.testing.assert_array_equal(row.targets[0], pad([6, 0, 0, 7, 0, 0, 8, 0, 0, 9], 20))
  np.testing.assert_array_equal(row.loss_weights[0], pad([1, 0, 0, 1, 0, 0, 1, 0, 0, 1], 20))
  np.testing.assert_array_equal(row.frames[0, :, 0, 0, 0], [1, 2, 3, 4, 5, 0])
  np.testing.assert_array_equal(row.frame_segments[0], [2, 2, 2, 3, 3, 0])
  np.testing.assert_array_equal(
    row.pooling[0],
    [[1, 0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0], [0] * 6],
  )
  # The text sample has no slow tokens to query.
  np.testing.assert_array_equal(row.text_index[0], pad([4, 7, 10], 10, -1))


@pytest.mark.parametrize(
  ("query_set", "expected"),
  [
    ("text-only", [2, 5, 6]),
    ("text-only-masksystem", [5, 6]),
    ("all", [2, 3, 4, 5, 6]),
  ],
)
def test_query_sets(query_set, expected):
  geometry = dataclasses.replace(GEOMETRY, query_set=query_set)
  samples = [Sample([4, 6]), Sample([7, V, 8, 9], [0, 0, 0, 1], (2,), frames(1, 2))]
  row = build_row(samples, geometry)
  np.testing.assert_array_equal(row.text_index[0], pad(expected, 10, -1))


def test_a_long_sample_is_cut_on_the_right():
  geometry = dataclasses.replace(GEOMETRY, decoder_length=6)
  row = build_row([Sample([7, V, 8, 9, 5], [0, 0, 0, 1, 1], (4,), frames(1, 2, 3, 4))], geometry)
  np.testing.assert_array_equal(row.tokens[0], [7, 0, 0, 0, 0, 8])
  np.testing.assert_array_equal(row.targets[0], [0, 0, 0, 0, 8, 0])
  assert row.loss_weights.sum() == 0
  # Its slow tokens are all there, and its fast tokens still take the first FAST positions.
  assert row.frame_segments.sum() == 4
  np.testing.assert_array_equal(row.text_index[0], pad([0, 5], 10, -1))


def test_a_sample_whose_visual_positions_are_cut_off_queries_nothing():
  geometry = dataclasses.replace(GEOMETRY, decoder_length=2)
  row = build_row([Sample([7, 8, V], None, (2,), frames(1, 2))], geometry)
  assert row.text_index.max() == -1


def test_texts_alone_learn_no_more_than_rows_with_videos_may():
  """The loss counts on it: it scores `text_bound` positions of a row."""
  long = Sample(list(range(1, 18)), [0] * 4 + [1] * 13)
  row = build_row([long], GEOMETRY)
  np.testing.assert_array_equal(row.tokens[0], pad(range(1, 15), 20))
  assert (row.loss_weights > 0).sum() == 10
  short = Sample([1] * 8, [0, 0, *[1] * 6])
  with pytest.raises(UserError, match="text_bound is 10 and the row needs 12, 2 too many"):
    build_row([short, short], GEOMETRY)
  beside = Sample([V, 5, 6, 7, 8], [0, 1, 1, 1, 1], (2,), frames(1, 2))
  assert (build_row([beside, short], GEOMETRY).loss_weights > 0).sum() == 10
  with pytest.raises(UserError, match="text_bound is 10 and the row needs 14, 4 too many"):
    build_row([beside, beside, short], GEOMETRY)


def test_packed_samples_see_the_fast_tokens_that_they_see_alone():
  """Frame f has the slow tokens (f, 0), (f, 1); FAST positions take fast tokens in order."""
  geometry = dataclasses.replace(GEOMETRY, num_frames=9, max_fast_frames=6, sampling_stride=1)
  samples = [
    Sample([1, V, 2], None, (5,), frames(1, 2, 3, 4, 5)),
    Sample([3]),
    Sample([V, 4, V], None, (1, 3), frames(6, 7, 8, 9)),
  ]

  def at_fast_positions(row: Batch):
    slow = np.stack(np.broadcast_arrays(row.frames[..., 0, :1, 0], [0.0, 1.0]), axis=-1)
    fast = compress(jnp.asarray(slow, jnp.float32), jnp.asarray(row.pooling), 1).reshape(-1, 2)
    merged = np.zeros((geometry.decoder_length, 2), np.float32)
    merged[row.kind[0] == FAST] = fast[: (row.kind == FAST).sum()]
    return merged[row.segments[0] > 0]

  packed = at_fast_positions(build_row(samples, geometry))
  alone = [at_fast_positions(build_row([sample], geometry)) for sample in samples]
  np.testing.assert_array_equal(packed, np.concatenate(alone))


# Every eighth frame of 32 is kept: four.
STRIDED = dataclasses.replace(
  GEOMETRY, num_frames=32, sampling_stride=8, temporal_stride=1, max_fast_frames=0
)


def test_without_a_slow_path_a_row_has_only_the_frames_of_fast_tokens():
  geometry = dataclasses.replace(STRIDED, slow=False)
  assert (STRIDED.row_frames, geometry.row_frames) == (32, 4)
  video = Sample([7, V, 8], None, (32,), frames(*range(32)))
  row = build_row([video], geometry)
  assert row.frames.shape == (1, 4, 1, 2, 3)
  np.testing.assert_array_equal(row.frames[0, :, 0, 0, 0], [0, 8, 16, 24])
  np.testing.assert_array_equal(row.frame_segments, [[1, 1, 1, 1]])
  np.testing.assert_array_equal(row.pooling[0], np.eye(4))
  assert empty_row(geometry).frames.shape == row.frames.shape


@pytest.mark.parametrize(
  "rules",
  [
    {},
    {"temporal_stride": 2},
    {"sampling_stride": 2, "temporal_stride": 3, "min_fast_frames": 7},  # Windows that overlap.
    {"sampling_stride": 1, "temporal_stride": 5},  # The last frames are dropped.
    {"sampling_stride": 1},
  ],
)
@pytest.mark.parametrize("num_frames", [(32,), (16, 16), (1, 8, 16), (5,), ()])
def test_fast_tokens_do_not_depend_on_whether_there_is_a_slow_path(rules, num_frames):
  """Nor does anything else of the row but the frames that no fast token reads."""
  with_slow = dataclasses.replace(STRIDED, **rules, decoder_length=80, max_fast_frames=40)
  without = dataclasses.replace(with_slow, slow=False)
  first = np.cumsum([0, *num_frames])
  used = np.concatenate(
    [start + without.used_frames(n) for start, n in zip(first, num_frames)] or [[]]
  ).astype(int)
  assert len(used) <= without.row_frames, "a case that does not fit tests nothing"
  samples = [
    Sample([i, V, 9], [0, 1, 1], (n,), frames(*range(first[i], first[i + 1])))
    for i, n in enumerate(num_frames)
  ] or [Sample([1, 2], [0, 1])]
  full, short = build_row(samples, with_slow), build_row(samples, without)

  np.testing.assert_array_equal(short.frames[0, : len(used)], full.frames[0, used])
  np.testing.assert_array_equal(short.frame_segments[0, : len(used)], full.frame_segments[0, used])
  assert not short.frames[0, len(used) :].any()
  assert not short.frame_segments[0, len(used) :].any()
  for name in {field.name for field in dataclasses.fields(Batch)} - {
    "frames",
    "frame_segments",
    "pooling",
  }:
    np.testing.assert_array_equal(getattr(short, name), getattr(full, name), err_msg=name)

  rng = np.random.default_rng(0)
  slow = rng.normal(size=(1, with_slow.row_frames, 4, 3)).astype(np.float32)
  seen = np.zeros((1, without.row_frames, 4, 3), np.float32)
  seen[0, : len(used)] = slow[0, used]
  expected = compress(jnp.asarray(slow), jnp.asarray(full.pooling), 2)
  fast = compress(jnp.asarray(seen), jnp.asarray(short.pooling), 2)
  np.testing.assert_allclose(fast, expected, atol=1e-6)
  assert bool(num_frames) == bool(np.any(expected))


def test_shorter_videos_never_need_more_frames_than_a_row_without_slow_path_has():
  rng = np.random.default_rng(0)
  for _ in range(200):
    n, s, t, m = (int(rng.integers(1, high)) for high in (70, 9, 6, 20))
    geometry = dataclasses.replace(
      GEOMETRY,
      num_frames=n,
      sampling_stride=s,
      temporal_stride=t,
      min_fast_frames=m,
      max_fast_frames=0,
      slow=False,
    )
    assert max(len(geometry.used_frames(k)) for k in range(1, n + 1)) == geometry.row_frames


def test_rows_of_other_lengths_collate():
  rows = [
    build_row([Sample([1, V], None, (6,), frames(*range(6)))], GEOMETRY),
    build_row([Sample([2, 3])], GEOMETRY),
    empty_row(GEOMETRY),
  ]
  batch = collate(rows)
  dtypes = {field.name: getattr(batch, field.name).dtype for field in dataclasses.fields(batch)}
  integers = ("tokens", "positions", "segments", "targets", "frame_segments", "text_index")
  assert dtypes == dict.fromkeys(integers, np.int32) | {
    "kind": np.int8,
    "loss_weights": np.float32,
    "frames": np.uint8,
    "pooling": np.float32,
  }
  assert batch.frames.shape == (3, 6, 1, 2, 3)
  assert batch.pooling.shape == (3, 3, 6)
  np.testing.assert_array_equal(batch.segments[:, 0], [1, 1, 0])


def test_normalised_frames_keep_their_dtype():
  row = build_row([Sample([V], None, (2,), frames(1, 2).astype(np.float32) / 7)], GEOMETRY)
  assert row.frames.dtype == np.float32
  np.testing.assert_allclose(row.frames[0, :3, 0, 0, 0], [1 / 7, 2 / 7, 0], rtol=1e-6)


def test_the_temporal_rules_reach_the_row():
  """Each rule of the compressor changes the map; seven frames are more than the minimum."""
  base = dataclasses.replace(GEOMETRY, num_frames=7, max_fast_frames=0)
  assert base.max_fast_frames == 3
  assert dataclasses.replace(base, sampling_stride=2, max_fast_frames=0).max_fast_frames == 1
  assert dataclasses.replace(base, temporal_stride=1, max_fast_frames=0).max_fast_frames == 7
  assert dataclasses.replace(base, min_fast_frames=5, max_fast_frames=0).max_fast_frames == 5
  assert base.num_fast_tokens(7) == 6


TWO = Sample([V], None, (2,), frames(1, 2))


@pytest.mark.parametrize(
  ("change", "samples", "message"),
  [
    (
      {"text_bound": 3},
      [Sample([1, 2, V, 3, 4], None, (2,), frames(1, 2))],
      "text_bound is 3 .* 4",
    ),
    ({"num_frames": 3}, [TWO, TWO], "num_frames is 3 and the row needs 4, 1 too many"),
    ({"max_fast_frames": 1}, [TWO, TWO], "max_fast_frames is 1 and the row needs 2, 1 too many"),
    ({"decoder_length": 3}, [TWO, TWO], "decoder_length is 3 and the row needs 4, 1 too many"),
    ({}, [Sample([V, V], None, (2,), frames(1, 2))], r"2 placeholder\(s\) .* 1 video"),
    ({}, [Sample([1], None, (2,), frames(1, 2))], r"0 placeholder\(s\) .* 1 video"),
    ({}, [Sample([V], None, (3,), frames(1, 2))], r"shape \(3, 1, 2, 3\), got \(2, 1, 2, 3\)"),
    ({"image_size": (2, 2)}, [TWO], r"shape \(2, 2, 2, 3\), got \(2, 1, 2, 3\)"),
    ({}, [Sample([V], None, (2,))], r"shape \(2, 1, 2, 3\), got None"),
    ({}, [Sample([1, 2], [1])], "2 ids and 1 of loss_mask"),
  ],
)
def test_errors_name_the_bound(change, samples, message):
  with pytest.raises(UserError, match=message):
    build_row(samples, dataclasses.replace(GEOMETRY, **change))


def test_geometry_is_checked():
  with pytest.raises(UserError, match=r"query_set must be one of .* got 'text'"):
    dataclasses.replace(GEOMETRY, query_set="text")
  with pytest.raises(UserError, match=r"text_bound must be at least 1, got 0"):
    dataclasses.replace(GEOMETRY, text_bound=0)
