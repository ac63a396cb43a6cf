# SPDX-License-Identifier: Apache-2.0
"""Scenes: when and where the flashes are, and what an H.264 file of them still shows."""

import dataclasses
import itertools
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.video import read_frames
from slowfast_jax.demo import scenes
from slowfast_jax.demo.scenes import (
  COLOURS,
  PLACES,
  SHAPES,
  Geometry,
  event_frames,
  is_written,
  make_scene,
  render,
  render_moment,
  sample_times,
  time_of_day,
  write_video,
)
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.models.presets import PRESETS

GEOMETRY = Geometry()
MANY = [make_scene(seed, GEOMETRY) for seed in range(400)]
FILMED = MANY[:10]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scenes")
  paths = [folder / f"{scene.seed}.mp4" for scene in FILMED]
  for scene, path in zip(FILMED, paths, strict=True):
    write_video(scene, path)
  return paths


@pytest.fixture(scope="module")
def sampled(files):
  return [read_frames(path, GEOMETRY.num_frames) for path in files]


def test_a_scene_is_a_function_of_its_arguments():
  assert make_scene(7, GEOMETRY) == MANY[7]
  assert len({scene.fingerprint for scene in MANY}) == len(MANY)
  assert make_scene(7, GEOMETRY, size=64).fingerprint != MANY[7].fingerprint
  assert all(24 <= s.fps <= 30 and 7.9 <= s.duration <= 16.1 for s in MANY)


def test_every_shape_and_colour_flashes_once_and_anywhere():
  for scene in MANY:
    assert sorted(event.shape for event in scene.events) == sorted(SHAPES)
    assert sorted(event.colour for event in scene.events) == sorted(COLOURS)
  looks = [(e.shape, e.colour, e.place) for scene in MANY for e in scene.events]
  counts = [looks.count(look) for look in sorted(set(looks))]
  assert len(counts) == 64
  assert max(counts) < 50, "25 expected"


@pytest.mark.parametrize("size", [64, 70, 96])
def test_flashes_stay_inside_their_quadrant(size):
  for seed in range(100):
    for event in make_scene(seed, GEOMETRY, size).events:
      (x, y), radius, place = event.centre_xy, event.radius, PLACES.index(event.place)
      assert 0.16 * size <= radius <= 0.22 * size
      for centre, far in ((x, place % 2), (y, place // 2)):
        low, high = (size / 2, size) if far else (0, size / 2)
        assert low - 1 <= centre - radius
        assert centre + radius <= high
        assert abs(centre - (low + high) / 2) <= 0.02 * size + 3, "near its middle"


def test_places_are_where_their_names_say():
  """The middle of a flash lies north or south, east or west of the picture's middle."""
  for scene in MANY[:50]:
    for event in scene.events:
      x, y = event.centre_xy
      assert event.place == ("south" if y > 48 else "north") + ("east" if x > 48 else "west")


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(64, 8), Geometry(32, 16)])
def test_flashes_are_sampled_and_hardly_ever_in_fast_frames(geometry):
  fast, events = 0, 0
  for seed in range(300):
    scene = make_scene(seed, geometry)
    times = sample_times(scene, geometry)
    for event in scene.events:
      shown = event_frames(event, times)
      assert shown
      fast += any(frame in geometry.fast_frames for frame in shown)
      events += 1
  assert fast / events < 0.05


def test_flashes_are_brief_and_apart():
  for scene in MANY:
    spans = [(event.start, event.end) for event in scene.events]
    # Whole frames: half a frame of rounding.
    assert all(0.4 - 0.03 < end - start < 0.8 + 0.03 for start, end in spans)
    assert all(b[0] - a[1] > 0.45 for a, b in itertools.pairwise(spans))
    assert spans[-1][0] - spans[0][0] > 2.95
    assert spans[-1][1] <= scene.duration


def test_order_says_nothing_about_looks():
  first = [scene.events[0] for scene in MANY]
  for values in ([e.shape for e in first], [e.colour for e in first], [e.place for e in first]):
    assert all(60 < values.count(value) < 145 for value in set(values)), "100 expected"


def test_fast_frames_are_the_compressors():
  c = PRESETS["demo"].compressor
  kept = pooling_matrix(
    GEOMETRY.num_frames, c.sampling_stride, c.temporal_stride, c.min_fast_frames
  )
  assert np.flatnonzero(kept.any(axis=0)).tolist() == list(GEOMETRY.fast_frames)


def test_the_time_of_day_is_the_quarter_of_the_clip():
  scene = MANY[0]
  starts = [scene.duration * share for share in (-0.01, 0, 0.24, 0.26, 0.51, 0.74, 0.76, 1.0)]
  events = [dataclasses.replace(scene.events[0], start=start) for start in starts]
  times = ["night"] * 3 + ["dawn"] + ["morning"] * 2 + ["noon"] * 2
  assert [time_of_day(scene, event) for event in events] == times


