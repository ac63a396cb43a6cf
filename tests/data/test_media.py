# SPDX-License-Identifier: Apache-2.0
"""Media in archives and folders: the same records, nothing of what lies outside, and plans."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.media import Media
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig, PrepareError
from slowfast_jax.data.prepare_plan import format_plan, plan
from slowfast_jax.data.records import RecordSource
from slowfast_jax.errors import UserError
from tests.data.video_files import VideoSpec, write_video

CONFIG = PrepareConfig(num_frames=3, size=16, shards=2, workers=1)


def entry(media: str, kind: str = "video", question: str = "What?") -> dict:
  turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": "That."}]
  return {"id": media, kind: media, "conversations": turns}


def annotate(path, entries):
  path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder of media with annotations, and the same as archives."""
  root = tmp_path_factory.mktemp("media")
  folder = root / "folder"
  (folder / "deep").mkdir(parents=True)
  for i, name in enumerate(["a.mp4", "deep/b.mkv"]):
    write_video(folder / name, VideoSpec(num_frames=6 + i))
  Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "deep/c.png")
  for suffix, mode in {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz"}.items():
    with tarfile.open(root / f"all.{suffix}", mode) as archive:
      archive.add(folder, arcname=".")  # Members are called "./a.mp4", as of `tar -C`.
  entries = [entry("a.mp4"), entry("deep/b.mkv"), entry("deep/c.png", "image"), entry("gone.mp4")]
  return root, annotate(root / "train.jsonl", entries)


def content(folder) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.glob("*.array_record-*")}


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
  root, annotations = made
  output = tmp_path_factory.mktemp("expected") / "records"
  prepare(root / "folder", annotations, output, CONFIG)
  return content(output)


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz", "all.tgz"])
def test_an_archive_gives_the_records_of_its_folder(made, expected, tmp_path, name):
  root, annotations = made
  report = prepare(root / name, annotations, tmp_path / "records", CONFIG)
  assert content(tmp_path / "records") == expected
  assert (report.records, report.errors) == (3, 1)
  (error,) = (tmp_path / "records" / "errors.jsonl").read_text().splitlines()
  assert json.loads(error)["file"] == "gone.mp4"
  assert json.loads(error)["reason"].startswith("there is no such file")
  assert not (tmp_path / "records/.prepare/scratch").exists()
  again = prepare(root / name, annotations, tmp_path / "records", CONFIG)
  assert again.resumed_shards == 2


def test_media_may_be_spread_over_several_places(made, expected, tmp_path):
  root, annotations = made
  shutil.copytree(root / "folder/deep", tmp_path / "rest/deep")
  with tarfile.open(tmp_path / "first.tar", "w") as archive:
    archive.add(root / "folder/a.mp4", arcname="a.mp4")
  places = [tmp_path / "first.tar", tmp_path / "rest"]
  prepare(places, annotations, tmp_path / "records", CONFIG)
  assert content(tmp_path / "records") == expected
  both = Media([root / "all.tar", root / "folder"]).open().find("a.mp4")
  with pytest.raises(UserError, match="is in several places: .*all.tar and .*leave one of them"):
    both.open()


def member(name: str, **fields) -> tarfile.TarInfo:
  info = tarfile.TarInfo(name)
  for field, value in fields.items():
    setattr(info, field, value)
  return info


def test_only_regular_members_below_the_archive_can_be_named(tmp_path):
  secret = tmp_path / "secret.mp4"
  secret.write_bytes(b"secret")
  with tarfile.open(tmp_path / "evil.tar", "w") as archive:
    archive.addfile(member("good.mp4", size=3), io.BytesIO(b"old"))
    archive.addfile(member("./x/../good.mp4", size=3), io.BytesIO(b"new"))
    archive.addfile(member("../up.mp4", size=3), io.BytesIO(b"bad"))
    archive.addfile(member("/abs.mp4", size=3), io.BytesIO(b"bad"))
    archive.addfile(member("soft.mp4", type=tarfile.SYMTYPE, linkname=str(secret)))
    archive.addfile(member("hard.mp4", type=tarfile.LNKTYPE, linkname="../secret.mp4"))
    archive.addfile(member("pipe.mp4", type=tarfile.FIFOTYPE))
    archive.addfile(member("folder.mp4", type=tarfile.DIRTYPE))
  media = Media(tmp_path / "evil.tar").open()
  with media.find("good.mp4").open() as file:
    assert file.read() == b"new"
  for name in ("soft.mp4", "hard.mp4", "pipe.mp4", "folder.mp4", "up.mp4", "abs.mp4", "secret.mp4"):
    with pytest.raises(UserError, match=f"{name}: there is no such file"):
      media.find(name).open()


