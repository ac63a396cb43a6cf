# SPDX-License-Identifier: Apache-2.0
"""Preparing videos: what records hold, broken files, and runs that are killed and resumed."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data import records
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig, PrepareError
from slowfast_jax.data.preprocess import preprocess
from slowfast_jax.data.records import RecordSource, decode_frames
from slowfast_jax.data.video import read_frames
from slowfast_jax.errors import UserError
from tests.data.video_files import VideoSpec, rewrite_packets, write_audio, write_video

NUM_CLIPS = 12


def config(**changes) -> PrepareConfig:
  return PrepareConfig(**{"num_frames": 4, "size": 32, "shards": 3, "workers": 2} | changes)


def talk(question: str) -> list[dict]:
  return [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": "Yes."}]


def entry(media: str, i: int = 0, kind: str = "video", **extra) -> dict:
  return {"id": f"{media}-{i}", kind: media, "conversations": talk(f"{i}?"), **extra}


def annotate(folder, entries: list[dict]):
  file = folder / "train.jsonl"
  file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  return file


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """A folder of good clips, and a file that annotates them."""
  folder = tmp_path_factory.mktemp("clips")
  names = [f"{i:02d}.mp4" for i in range(NUM_CLIPS)]
  for i, name in enumerate(names):
    write_video(folder / name, VideoSpec(num_frames=8 + i))
  return folder, annotate(folder, [entry(name) for name in names])


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
  """Records that were prepared in one go, and their report."""
  output = tmp_path_factory.mktemp("whole") / "records"
  return output, prepare(*clips, output, config())


def shards(folder) -> dict[str, bytes]:
  files = {*folder.glob("*.array_record-*"), folder / "index.npy", folder / "texts.jsonl"}
  return {file.name: file.read_bytes() for file in files}


def errors(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


def test_a_record_holds_its_video(clips, whole):
  folder, _ = clips
  output, _ = whole
  source = RecordSource(output)
  assert sorted(record.source for record in source) == [f"{i:02d}.mp4" for i in range(NUM_CLIPS)]
  for record in source:
    frames = read_frames(folder / record.source, 4)
    np.testing.assert_array_equal(record.timestamps, frames.timestamps)
    np.testing.assert_array_equal(record.frame_indices, frames.indices)
    assert (record.height, record.width) == (64, 96)
    assert (record.fps, record.num_video_frames) == (25, frames.total_frames)
    assert record.duration == pytest.approx(frames.duration)
    exact = np.stack([preprocess(image, 32, "siglip") for image in frames.images])
    # JPEG halves the resolution of colour, so the small red corner bleeds.
    assert np.abs(decode_frames(record).astype(float) - exact).mean() < 6


def test_the_report(clips, whole):
  output, report = whole
  saved = json.loads((output / "report.json").read_text())
  assert saved["records"] == report.records == NUM_CLIPS
  assert saved["conversations"] == NUM_CLIPS
  assert saved["frames"] == 4 * NUM_CLIPS
  assert saved["errors"] == saved["resumed_shards"] == 0
  assert saved["shards"] == 3
  assert saved["seconds"] > 0 < saved["cpu_seconds"]
  assert saved["settings"]["num_frames"] == 4
  assert errors(output) == []


def test_texts_are_known_without_reading_frames(whole, tmp_path):
  output, _ = whole
  expected = [records.text_of(record) for record in RecordSource(output)]
  assert list(RecordSource(output).texts()) == expected
  copy = shutil.copytree(output, tmp_path / "records")
  for file in copy.glob("*.array_record-*"):
    file.write_bytes(b"")
  assert list(RecordSource(copy).texts()) == expected
  (copy / "texts.jsonl").unlink()
  assert list(RecordSource(copy).texts()) == [None] * NUM_CLIPS
  copy = shutil.copytree(output, tmp_path / "foreign")
  (copy / "texts.jsonl").unlink()
  assert list(RecordSource(copy).texts()) == expected


def test_entries_of_one_video_are_one_record(clips, tmp_path):
  questions = [{"text": "Wo?", "weight": 0.5}]
  file = annotate(
    tmp_path,
    [
      entry("00.mp4", 0, questions=questions),
      entry("01.mp4"),
      entry("./00.mp4", 1),
      {"id": "t", "conversations": talk("text")},
    ],
  )
  output = tmp_path / "records"
  report = prepare(clips[0], file, output, config(shards=1))
  assert (report.records, report.conversations) == (3, 4)
  source = RecordSource(output)
  assert source.index.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
  assert source[0].conversations == [talk("0?"), talk("1?")]
  entries = [{"id": "00.mp4-0", "questions": questions}, {"id": "./00.mp4-1"}]
  assert source[0].metadata == {
    "kind": "video",
    "entries": entries,
    "decode_errors": 0,
    "rotation": 0,
  }
  assert (source[2].id, source[2].source, source[2].frames) == ("t", "", [])


def test_each_text_is_a_record(clips, tmp_path):
  file = tmp_path / "one_line.json"
  file.write_text(json.dumps([{"conversations": talk("a")}, {"conversations": talk("b")}]))
  prepare(clips[0], file, tmp_path / "records", config(workers=1, shards=1))
  texts = [record.conversations for record in RecordSource(tmp_path / "records")]
  assert texts == [[talk("a")], [talk("b")]]


def test_still_images_are_padded(tmp_path):
  pixels = np.full((20, 40, 3), 200, np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  file = annotate(tmp_path, [entry("a.png", kind="image")])
  prepare(tmp_path, file, tmp_path / "records", config(policy="siglip", workers=1))
  record = RecordSource(tmp_path / "records")[0]
  assert (record.metadata["kind"], record.height, record.width) == ("image", 20, 40)
  (image,) = decode_frames(record)
  assert image.shape == (32, 32, 3)
  assert abs(int(image[1, 16, 0]) - 127) < 3
  assert abs(int(image[16, 16, 0]) - 200) < 3


def test_sampler_size_and_policy_take_effect(clips, tmp_path):
  file = annotate(tmp_path, [entry("00.mp4")])
  changes = {"sampler": "fps", "target_fps": 12.5, "num_frames": 9, "size": 24, "policy": "clip"}
  prepare(clips[0], file, tmp_path / "records", config(quality=100, **changes))
  record = RecordSource(tmp_path / "records")[0]
  assert record.frame_indices.tolist() == [0, 2, 4, 6]
  image = read_frames(clips[0] / "00.mp4", 1).images[0]
  difference = decode_frames(record)[0].astype(float) - preprocess(image, 24, "clip")
  assert np.abs(difference).mean() < 6
  low = prepare(clips[0], file, tmp_path / "low", config(quality=5, **changes))
  assert low.num_bytes < sum(map(len, record.frames))


def test_the_number_of_workers_changes_no_byte(clips, whole, tmp_path):
  prepare(*clips, tmp_path / "records", config(workers=1))
  assert shards(tmp_path / "records") == shards(whole[0])


# Killed and resumed.


def start(videos, file, output, *options) -> subprocess.Popen:
  command = f"prepare --videos {videos} --annotations {file} --output {output}"
  settings = "--frames 4 --size 32 --shards 3 --workers 2"
  words = [*command.split(), *settings.split(), *options]
  return subprocess.Popen(
    [sys.executable, "-m", "slowfast_jax.cli.main", *words], stderr=subprocess.PIPE, text=True
  )


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(clips, whole, tmp_path, finished):
  output = tmp_path / "records"
  marks = {0: ".prepare/*.tmp", 1: ".prepare/shard-00000.json", 2: ".prepare/shard-00001.json"}
  with start(*clips, output) as process:
    while not list(output.glob(marks[finished])):
      assert process.poll() is None
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
  with pytest.raises(UserError, match=r"preparing it has not finished|not a records folder"):
    RecordSource(output)
  report = prepare(*clips, output, config())
  assert report.resumed_shards >= finished
  assert shards(output) == shards(whole[0])
  assert not list(output.glob(".prepare/*.tmp"))
  assert (output / "dataset_info.json").read_text() == (whole[0] / "dataset_info.json").read_text()


def test_shards_that_went_bad_are_made_anew(clips, whole, tmp_path):
  output = shutil.copytree(whole[0], tmp_path / "records")
  first, second, _ = sorted(output.glob("*.array_record-*"))
  first.unlink()
  second.write_bytes(second.read_bytes()[:1000])
  report = prepare(*clips, output, config())
  assert report.resumed_shards == 1
  assert shards(output) == shards(whole[0])


def test_a_finished_folder_is_left_alone(clips, whole):
  output, report = whole
  before = {file: file.stat().st_mtime_ns for file in output.glob("*.*")}
  del before[output / "errors.jsonl"]
  again = prepare(*clips, output, config(workers=1, timeout=5.0, on_error="fail"))
  assert (again.records, again.resumed_shards) == (report.records, report.shards)
  assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_frames": 5}, r"num_frames = 4, this run has 5 \(--frames\)"),
    ({"size": 64}, r"size = 32, this run has 64 \(--size\)"),
    ({"shards": 2}, r"shards = 3, this run has 2"),
    ({"policy": "clip"}, r"policy = 'siglip', this run has 'clip'"),
    ({"target_fps": 3.0}, r"target_fps = 2.0, this run has 3.0 \(--target-fps\)"),
  ],
)
def test_other_settings_in_the_same_folder_are_an_error(clips, whole, changes, words):
  with pytest.raises(PrepareError, match=f"was started with {words}"):
    prepare(*clips, whole[0], config(**changes))


def test_other_inputs_in_the_same_folder_are_an_error(clips, whole, tmp_path):
  with pytest.raises(PrepareError, match="was started with videos = "):
    prepare(tmp_path, clips[1], whole[0], config())
  with pytest.raises(PrepareError, match="was started with annotations = 'sha256:"):
    prepare(clips[0], annotate(tmp_path, [entry("00.mp4")]), whole[0], config())


def test_a_folder_without_a_record_may_start_over(clips, tmp_path):
  (tmp_path / "wrong").mkdir()
  with pytest.raises(PrepareError, match=r"none of the 12 videos.*there is no such file"):
    prepare(tmp_path / "wrong", clips[1], tmp_path / "records", config())
  assert prepare(*clips, tmp_path / "records", config(shards=2)).records == NUM_CLIPS


def test_folders_of_others_are_not_touched(clips, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(PrepareError, match="holds files that `slowfast prepare` did not write"):
    prepare(*clips, tmp_path, config())
  with pytest.raises(PrepareError, match="is a file"):
    prepare(*clips, tmp_path / "notes.txt", config())
  with pytest.raises(PrepareError, match="upload it"):
    prepare(*clips, "gs://bucket/records", config())
  assert os.listdir(tmp_path) == ["notes.txt"]


def test_two_runs_do_not_write_to_one_folder(clips, whole, tmp_path):
  with (whole[0] / ".prepare" / "lock").open() as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another `slowfast prepare` is writing here"):
      prepare(*clips, whole[0], config())


# Broken videos.


@pytest.fixture(scope="module")
def broken(clips, tmp_path_factory):
  """Good clips with broken ones and impossible annotations among them."""
  folder = shutil.copytree(clips[0], tmp_path_factory.mktemp("broken") / "clips")
  content = (folder / "03.mp4").read_bytes()
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("not a video")
  (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
  (folder / "page.png").write_text("<html>")
  write_audio(folder / "audio.m4a")
  (folder / "folder.mp4").mkdir()
  entries = [
    entry("00.mp4"),
    entry("empty.mp4"),
    entry("text.mp4"),
    entry("../00.mp4"),
    entry("cut.mp4"),
    entry("01.mp4"),
    entry("audio.m4a"),
    entry("folder.mp4"),
    entry("gone.mp4", 0),
    entry("gone.mp4", 1),
    entry("page.png", kind="image"),
    entry("02.mp4"),
    entry("02.mp4", 1, kind="image"),
  ]
  return folder, annotate(folder, entries)


EXPECTED_ERRORS = [
  ("empty.mp4", 2, 1, "empty"),
  ("text.mp4", 3, 1, "not a video"),
  ("train.jsonl", 4, 1, "below the media folder"),
  ("cut.mp4", 5, 1, "moov"),
  ("audio.m4a", 7, 1, "no video stream"),
  ("folder.mp4", 8, 1, "directory"),
  ("gone.mp4", 9, 2, "no such file"),
  ("page.png", 11, 1, "cannot identify image"),
  ("train.jsonl", 13, 1, "02.mp4 is annotated as image here, in line 12 as video"),
]


def test_broken_videos_are_left_out_and_listed(broken, tmp_path):
  output, told = tmp_path / "records", []
  report = prepare(*broken, output, config(), progress=lambda *numbers: told.append(numbers))
  sources = sorted(record.source for record in RecordSource(output))
  assert sources == ["00.mp4", "01.mp4", "02.mp4"]
  assert report.errors == len(EXPECTED_ERRORS)
  listed = errors(output)
  assert [(e["file"], e["line"], e["conversations"]) for e in listed] == [
    expected[:3] for expected in EXPECTED_ERRORS
  ]
  for error, (_, _, _, words) in zip(listed, EXPECTED_ERRORS):
    assert words in error["reason"]
    assert str(broken[0] / error["file"]) + ":" not in error["reason"]
  assert told[0] == (0, 10, 2)  # The bad annotations.
  assert told[-1] == (10, 10, 9)
  assert [done for done, _, _ in told] == list(range(11))
  again = prepare(*broken, output, config())
  assert (again.errors, again.resumed_shards) == (9, 3)
  assert errors(output) == listed


@pytest.mark.parametrize(
  ("on_error", "words"),
  [
    ("fail", r"train.jsonl:4: \"video\" must be a path below .*--on-error skip goes past"),
    ("budget=25%", r"4 of 12 are broken, more than --on-error budget=25% allows; errors.jsonl"),
  ],
)
def test_too_many_broken_videos_stop_the_run(broken, tmp_path, on_error, words):
  with pytest.raises(PrepareError, match=words):
    prepare(*broken, tmp_path / "records", config(on_error=on_error, shards=1, workers=1))
  assert prepare(*broken, tmp_path / "records", config(on_error="budget=75%", shards=1)).errors == 9


def test_a_run_that_is_stopped_by_errors_lists_them(broken, tmp_path):
  file = annotate(tmp_path, [entry("00.mp4"), entry("text.mp4"), entry("01.mp4")])
  with pytest.raises(PrepareError, match=r"train.jsonl:2: text.mp4: is not a video file"):
    prepare(broken[0], file, tmp_path / "records", config(on_error="fail"))
  assert [error["file"] for error in errors(tmp_path / "records")] == ["text.mp4"]


def test_damaged_frames_are_counted(tmp_path):
  whole = write_video(tmp_path / "whole.mkv", VideoSpec(num_frames=10, gop=1))
  spoil = lambda i, packet: bytes(len(packet)) if i in (3, 7) else packet  # noqa: E731
  rewrite_packets(whole, tmp_path / "a.mkv", spoil)
  file = annotate(tmp_path, [entry("a.mkv")])
  report = prepare(tmp_path, file, tmp_path / "records", config(num_frames=10, workers=1))
  record = RecordSource(tmp_path / "records")[0]
  assert record.frame_indices.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
  assert report.lost_frames == record.metadata["decode_errors"] == 2
  assert report.frames == len(record.frames) == 8


def test_a_video_that_takes_too_long_is_left_out(clips, tmp_path):
  file = annotate(tmp_path, [entry("00.mp4")])
  with pytest.raises(PrepareError, match="took longer than 1e-06 seconds"):
    prepare(clips[0], file, tmp_path / "records", config(timeout=1e-6))


def test_a_disk_that_is_full_is_explained(clips, tmp_path):
  limit = (
    "import resource, signal, sys; from slowfast_jax.cli.main import main\n"
    "if __name__ == '__main__':\n"
    "  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    "  sys.exit(main())\n"
  )
  (tmp_path / "limit.py").write_text(limit)
  output = tmp_path / "records"
  words = f"prepare --videos {clips[0]} --annotations {clips[1]} --output {output} --workers 1"
  done = subprocess.run(
    [sys.executable, tmp_path / "limit.py", *words.split()],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "cannot be written" in done.stderr
  assert "make room and run the same command again" in done.stderr
  assert "Traceback" not in done.stderr
  assert not list(output.glob("**/*.tmp"))


# Settings.


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
    ({"size": -1}, "size must be at least 1"),
    ({"shards": 0}, "shards must be at least 1"),
    ({"workers": 0}, "workers must be at least 1"),
    ({"quality": 101}, "quality must lie between 1 and 100, got 101"),
    ({"target_fps": float("nan")}, "target_fps must be a positive number"),
    ({"timeout": 0.0}, "timeout must be a positive number"),
    ({"policy": "pad"}, "policy must be one of"),
    ({"on_error": "budget=1"}, 'a share as in "budget=1%", got'),
    ({"on_error": "budget=101%"}, "on_error must be"),
  ],
)
def test_wrong_settings(changes, words):
  with pytest.raises(PrepareError, match=words):
    config(**changes)


def test_inputs_that_are_not_there(clips, tmp_path):
  with pytest.raises(PrepareError, match="there is no such folder or archive; give the"):
    prepare(tmp_path / "none", clips[1], tmp_path / "records", config())
  with pytest.raises(UserError, match=r"none\.json: cannot read annotations"):
    prepare(clips[0], tmp_path / "none.json", tmp_path / "records", config())
  with pytest.raises(
    PrepareError, match=r"none of the 1 entries is usable; the first, line 1: no f"
  ):
    prepare(clips[0], annotate(tmp_path, [{}]), tmp_path / "records", config())
  assert not (tmp_path / "records").exists()
