# SPDX-License-Identifier: Apache-2.0
"""Frames of real files: the right ones, at the right times, upright, in bounded memory."""

import inspect
import io
import os
import weakref

import av
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowfast_jax.data import video_stream
from slowfast_jax.data.video import Frames, VideoError, frame_indices, read_frames
from tests.data.video_files import (
  VideoSpec,
  numbered_frame,
  read_number,
  rewrite_packets,
  write_video,
)

QUIET_X265 = {"x265-params": "log-level=none"}


def numbers(frames: Frames) -> list[int]:
  return [read_number(image) for image in frames.images]


# Which frames.


@pytest.mark.parametrize(
  ("total", "num_frames", "expected"),
  [
    (10, 4, [0, 3, 6, 9]),
    (10, 3, [0, 4, 9]),  # 4.5 is cut off, not rounded.
    (7, 1, [0]),
    (1, 3, [0, 0, 0]),
    (5, 8, [0, 0, 1, 1, 2, 2, 3, 4]),  # Shorter than asked: frames repeat.
  ],
)
def test_uniform_cases_by_hand(total, num_frames, expected):
  assert frame_indices(total, 30.0, num_frames) == expected


@pytest.mark.parametrize(
  ("total", "fps", "num_frames", "target", "expected"),
  [
    (48, 25, 64, 2, [0, 12, 24, 36]),  # 12.5 rounds to the even 12.
    (48, 15, 64, 2, [0, 8, 16, 24, 32, 40]),  # 7.5 rounds to the even 8.
    (6, 5, 64, 2, [0, 2, 4]),  # 2.5 rounds to 2.
    (3, 0.5, 64, 2, [0, 1, 2]),  # The target is capped at the video's rate.
    (10, 1, 4, 1, [2, 4, 6, 9]),  # Stride 2.5: 1.5 -> 2, 4, 6.5 -> 6, 9.
    (5, 1, 2, 1, [2, 4]),  # Stride 2.5: 1.5 -> 2, 4.
    (40, 8, 4, 4, [8, 18, 28, 38]),  # Twenty candidates, every fifth of them, from the fifth on.
    (4, 1, 4, 1, [0, 1, 2, 3]),
  ],
)
def test_fps_cases_by_hand(total, fps, num_frames, target, expected):
  assert frame_indices(total, fps, num_frames, "fps", target) == expected


@given(total=st.integers(1, 100_000), num_frames=st.integers(1, 300))
def test_uniform_indices_span_the_video(total, num_frames):
  indices = frame_indices(total, 0.0, num_frames)
  assert len(indices) == num_frames
  assert indices == sorted(indices)
  assert indices[0] == 0
  assert indices[-1] == (total - 1 if num_frames > 1 else 0)


@given(
  total=st.integers(1, 100_000),
  fps=st.floats(0.1, 240),
  num_frames=st.integers(1, 300),
  target=st.floats(0.1, 30),
)
def test_fps_indices_are_distinct_candidates(total, fps, num_frames, target):
  indices = frame_indices(total, fps, num_frames, "fps", target)
  candidates = range(0, total, max(round(fps / min(fps, target)), 1))
  assert len(indices) == min(num_frames, len(candidates))
  assert indices == sorted(set(indices))
  assert set(indices) <= set(candidates)
  assert indices[-1] == candidates[-1]


@pytest.mark.parametrize(
  ("arguments", "text"),
  [
    ((0, 30.0, 4), "must be at least 1, got 0 and 4"),
    ((10, 30.0, 0), "must be at least 1, got 10 and 0"),
    ((10, 30.0, 4, "random"), 'must be "uniform" or "fps", got \'random\''),
    ((10, 0.0, 4, "fps"), "positive video_fps and target_fps"),
    ((10, float("nan"), 4, "fps"), "positive video_fps and target_fps"),
    ((10, 30.0, 4, "fps", -1.0), "got 30.0 and -1.0"),
  ],
)
def test_wrong_arguments_are_named(arguments, text):
  with pytest.raises(ValueError, match=text):
    inspect.unwrap(frame_indices)(*arguments)  # Without the tests' check of annotations.


# Containers and codecs.