def test_links_lead_out_of_a_folder_only_if_that_is_allowed(tmp_path):
  folder = tmp_path / "folder"
  (folder / "deep").mkdir(parents=True)
  (tmp_path / "secret.mp4").write_bytes(b"secret")
  (folder / "inside.mp4").write_bytes(b"inside")
  os.symlink("../secret.mp4", folder / "out.mp4")
  os.symlink("../inside.mp4", folder / "deep/in.mp4")
  os.symlink(tmp_path, folder / "up")
  media = Media(folder)
  assert media.find("deep/in.mp4").num_bytes() == 6
  for name in ("out.mp4", "up/secret.mp4"):
    medium = media.find(name)
    assert medium.num_bytes() is None
    with pytest.raises(
      UserError, match="is a link to .*secret.mp4, outside of the folder; --follow"
    ):
      medium.open()
    assert Media(folder, follow_links=True).find(name).num_bytes() == 6
  # The folder itself may be a link: the user named it.
  os.symlink(folder, tmp_path / "alias")
  assert Media(tmp_path / "alias").find("inside.mp4").num_bytes() == 6


def test_damaged_archives_are_named(made, tmp_path):
  root, annotations = made
  for name, keep in {"all.tar": 0.2, "all.tar.gz": 0.7, "all.tgz": 0.01}.items():
    data = (root / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(PrepareError, match=f"{name}: is no whole archive.*download it again"):
      prepare(tmp_path / name, annotations, tmp_path / "records", CONFIG)
  (tmp_path / "text.tar").write_text("no archive")
  with pytest.raises(PrepareError, match="text.tar: is no whole archive"):
    Media(tmp_path / "text.tar").open()
  tarfile.open(tmp_path / "empty.tar", "w").close()
  with pytest.raises(PrepareError, match="empty.tar: the archive holds no file"):
    Media(tmp_path / "empty.tar").open()
  with pytest.raises(PrepareError, match="is neither a folder nor a .tar"):
    Media(annotations)


def test_parts_of_an_archive_read_like_files(made):
  root, _ = made
  whole = (root / "folder/a.mp4").read_bytes()
  for name in ("all.tar", "all.tar.gz"):
    with Media(root / name).open().find("a.mp4").open() as file:
      assert file.read() == whole
      assert file.seek(-10, os.SEEK_END) == len(whole) - 10
      assert file.read(100) == whole[-10:]
      assert (file.seek(7), file.read(3), file.tell()) == (7, whole[7:10], 10)
      with pytest.raises((OSError, ValueError)):
        file.seek(-1)


def test_equal_files_are_one_record_with_the_conversations_of_all(made, tmp_path):
  root, _ = made
  folder = shutil.copytree(root / "folder", tmp_path / "folder")
  shutil.copy(folder / "a.mp4", folder / "z.mp4")
  shutil.copy(folder / "a.mp4", folder / "deep/y.mp4")
  flipped = bytearray((folder / "a.mp4").read_bytes())
  flipped[-1] ^= 1
  (folder / "same_size.mp4").write_bytes(flipped)
  names = ["z.mp4", "deep/b.mkv", "a.mp4", "same_size.mp4", "deep/y.mp4", "gone.mp4", "gone2.mp4"]
  file = annotate(tmp_path / "train.jsonl", [entry(name, question=name) for name in names])
  config = PrepareConfig(num_frames=3, size=16, shards=1, workers=1, dedup=True)
  report = prepare(folder, file, tmp_path / "records", config)
  assert (report.records, report.conversations, report.duplicates, report.errors) == (3, 5, 2, 2)
  first, *others = RecordSource(tmp_path / "records")
  assert [record.source for record in others] == ["deep/b.mkv", "same_size.mp4"]
  assert (first.id, first.source) == ("z.mp4", "z.mp4")
  assert first.metadata["duplicates"] == ["a.mp4", "deep/y.mp4"]
  assert [e["id"] for e in first.metadata["entries"]] == ["z.mp4", "a.mp4", "deep/y.mp4"]
  asked = [turns[0]["value"] for turns in first.conversations]
  assert asked == [f"<video>\n{name}" for name in ("z.mp4", "a.mp4", "deep/y.mp4")]
  apart = prepare(folder, file, tmp_path / "apart", CONFIG)
  assert (apart.records, apart.conversations, apart.duplicates) == (5, 5, 0)


@pytest.mark.parametrize("name", ["folder", "all.tar", "all.tar.gz"])
def test_a_plan_says_what_there_is(made, tmp_path, name):
  root, annotations = made
  lines = annotations.read_text() + json.dumps({"conversations": entry("")["conversations"]})
  file = tmp_path / "train.jsonl"
  file.write_text(lines + "\n{}\n")
  found = plan(root / name, file, CONFIG)
  assert (found.videos, found.images, found.texts, found.conversations) == (3, 1, 1, 5)
  assert (found.bad_annotations, found.missing, found.probed) == (1, 1, 2)
  files = [file for file in (root / "folder").rglob("*") if file.is_file()]
  assert found.source_bytes == sum(file.stat().st_size for file in files)
  assert found.video_hours * 3600 == pytest.approx(3 * 6.5 / 25, rel=0.05)
  assert (found.tried, found.failed, found.frames) == (4, 0, 3 + 3 + 1)
  assert found.output_bytes > 0 < found.cpu_hours
  shown = format_plan(found)
  for words in ("3 videos, 1 images, 1 texts", "1 files are missing", "about 7 frames"):
    assert words in shown
