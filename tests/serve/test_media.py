# SPDX-License-Identifier: Apache-2.0
"""Media that lie, that are too large, or that are not the client's: refused with a reason."""

import base64
import io
import os
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks.serve_hostile import data_url, huge_png, small_png
from slowfast_jax.serve.decode import DecodedMedia, DecodePool, FrameSpec
from slowfast_jax.serve.errors import ApiError
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import FramesCache, MediaReader
from slowfast_jax.serve.sniff import sniff
from slowfast_jax.serve.uploads import Uploads
from tests.data.video_files import VideoSpec, write_video

LIMITS = Limits(
  body_mb=1, upload_mb=2, video_seconds=10, video_frames=400, megapixels=0.5, decode_seconds=20
)
SPEC = FrameSpec(16, 8, "uniform", 2.0, "siglip", (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def pool():
  with DecodePool(1, SPEC, LIMITS) as pool:
    yield pool


@pytest.fixture
def uploads():
  uploads = Uploads(LIMITS.upload_bytes)
  yield uploads
  uploads.close()


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "allowed").mkdir()
  return tmp_path / "allowed"


@pytest.fixture
def reader(pool, uploads, folder):
  return MediaReader(pool.decode, LIMITS, uploads, [folder])


def refused(status, code, read):
  with pytest.raises(ApiError) as caught:
    read()
  assert (caught.value.status, caught.value.code) == (status, code)
  return caught.value.message


def many_frames(count, fps=1000, size=16):
  """A small video of many frames, all but the first of them nothing but "as before"."""
  file = io.BytesIO()
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
    stream.width = stream.height = size
    stream.pix_fmt, stream.gop_size = "yuv420p", 10**6
    frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")
    for number in range(count):
      frame.pts, frame.time_base = number, Fraction(1, fps)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return file.getvalue()


def test_a_video_and_an_image_become_frames(reader, folder):
  write_video(folder / "a.mp4", VideoSpec(num_frames=20))
  video = reader.from_url(data_url((folder / "a.mp4").read_bytes(), "video/mp4"), "video")
  assert video.frames.images.shape == (8, 16, 16, 3)
  assert video.frames.duration == pytest.approx(0.8)
  image = reader.from_url(data_url(small_png(), "image/png"), "image")
  assert image.frames.images.shape == (1, 16, 16, 3)
  assert reader.from_url(str(folder / "a.mp4"), "video") is video  # Decoded once.


def test_paths_out_of_the_folder_are_refused(reader, folder, tmp_path):
  secret = write_video(tmp_path / "secret.mp4", VideoSpec(num_frames=2))
  (folder / "link.mp4").symlink_to(secret)
  (folder / "dir").symlink_to(tmp_path)
  os.mkfifo(folder / "pipe")
  outside = [
    secret,
    f"{folder}/../secret.mp4",
    f"file://{folder}/%2e%2e/secret.mp4",
    folder / "link.mp4",
    folder / "dir/secret.mp4",
    f"{folder}-other/a.mp4",
    "/etc/passwd",
    "/proc/self/environ",
    "secret.mp4",
    tmp_path / "missing.mp4",
  ]
  for path in outside:
    message = refused(403, "path_not_allowed", lambda path=path: reader.from_url(str(path), None))
    assert "not in a folder" in message
  refused(403, "path_not_allowed", lambda: reader.from_url(str(folder / "pipe"), None))
  for name in ("", "missing.mp4", "a\0b", "x" * 5000):
    refused(404, "file_not_found", lambda name=name: reader.from_url(f"{folder}/{name}", None))


def test_without_an_allowed_folder_no_path_is_read(pool, uploads, folder):
  reader = MediaReader(pool.decode, LIMITS, uploads)
  write_video(folder / "a.mp4", VideoSpec(num_frames=2))
  refused(403, "path_not_allowed", lambda: reader.from_url(str(folder / "a.mp4"), None))


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.mp4", "HTTPS://x/a", "ftp://x/a", "gs://x/a"])
def test_addresses_are_not_fetched(reader, url):
  refused(400, "remote_url", lambda: reader.from_url(url, None))


def test_labels_that_lie_are_refused(reader, folder):
  video = write_video(folder / "a.mp4", VideoSpec(num_frames=2)).read_bytes()
  lies = [(small_png(), "image/jpeg"), (small_png(), "video/mp4"), (video, "image/png")]
  lies += [(video, "video/webm"), (b"#EXTM3U\nhttp://x", "video/mp4"), (b"MZ" * 50, "video/mp4")]
  for content, label in lies:
    code = "mislabelled_media" if content[:1] not in b"#M" else "unsupported_media_type"
    refused(415, code, lambda c=content, u=label: reader.from_url(data_url(c, u), None))
  refused(415, "mislabelled_media", lambda: reader.from_content(video, "", "image"))
  assert reader.from_content(video, "video/quicktime", "video")


def test_kinds_of_files_are_told_by_their_content(tmp_path):
  encoders = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "ts": "libx264", "webm": "vp9"}
  for suffix, codec in encoders.items():
    path = write_video(tmp_path / f"a.{suffix}", VideoSpec(num_frames=3, codec=codec))
    assert sniff(path.read_bytes()).kind == "video", suffix
  for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, name)
    assert sniff(file.getvalue()).mime == f"image/{name.lower()}"
  heic = b"\0\0\0\x18ftypheic" + bytes(400)
  refused(415, "unsupported_media_type", lambda: sniff(heic))