def test_one_moment_is_a_frame_of_the_clip():
  scene = make_scene(3, GEOMETRY, size=64)
  flash = round(scene.events[1].start * scene.fps + 1)
  frames = list(render(scene))
  for i in (0, flash, scene.total_frames - 1):
    np.testing.assert_array_equal(render_moment(scene, i), frames[i])


@pytest.mark.parametrize("size", [31, 65])
def test_a_bad_size_is_named(size):
  with pytest.raises(ValueError, match=f"even number of pixels, at least 32, got {size}"):
    make_scene(0, GEOMETRY, size)


@pytest.mark.parametrize("geometry", [Geometry(32, 1), Geometry(4, 2)])
def test_a_geometry_without_room_is_named(geometry):
  with pytest.raises(ValueError, match=r"do not fit between the fast frames of Geometry\("):
    make_scene(0, geometry)


def test_the_file_is_what_was_drawn(files):
  for scene, path in zip(FILMED[:3], files, strict=False):
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
      assert (stream.width, stream.height) == (scene.size, scene.size)
      assert (stream.average_rate, stream.frames) == (scene.fps, scene.total_frames)
      decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    drawn = list(render(scene))
    assert len(decoded) == len(drawn)
    error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(decoded, drawn, strict=True)])
    assert error < 255**2 / 10 ** (33 / 10), "33 dB"


def test_files_are_small(files):
  assert np.mean([os.path.getsize(path) for path in files]) < 100_000


def test_the_sampled_frames_show_the_flashes_when_and_where_they_are(sampled):
  for scene, frames in zip(FILMED, sampled, strict=True):
    assert frames.decode_errors == 0
    np.testing.assert_allclose(frames.timestamps, sample_times(scene, GEOMETRY), atol=1e-5)
    for event in scene.events:
      x, y = event.centre_xy
      seen = [
        abs(image[y, x] - np.array(scenes._RGB[event.colour])).max() < 40
        for image in frames.images.astype(int)
      ]
      assert np.flatnonzero(seen).tolist() == event_frames(event, frames.timestamps)


def test_shapes_can_be_told_apart_at_64_pixels(sampled):
  """By a template: the saturated area's box, compared with each shape's own mask."""
  templates = {shape: _fit(scenes._mask(shape, 20) > 0.5) for shape in SHAPES}
  right, total = 0, 0
  for scene, frames in zip(FILMED, sampled, strict=True):
    for event in scene.events:
      image = frames.images[event_frames(event, frames.timestamps)[0]]
      small = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
      saturated = np.ptp(small.astype(int), axis=-1) > 90
      found = _fit(saturated)
      scores = {shape: (found == template).mean() for shape, template in templates.items()}
      right += max(scores, key=scores.get) == event.shape
      total += 1
  assert right == total


def _fit(area):
  rows, columns = (np.flatnonzero(area.any(axis=axis)) for axis in (1, 0))
  box = area[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  return np.asarray(Image.fromarray(box).convert("L").resize((24, 24))) > 127


def test_the_light_tells_the_time(sampled):
  for frames in sampled:
    light = frames.images.mean(axis=(1, 2, 3))
    assert np.corrcoef(light, frames.timestamps)[0, 1] > 0.97
    assert light[0] < 60
    assert light[-1] > 145


def test_frames_without_a_flash_do_not_depend_on_what_flashed(tmp_path):
  """To the last bit: other shapes, colours and places leave the fast tokens' frames as they are."""
  path = tmp_path / "clip.mp4"
  for scene in FILMED[:6]:
    others = [
      dataclasses.replace(
        event, shape=other.shape, colour=other.colour, centre_xy=event.centre_xy[::-1]
      )
      for event, other in zip(scene.events, scene.events[::-1], strict=True)
    ]
    pair = []
    for version in (scene, dataclasses.replace(scene, events=tuple(others))):
      write_video(version, path)
      pair.append(read_frames(path, GEOMETRY.num_frames).images)
    times = sample_times(scene, GEOMETRY)
    shown = {frame for event in scene.events for frame in event_frames(event, times)}
    differ = np.flatnonzero((pair[0] != pair[1]).any(axis=(1, 2, 3)))
    assert set(differ.tolist()) == shown


def test_a_file_knows_its_scene(files, tmp_path):
  assert is_written(FILMED[0], files[0])
  assert not is_written(FILMED[0], files[1])
  assert not is_written(FILMED[0], tmp_path / "absent.mp4")
  torn = tmp_path / "torn.mp4"
  torn.write_bytes(files[0].read_bytes()[:3000])
  assert not is_written(FILMED[0], torn)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def paint(scene):
    yield np.zeros((scene.size * 3 // 2, scene.size), np.uint8)
    raise OSError("disk full")

  monkeypatch.setattr(scenes, "_paint", paint)
  with pytest.raises(OSError, match="disk full"):
    write_video(FILMED[0], tmp_path / "clip.mp4")
  assert list(tmp_path.iterdir()) == []


def test_workers_start_without_jax():
  code = "import sys, slowfast_jax.demo.questions; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