@pytest.mark.parametrize(
  ("name", "spec"),
  [
    ("h264.mp4", VideoSpec()),
    ("h264.mkv", VideoSpec()),
    ("h264.mov", VideoSpec(audio=True)),
    ("h264.flv", VideoSpec()),
    ("h264.ts", VideoSpec()),
    ("fragments.mp4", VideoSpec(container_options={"movflags": "frag_keyframe+empty_moov"})),
    ("one_gop.mp4", VideoSpec(gop=250)),
    ("intra.mp4", VideoSpec(gop=1)),
    ("open_gop.mkv", VideoSpec(options={"x264-params": "open-gop=1"})),
    ("h265.mp4", VideoSpec(codec="libx265", options=QUIET_X265)),
    ("vp8.webm", VideoSpec(codec="libvpx")),
    ("vp9.webm", VideoSpec(codec="libvpx-vp9", options={"deadline": "realtime"})),
    ("av1.mp4", VideoSpec(codec="libsvtav1", options={"preset": "12"})),
    ("mpeg4.avi", VideoSpec(codec="mpeg4", options={"bf": "2"})),
    ("mpeg2.mpg", VideoSpec(codec="mpeg2video", options={"bf": "2"})),
    ("mjpeg.mov", VideoSpec(codec="mjpeg", pixels="yuvj420p")),
    ("gif.gif", VideoSpec(codec="gif", pixels="rgb8")),
    ("ten_bit.mp4", VideoSpec(pixels="yuv420p10le")),
    # Streams that hold neither a count nor times of display.
    ("raw.h264", VideoSpec()),
    ("raw.hevc", VideoSpec(codec="libx265", options=QUIET_X265)),
    ("b_frames.avi", VideoSpec()),
    ("live.mkv", VideoSpec(container_options={"live": "1"})),
    # Sizes that codecs pad.
    ("odd.webm", VideoSpec(codec="libvpx-vp9", height=63, width=97)),
    ("odd.mp4", VideoSpec(pixels="yuv444p", height=63, width=97)),
  ],
)
def test_every_format_gives_the_chosen_frames(tmp_path, name, spec):
  frames = read_frames(write_video(tmp_path / name, spec), 8)
  assert frames.indices.tolist() == [0, 8, 16, 25, 33, 42, 50, 59]
  assert numbers(frames) == frames.indices.tolist()
  np.testing.assert_allclose(frames.timestamps, frames.indices / 25, atol=1e-3)
  assert frames.images.shape == (8, spec.height, spec.width, 3)
  assert frames.images.dtype == np.uint8
  assert (frames.height, frames.width) == (spec.height, spec.width)
  assert frames.total_frames == 60
  assert frames.fps == 25
  assert frames.duration == pytest.approx(2.4, abs=2e-3)
  assert (frames.decode_errors, frames.rotation) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux names the policy.")
def test_a_written_video_leaves_the_scheduling_of_this_process_alone(tmp_path):
  write_video(tmp_path / "av1.mp4", VideoSpec(num_frames=2, codec="libsvtav1"))
  assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(
  ("name", "spec"),
  [
    ("a.mp4", VideoSpec(num_frames=120, gop=1)),
    ("a.mp4", VideoSpec(num_frames=120, gop=10)),
    ("a.mp4", VideoSpec(num_frames=120, gop=300)),
    ("a.mkv", VideoSpec(num_frames=120, gop=10)),
    ("a.ts", VideoSpec(num_frames=120, gop=10)),
    ("a.flv", VideoSpec(num_frames=120, gop=10)),
    ("a.avi", VideoSpec(num_frames=120, gop=10, codec="mpeg4", options={"bf": "2"})),
    ("a.mpg", VideoSpec(num_frames=120, gop=10, codec="mpeg2video", options={"bf": "2"})),
    ("h265.mkv", VideoSpec(num_frames=120, gop=10, codec="libx265", options=QUIET_X265)),
    ("a.webm", VideoSpec(num_frames=120, gop=10, codec="libvpx-vp9", options={"speed": "8"})),
  ],
)
def test_jumping_and_skipping_change_no_pixel(tmp_path, name, spec):
  path = write_video(tmp_path / name, spec)
  with av.open(str(path)) as container:
    every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  for num_frames in (1, 2, 5, 40, 120):
    frames = read_frames(path, num_frames)
    assert np.array_equal(frames.images, np.stack([every[i] for i in frames.indices]))


