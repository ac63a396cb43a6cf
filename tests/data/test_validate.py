# SPDX-License-Identifier: Apache-2.0
"""Validation: every problem of annotations, files and records is told, with its place."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.data.validate import LengthLimit, validate_annotations, validate_records
from tests.data.video_files import VideoSpec, rewrite_packets, write_audio, write_video
from tests.train.tiny_run import record, write_records

TOKENIZER = train_tokenizer(["You are a helpful assistant."] * 9, 300)


def entry(media: str, kind: str = "video", question: str = "<video>\nWhat?", answer="That."):
  turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
  return {"id": media, kind: media, "conversations": turns}


def annotate(folder, entries):
  file = folder / "train.jsonl"
  file.write_text("".join(json.dumps(one) + "\n" for one in entries))
  return file


def told(findings) -> dict[int, str]:
  """Reasons by line."""
  return {int(p.place.rpartition(":")[2]): p.reason for p in findings.problems}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Good media, and media that are broken in many ways."""
  folder = tmp_path_factory.mktemp("clips")
  good = write_video(folder / "good.mp4", VideoSpec(num_frames=30))
  content = good.read_bytes()
  (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("no video")
  (folder / "folder.mp4").mkdir()
  write_audio(folder / "sound.m4a")
  whole = write_video(folder / "whole.mkv", VideoSpec(num_frames=30, gop=1))
  rewrite_packets(whole, folder / "damaged.mkv", lambda i, p: bytes(len(p)) if i == 29 else p)
  rewrite_packets(whole, folder / "zero.mkv", lambda i, p: bytes(len(p)))
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(folder / "good.png")
  picture = (folder / "good.png").read_bytes()
  (folder / "cut.png").write_bytes(picture[: len(picture) // 2])
  return folder


def test_every_broken_file_is_told_with_its_line(folder, tmp_path):
  expected = {
    "cut.mp4": "moov",
    "empty.mp4": "the file is empty",
    "text.mp4": "is not a video file",
    "folder.mp4": "is a directory",
    "sound.m4a": "has no video stream",
    "damaged.mkv": "1 of 3 frames that were tried are damaged or missing",
    "zero.mkv": "frames are damaged or missing",
    "gone.mp4": "there is no such file",
    "cut.png": "truncated",
  }
  names = ["good.mp4", *expected, "good.png"]
  kinds = ["image" if name.endswith("png") else "video" for name in names]
  file = annotate(tmp_path, [entry(name, kind) for name, kind in zip(names, kinds)])
  calls = []
  found = validate_annotations(file, folder, workers=2, progress=lambda *n: calls.append(n))
  assert (found.conversations, found.media) == (len(names), len(names))
  assert set(told(found)) == set(range(2, 2 + len(expected)))
  for line, (name, words) in enumerate(expected.items(), start=2):
    assert told(found)[line].startswith(f"{name}: ")
    assert words in told(found)[line], name
  assert calls[-1] == (len(names), len(names), len(expected))
  assert str(found.problems[0]).startswith(f"{file}:2: cut.mp4: ")


BAD_TALKS = {
  "no placeholder": (entry("a.mp4", question="What?"), r"0 placeholder"),
  "two placeholders": (entry("a.mp4", question="<video><image>?"), r"2 placeholder"),
  "placeholder in an answer": (entry("a.mp4", answer="<image>"), "may only stand in a human turn"),
  "text with a placeholder": ({"conversations": entry("")["conversations"]}, r"1 placeholder"),
  "no answer": (entry("a.mp4", answer=" "), "every gpt turn is empty"),
  "unknown role": (
    {"conversations": [{"from": "user", "value": "a"}]},
    '"from" must be one of',
  ),
  "too long": (entry("a.mp4", answer="word " * 99), "more than 150: its end would be cut off"),
  "video and image": (entry("first.mp4", "image"), "first.mp4 is image here and video in line 1"),
}


@pytest.mark.parametrize(("bad", "words"), BAD_TALKS.values(), ids=BAD_TALKS)
def test_every_wrong_conversation_is_told_with_its_line(tmp_path, bad, words):
  if bad.get("id") == "first.mp4":
    bad = bad | {"id": "other"}
  file = annotate(tmp_path, [entry("first.mp4"), bad, entry("last.mp4")])
  limit = LengthLimit(TOKENIZER, max_tokens=150, visual_tokens=64)
  found = validate_annotations(file, limit=limit)
  assert found.conversations == 3
  assert list(told(found)) == [2]
  assert words in told(found)[2]


def test_visual_tokens_count(tmp_path):
  file = annotate(
    tmp_path, [entry("a.mp4"), {"conversations": entry("", question="?")["conversations"]}]
  )
  limit = LengthLimit(TOKENIZER, max_tokens=150, visual_tokens=149)
  assert list(told(validate_annotations(file, limit=limit))) == [1]


def test_good_annotations_have_no_problem(folder, tmp_path):
  file = annotate(tmp_path, [entry("good.mp4"), entry("good.png", "image")])
  limit = LengthLimit(TOKENIZER, max_tokens=150)
  assert validate_annotations(file, folder, limit).problems == []


def test_what_validation_lets_through_is_prepared(folder, tmp_path):
  """And what it does not is what `prepare` leaves out."""
  names = sorted(file.name for file in folder.iterdir())
  kinds = ["image" if name.endswith("png") else "video" for name in names]
  file = annotate(tmp_path, [entry(name, kind) for name, kind in zip(names, kinds)])
  config = PrepareConfig(num_frames=3, size=16, workers=1)
  report = prepare(folder, file, tmp_path / "records", config)
  lines = (tmp_path / "records/errors.jsonl").read_text().splitlines()
  left_out = {json.loads(line)["line"] for line in lines}
  found = told(validate_annotations(file, folder))
  assert left_out == {line for line, reason in found.items() if "1 of 3" not in reason}
  assert report.lost_frames == 1
  assert validate_records(tmp_path / "records").problems == []


# Records.


def test_problems_of_records(tmp_path):
  good = record(0)
  wrong = {
    "no jpeg": (dataclasses.replace(good, frames=[b"no"] * 4), "a frame is no readable JPEG"),
    "no frame": (dataclasses.replace(good, frames=[]), "kind 'video' has no frame"),
    "times": (dataclasses.replace(good, frames=good.frames[:2]), "2 frames, 4 timestamps"),
    "order": (dataclasses.replace(good, timestamps=good.timestamps[::-1]), "not in the order"),
    "talks": (dataclasses.replace(good, conversations=[]), "names conversation 0, and it has 0"),
    "roles": (
      dataclasses.replace(good, conversations=[[{"from": "user", "value": ""}]]),
      '"from" must be one of',
    ),
  }
  records = [dataclasses.replace(one, id=name) for name, (one, _) in wrong.items()]
  write_records(tmp_path / "records", [good, *records])
  found = validate_records(tmp_path / "records")
  assert (found.conversations, found.media) == (7, 7)
  for i, (name, (_, words)) in enumerate(wrong.items(), start=1):
    place = f"{tmp_path / 'records'}: record {i} ({name})"
    reasons = [p.reason for p in found.problems if p.place.startswith(place)]
    assert any(words in reason for reason in reasons), (name, reasons)
  assert not any("record 0" in problem.place for problem in found.problems)


def test_a_shard_that_is_cut_off_is_told_record_by_record(tmp_path):
  write_records(tmp_path / "records", [record(i) for i in range(3)])
  (shard,) = (tmp_path / "records").glob("*.array_record-*")
  shutil.copy(shard, tmp_path / "whole")
  shard.write_bytes(shard.read_bytes()[:500])
  found = validate_records(tmp_path / "records")
  assert len(found.problems) == 3
  assert all("cut off or damaged" in problem.reason for problem in found.problems)
