# SPDX-License-Identifier: Apache-2.0
"""Damaged videos lose only what is lost, and files that are no video are explained."""

import io
import pathlib

import av
import numpy as np
import psutil
import pytest

from slowfast_jax.data.video import Frames, VideoError, frame_indices, read_frames
from slowfast_jax.errors import UserError
from tests.data.video_files import (
  VideoSpec,
  read_number,
  rewrite_packets,
  write_audio,
  write_video,
)


def numbers(frames: Frames) -> list[int]:
  return [read_number(image) for image in frames.images]


# Damage.


def damaged(tmp_path: pathlib.Path, broken: set[int]) -> pathlib.Path:
  """Ten frames that each stand alone, some of them overwritten."""
  whole = write_video(tmp_path / "whole.mkv", VideoSpec(num_frames=10, gop=1))
  edit = lambda i, packet: bytes(len(packet)) if i in broken else packet  # noqa: E731
  return rewrite_packets(whole, tmp_path / "damaged.mkv", edit)


def test_lost_frames_are_dropped_and_counted(tmp_path):
  frames = read_frames(damaged(tmp_path, {0, 4, 5, 9}), 10)
  assert numbers(frames) == frames.indices.tolist() == [1, 2, 3, 6, 7, 8]
  np.testing.assert_allclose(frames.timestamps, frames.indices / 25, atol=1e-3)
  assert frames.decode_errors == 4
  assert frames.total_frames == 10


def test_a_video_that_lost_more_than_half_is_refused(tmp_path):
  assert len(read_frames(damaged(tmp_path, {0, 1, 2, 3, 9}), 10).images) == 5
  with pytest.raises(VideoError, match="6 of the 10 wanted frames are damaged or missing; copy"):
    read_frames(damaged(tmp_path, {0, 1, 2, 3, 8, 9}), 10)


def cut(tmp_path: pathlib.Path, name: str, share: float) -> pathlib.Path:
  options = {"movflags": "faststart"} if name.endswith("mp4") else {}
  path = write_video(tmp_path / name, VideoSpec(num_frames=200, container_options=options))
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])
  return path


def test_an_mp4_that_was_cut_off_misses_its_last_frames(tmp_path):
  path = cut(tmp_path, "a.mp4", 0.7)
  frames = read_frames(path, 10)
  planned = frame_indices(200, 25.0, 10)
  assert frames.total_frames == 200
  assert frames.duration == pytest.approx(8.0, abs=0.1)
  assert 0 < frames.decode_errors == 10 - len(frames.images)
  assert numbers(frames) == frames.indices.tolist() == planned[: len(frames.images)]
  with pytest.raises(VideoError, match="4 of the 4 wanted frames are damaged or missing"):
    read_frames(path, 4, start=7.0)


def test_a_stream_that_was_cut_off_is_as_long_as_what_is_left(tmp_path):
  frames = read_frames(cut(tmp_path, "a.ts", 0.5), 10)
  assert 50 < frames.total_frames < 150
  assert len(frames.images) == 10
  np.testing.assert_allclose(frames.timestamps, np.array(numbers(frames)) / 25, atol=1e-3)


def _harm(rng: np.random.Generator, content: bytes) -> bytes:
  """Overwrites, removes or cuts some of the content, anywhere."""
  data, at, length = bytearray(content), rng.integers(len(content)), rng.integers(1, 2000)
  match rng.integers(4):
    case 0:
      return bytes(data[: at + 1])
    case 1:
      del data[at : at + length]
    case 2:
      data[at : at + length] = rng.bytes(length)
    case _:
      for i in rng.integers(len(data), size=rng.integers(1, 40)):
        data[i] = rng.integers(256)
  return bytes(data)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv", "avi", "h264"])
def test_whatever_the_damage_there_are_true_frames_or_a_clear_error(tmp_path, suffix):
  content = write_video(tmp_path / f"a.{suffix}").read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(60):
    try:
      frames = read_frames(_harm(rng, content), 12)
    except VideoError:
      continue
    assert 0 < len(frames.images) == len(frames.indices) == len(frames.timestamps)
    assert (np.diff(frames.indices) >= 0).all()
    assert (np.diff(frames.timestamps) >= 0).all()
    assert 0 <= frames.indices[0] <= frames.indices[-1] < frames.total_frames
    assert 0 <= frames.timestamps[0] <= frames.timestamps[-1] <= frames.duration