def test_far_frames_are_reached_without_decoding_the_rest(tmp_path, monkeypatch):
  path = write_video(tmp_path / "a.mp4", VideoSpec(num_frames=300, gop=30))
  decoded, decode = [], video_stream._decoded

  def noted(packets, errors):
    for frame in decode(packets, errors):
      decoded.append(frame.pts)
      yield frame

  monkeypatch.setattr(video_stream, "_decoded", noted)
  assert numbers(read_frames(path, 2)) == [0, 299]
  assert len(decoded) < 40


def test_content_in_memory_reads_as_the_file(tmp_path):
  path = write_video(tmp_path / "a.mp4")
  content, expected = path.read_bytes(), read_frames(path, 5)
  with path.open("rb") as file:
    for source in (content, io.BytesIO(content), str(path), file):
      assert np.array_equal(read_frames(source, 5).images, expected.images)


def test_a_name_is_never_read_as_a_protocol(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_video(tmp_path / "a.mp4").rename("http:clip.mp4")
  assert numbers(read_frames("http:clip.mp4", 2)) == [0, 59]


def test_one_frame(tmp_path):
  frames = read_frames(write_video(tmp_path / "a.mp4", VideoSpec(num_frames=1)), 3)
  assert frames.indices.tolist() == [0, 0, 0]
  assert frames.timestamps.tolist() == [0, 0, 0]
  assert frames.duration == pytest.approx(1 / 25)
  assert read_frames(tmp_path / "a.mp4", 3, sampler="fps").indices.tolist() == [0]


def test_fps_sampler_goes_by_the_average_rate(tmp_path):
  path = write_video(tmp_path / "a.mp4")
  assert numbers(read_frames(path, 64, sampler="fps")) == [0, 12, 24, 36, 48]
  assert numbers(read_frames(path, 2, sampler="fps", target_fps=25)) == [29, 59]


# Times.


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_timestamps_of_a_variable_rate_are_true(tmp_path, name):
  rng = np.random.default_rng(0)
  times = np.cumsum(rng.choice([0.02, 0.04, 0.5], 80)) + 3.0
  path = write_video(tmp_path / name, VideoSpec(num_frames=80, times=times))
  frames = read_frames(path, 20)
  truth = (times - times[0])[numbers(frames)]
  np.testing.assert_allclose(frames.timestamps, truth, atol=2e-3)
  assert np.abs(frames.indices / frames.fps - truth).max() > 0.5  # What counting would say.
  assert frames.fps == pytest.approx(80 / frames.duration, rel=0.02)


def test_frames_outside_of_the_edit_list_are_not_counted(tmp_path):
  times = [(i - 20) / 25 for i in range(60)]
  frames = read_frames(write_video(tmp_path / "a.mp4", VideoSpec(times=times)), 40)
  assert numbers(frames) == list(range(20, 60))
  assert frames.timestamps[0] == 0
  assert frames.total_frames == 40


def test_hidden_frames_are_not_counted(tmp_path):
  path = write_video(tmp_path / "a.webm", VideoSpec(codec="libvpx"))

  def hide(i: int, packet: bytes) -> bytes:
    return bytes([packet[0] & ~0x10]) + packet[1:] if i % 12 % 3 == 1 else packet

  frames = read_frames(rewrite_packets(path, tmp_path / "hidden.webm", hide), 40)
  assert frames.total_frames == 40
  assert numbers(frames) == [i for i in range(60) if i % 12 % 3 != 1]
  np.testing.assert_allclose(frames.timestamps, np.array(numbers(frames)) / 25, atol=1e-3)
  assert frames.decode_errors == 0


def test_joined_recordings_are_counted_through(tmp_path):
  content = write_video(tmp_path / "a.ts").read_bytes()
  frames = read_frames(content + content, 6)
  assert frames.total_frames == 120
  assert numbers(frames) == [i % 60 for i in frames.indices]


def test_frames_take_the_size_of_the_first(tmp_path):
  small = write_video(tmp_path / "a.ts", VideoSpec(num_frames=20))
  large = write_video(tmp_path / "b.ts", VideoSpec(num_frames=20, height=128, width=192))
  frames = read_frames(small.read_bytes() + large.read_bytes(), 40)
  assert frames.images.shape == (40, 64, 96, 3)
  assert numbers(frames) == list(range(20)) * 2


@pytest.mark.parametrize(
  ("start", "end", "expected"),
  [
    (None, None, [0, 59]),
    (0.4, None, [10, 59]),
    (None, 1.2, [0, 29]),
    (0.4, 0.8, [10, 19]),  # The end is not included, so that spans tile.
    (0.41, 0.43, [10, 10]),  # No frame begins in the span: the one on screen.
    (2.39, None, [59, 59]),
    (1.0, 3.3, [25, 59]),  # Rounded up by the annotator.
  ],
)
def test_spans(tmp_path, start, end, expected):
  path = write_video(tmp_path / "a.mp4")
  frames = read_frames(path, 2, start=start, end=end)
  assert numbers(frames) == frames.indices.tolist() == expected
  np.testing.assert_allclose(frames.timestamps, frames.indices / 25, atol=1e-3)
  assert frames.total_frames == 60


@pytest.mark.parametrize(
  ("start", "end", "text"),
  [
    (2.4, None, "start = 2.4 lies outside: the video lasts 2.40 seconds; choose another start"),
    (-1.0, None, "start = -1 lies outside"),
    (float("nan"), None, "start = nan lies outside"),
    (1.0, 9.0, "end = 9 lies outside: the video lasts 2.40 seconds; choose another end"),
    (1.0, float("nan"), "end = nan lies outside"),
    (1.0, 0.5, "end = 0.5 is not after start = 1; choose another span"),
  ],
)
def test_spans_outside_of_the_video(tmp_path, start, end, text):
  path = write_video(tmp_path / "a.mp4")
  with pytest.raises(VideoError, match=text):
    read_frames(path, 2, start=start, end=end)


# Orientation.


@pytest.mark.parametrize(
  ("rotation", "mirrored"),
  [(0, False), (90, False), (180, False), (270, False), (0, True), (90, True), (270, True)],
)
def test_frames_are_upright(tmp_path, rotation, mirrored):
  def draw(number: int, height: int, width: int) -> np.ndarray:
    """The picture that the file's rotation, and then its mirroring, make upright again."""
    upright = numbered_frame(number, *((height, width) if rotation % 180 == 0 else (width, height)))
    return np.rot90(upright[:, ::-1] if mirrored else upright, -rotation // 90)

  spec = VideoSpec(num_frames=5, rotation=rotation, mirrored=mirrored, draw=draw)
  path = write_video(tmp_path / "a.mp4", spec)
  with av.open(str(path)) as container:
    stored = next(container.decode(video=0))
  assert (stored.height, stored.width) == (64, 96)
  assert ("DISPLAYMATRIX" in stored.side_data) == bool(rotation or mirrored)
  frames = read_frames(path, 5)
  assert numbers(frames) == [0, 1, 2, 3, 4]
  assert (frames.height, frames.width) == frames.images.shape[1:3]
  assert frames.images.shape[1:3] == ((64, 96) if rotation % 180 == 0 else (96, 64))
  corner = frames.images[:, :8, :8].mean((0, 1, 2))
  assert corner[0] > 150
  assert corner[1] < 80
  if not mirrored:
    assert frames.rotation == rotation


# Memory.


def test_transform_sees_each_frame_once_and_frees_it(tmp_path):
  path = write_video(tmp_path / "a.mp4", VideoSpec(num_frames=5))
  alive: list[weakref.ref] = []

  def transform(image: np.ndarray) -> int:
    assert all(frame() is None for frame in alive)
    alive.append(weakref.ref(image))
    return read_number(image)

  frames = read_frames(path, 8, transform=transform)
  assert frames.images == frames.indices.tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
  assert len(alive) == 5
  assert (frames.height, frames.width) == (64, 96)


def test_memory_and_files_do_not_pile_up(tmp_path):
  path = write_video(tmp_path / "a.mp4", VideoSpec(num_frames=20, height=360, width=640))
  process = psutil.Process()
  for _ in range(5):
    read_frames(path, 8)
  memory, files = process.memory_info().rss, process.num_fds()
  for _ in range(40):
    read_frames(path, 8)
  # One leaked read is 5.5 MB of pixels; forty are 221 MB.
  assert process.memory_info().rss - memory < 20e6
  assert process.num_fds() == files