def test_bombs_are_refused_before_they_are_made(reader):
  for content in (huge_png(60_000, 60_000), huge_png(2**31 - 1, 2**31 - 1)):
    refused(413, "media_too_large", lambda c=content: reader.from_content(c, "", None))
  message = refused(413, "media_too_large", lambda: reader.from_content(many_frames(500), "", None))
  assert "more than 400 frames" in message
  slow = many_frames(20, fps=1)
  message = refused(413, "media_too_large", lambda: reader.from_content(slow, "", None))
  assert "longer than 10 seconds" in message
  large = many_frames(1, size=1024)
  message = refused(413, "media_too_large", lambda: reader.from_content(large, "", None))
  assert "1024 x 1024" in message
  refused(413, "too_large", lambda: reader.from_content(bytes(1_000_001), "", None))


def test_damage_is_told(reader, folder):
  video = write_video(folder / "a.mp4", VideoSpec(num_frames=20)).read_bytes()
  for content in (video[: len(video) // 2], video[:40], small_png()[:40]):
    refused(400, "unreadable_media", lambda c=content: reader.from_content(c, "", None))
  for url in ("data:,abc", "data:video/mp4;base64,%%%", "data:" + "x" * 1000, "data:"):
    refused(400, "bad_url", lambda u=url: reader.from_url(u, None))


def test_equal_content_is_decoded_once_and_a_failure_by_itself():
  started, go, count = threading.Event(), threading.Event(), []

  def decode(content, kind):
    count.append(content)
    started.set()
    go.wait(10)
    if content == b"bad":
      raise ApiError(400, "Bad.", "unreadable_media")
    return DecodedMedia(np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.float32), 0.0)

  cache, found = FramesCache(decode, 100), []
  threads = [threading.Thread(target=lambda: found.append(cache.get(b"a", "image")))] * 1
  threads += [threading.Thread(target=lambda: found.append(cache.get(b"a", "image")))]
  for thread in threads:
    thread.start()
  assert started.wait(10)
  go.set()
  for thread in threads:
    thread.join()
  assert len(count) == 1
  assert found[0] is found[1]
  for _ in range(2):
    refused(400, "unreadable_media", lambda: cache.get(b"bad", "image"))
  assert len(count) == 3
  # 48 bytes each: the third pushes out the one that was not used for longest.
  for content in (b"b", b"a", b"c", b"a"):
    cache.get(content, "image")
  assert count[3:] == [b"b", b"c"]
  cache.get(b"b", "image")
  assert count[-1] == b"b"


def test_uploads_make_room_and_cannot_be_guessed(uploads):
  first = uploads.add(bytes(900_000), "../../a.mp4", "user_data")
  second = uploads.add(bytes(900_000), "b.mp4", "user_data")
  assert uploads.content(first.id) == bytes(900_000)
  third = uploads.add(b"x" * 900_000, "c.mp4", "user_data")
  assert [upload.id for upload in uploads.all()] == [first.id, third.id]
  for missing in (second.id, "../" + third.id, "", "file-"):
    refused(404, "file_not_found", lambda name=missing: uploads.content(name))
  refused(413, "too_large", lambda: uploads.add(bytes(2_000_001), "d", "user_data"))
  assert len(base64.b16decode(third.id[5:], casefold=True)) == 12