# What is no video.

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"


def _write(path: pathlib.Path, content: bytes) -> pathlib.Path:
  path.write_bytes(content)
  return path


def _empty_track(path: pathlib.Path) -> pathlib.Path:
  with av.open(str(path), "w") as container:
    container.add_stream("mpeg4", rate=25)
    container.start_encoding()
  return path


def _unknown_codec(path: pathlib.Path) -> pathlib.Path:
  return _write(path, write_video(path).read_bytes().replace(b"avc1", b"zzzz"))


BROKEN = {
  "missing.mp4": (lambda path: path, "there is no such file; check the path"),
  "folder": (lambda path: path.mkdir() or path, "is a directory; give the path of one video file"),
  "empty.mp4": (lambda path: _write(path, b""), "the file is empty; copy or download it again"),
  "cut.mp4": (
    lambda path: _write(path, write_video(path).read_bytes()[:-1000]),
    "the MP4 file has no usable index (moov atom), as when a download or recording was cut; "
    "copy or download it again",
  ),
  "cut_early.mp4": (
    lambda path: cut(path.parent, path.name, 0.01),
    "holds no audio or video at all, as when a recording was cut; copy or download it again",
  ),
  "no_frames.mkv": (_empty_track, "ends before its first frame; copy or download it again"),
  "no_frames.avi": (
    _empty_track,
    "holds no readable frame; copy or download it again, or leave it out",
  ),
  "no_pictures.mkv": (
    lambda path: damaged(path.parent, set(range(10))).rename(path),
    "10 of the 10 wanted frames are damaged or missing; copy or download it again, or leave it out",
  ),
  "sound.m4a": (
    write_audio,
    "has no video stream (it holds: audio); leave it out, or check that it is the right file",
  ),
  "song.mp3": (
    lambda path: write_audio(path, cover=True),
    "has no video stream (it holds: audio, cover picture); "
    "leave it out, or check that it is the right file",
  ),
  "noise.mp4": (
    lambda path: _write(path, np.random.default_rng(0).bytes(50_000)),
    "is not a video file (Invalid data found when processing input); "
    "convert it to MP4 or leave it out",
  ),
  "page.txt": (
    lambda path: _write(path, b"<html>404 not found</html>\n" * 50),
    "is not a video file (its format is not one of single videos); "
    "convert it to MP4 or leave it out",
  ),
  "network.m3u8": (
    lambda path: _write(path, PLAYLIST.encode()),
    "is not a video file (its format is not one of single videos); "
    "convert it to MP4 or leave it out",
  ),
  "other_files.ffconcat": (
    lambda path: _write(path, b"ffconcat version 1.0\nfile '/etc/hostname'\n"),
    "is not a video file (its format is not one of single videos); "
    "convert it to MP4 or leave it out",
  ),
  "unknown_codec.mp4": (_unknown_codec, "cannot decode its video codec; convert it to H.264"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_explained(tmp_path, name):
  make, text = BROKEN[name]
  path = make(tmp_path / name)
  before = psutil.Process().num_fds()
  with pytest.raises(VideoError) as error:
    read_frames(path, 10)
  assert str(error.value) == f"{path}: {text}"
  assert isinstance(error.value, UserError)
  assert psutil.Process().num_fds() == before


def test_broken_content_in_memory_is_explained():
  with pytest.raises(VideoError, match=r"^video in memory: the file is empty"):
    read_frames(b"", 4)
  with pytest.raises(VideoError, match=r"^video in memory: is not a video file"):
    read_frames(io.BytesIO(b"no video"), 4)


def test_wrong_arguments_fail_before_the_file_is_read():
  with pytest.raises(ValueError, match="must be at least 1, got 1 and 0") as error:
    read_frames("missing.mp4", 0)
  assert not isinstance(error.value, VideoError)
