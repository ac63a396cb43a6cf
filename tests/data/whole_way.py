# SPDX-License-Identifier: Apache-2.0
"""From hundreds of files of many kinds to an epoch of batches, with preparing killed in between.

  python -m tests.data.whole_way --videos 300 --kills 5 --folder /tmp/whole

The tests do the same with fewer files.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.data.validate import validate_annotations, validate_records
from tests.data.video_files import VideoSpec, write_audio, write_video

TOKENIZER = train_tokenizer(["You are a helpful assistant. system user What? number"] * 9, 300)
GEOMETRY = Geometry(
  num_frames=8,
  decoder_length=256,
  text_bound=240,
  image_size=(16, 16),
  tokens_per_frame=1,
  temporal_stride=1,
  min_fast_frames=1,
)
KINDS = {
  "h264.mp4": VideoSpec(num_frames=12),
  "hevc.mp4": VideoSpec(num_frames=9, codec="libx265", options={"x265-params": "log-level=none"}),
  "vp9.webm": VideoSpec(num_frames=9, codec="libvpx-vp9"),
  "mpeg4.avi": VideoSpec(num_frames=10, codec="mpeg4"),
  "mjpeg.mkv": VideoSpec(num_frames=6, codec="mjpeg", pixels="yuvj420p"),
  "h264.ts": VideoSpec(num_frames=14, codec="libx264"),
  "turned.mp4": VideoSpec(num_frames=8, rotation=90),
  "uneven.mkv": VideoSpec(num_frames=5, times=(0, 0.1, 0.5, 0.6, 2.0)),
}

# How a file is made broken, given its path and the bytes of a good video, and what is said of it.
Break = Callable[[pathlib.Path, bytes], object]
BROKEN: dict[str, tuple[Break, str]] = {
  "empty.mp4": (lambda file, good: file.write_bytes(b""), "the file is empty"),
  "page.mp4": (lambda file, good: file.write_text("<html>Not found</html>"), "is not a video file"),
  "cut.mp4": (lambda file, good: file.write_bytes(good[: len(good) // 2]), "no usable index"),
  "zeros.mp4": (lambda file, good: file.write_bytes(bytes(len(good))), "is not a video file"),
  "headless.mp4": (lambda file, good: file.write_bytes(good[100:]), "is not a video file"),
  "folder.mp4": (lambda file, good: file.mkdir(), "is a directory"),
  "list.m3u8": (lambda file, good: file.write_text("#EXTM3U\n0_h264.mp4\n"), "is not a video file"),
  "sound.m4a": (lambda file, good: write_audio(file), "no video stream"),
  "gone.mp4": (lambda file, good: None, "no such file"),
  "cut.png": (
    lambda file, good: file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
    "cannot identify image",
  ),
}


@dataclasses.dataclass(frozen=True)
class Files:
  """Media, their annotations, and what must become of them.

  Attributes:
    root: folder of the media, with `train.json`.
    records: good media files and texts.
    answers: the learned text of every good conversation.
    broken: the reason, as a pattern, by the name of the file.
  """

  root: pathlib.Path
  records: int
  answers: list[str]
  broken: dict[str, str]


def make_files(root: pathlib.Path, num_videos: int, num_broken: int, scale: int = 1) -> Files:
  """Videos of eight kinds, a fifth as many images and texts, and broken files among them.

  Args:
    scale: of height, width and number of frames, so that there is something to do.
  """
  root.mkdir(exist_ok=True)
  entries = []
  for i in range(num_videos):
    name, spec = list(KINDS.items())[i % len(KINDS)]
    write_video(root / f"{i}_{name}", _enlarge(spec, scale))
    entries += [_entry(f"v{i}{letter}", f"{i}_{name}", "video") for letter in "ab"[: 1 + i % 2]]
  for i in range(num_videos // 5):
    Image.fromarray(np.full((20, 30 + i, 3), i, np.uint8)).save(root / f"{i}.png")
    entries += [_entry(f"i{i}", f"{i}.png", "image"), _entry(f"t{i}", None, "text")]
  answers = [entry["conversations"][1]["value"] for entry in entries]
  good = (root / "0_h264.mp4").read_bytes()
  broken = {}
  for i in range(num_broken):
    name, (spoil, reason) = list(BROKEN.items())[i % len(BROKEN)]
    broken[f"bad{i}_{name}"] = reason
    spoil(root / f"bad{i}_{name}", good)
    kind = "image" if name.endswith("png") else "video"
    entries.insert(5 * i + 2, _entry(f"bad{i}", f"bad{i}_{name}", kind))
  (root / "train.json").write_text(json.dumps(entries, indent=1))
  return Files(root, num_videos + 2 * (num_videos // 5), answers, broken)


def _enlarge(spec: VideoSpec, scale: int) -> VideoSpec:
  times = spec.times and [t + 3 * i for i in range(scale) for t in spec.times]
  sizes = {name: scale * getattr(spec, name) for name in ("num_frames", "height", "width")}
  return dataclasses.replace(spec, times=times, **sizes)


def _entry(identity: str, media: str | None, kind: str) -> dict:
  asked = "What?" if media is None else "<video>\nWhat?"
  turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"number {identity}"}]
  return {"id": identity, **({kind: media} if media else {}), "conversations": turns}


def start_preparing(files: Files, output: pathlib.Path, shards: int) -> subprocess.Popen:
  words = f"--videos {files.root} --annotations {files.root / 'train.json'} --output {output}"
  settings = f"--frames 8 --size 16 --sampler fps --target-fps 4 --shards {shards} --workers 2"
  command = [sys.executable, "-m", "slowfast_jax.cli.main", "prepare"]
  return subprocess.Popen([*command, *words.split(), *settings.split()], stdout=subprocess.DEVNULL)


def prepare_with_kills(
  files: Files, output: pathlib.Path, shards: int, delays: list[float]
) -> list[int]:
  """Starts preparing again and again, each time for so many seconds; then lets it end.

  Returns:
    How many shards there were after each SIGKILL; a run that ended before it has none.
  """
  found = []
  for delay in delays:
    process = start_preparing(files, output, shards)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
      found.append(len(list(output.glob("*.array_record-*"))))
  assert start_preparing(files, output, shards).wait() == 0
  return found


def content(records: pathlib.Path) -> dict[str, bytes]:
  """All files but the report, which tells of times."""
  files = [file for file in records.iterdir() if file.is_file() and file.name != "report.json"]
  return {file.name: file.read_bytes() for file in files if not file.name.startswith("lengths-")}


def check_errors(files: Files, records: pathlib.Path) -> None:
  """Every broken file is listed once, with its line and its reason."""
  lines = (files.root / "train.json").read_text().splitlines()
  listed = [json.loads(line) for line in (records / "errors.jsonl").read_text().splitlines()]
  assert sorted(error["file"] for error in listed) == sorted(files.broken)
  for error in listed:
    assert re.search(files.broken[error["file"]], error["reason"]), error
    following = lines[error["line"] - 1 : error["line"] + 4]
    assert any(error["file"] in line for line in following), error
  report = json.loads((records / "report.json").read_text())
  assert (report["records"], report["errors"]) == (files.records, len(files.broken))


def check_validation(files: Files, records: pathlib.Path) -> None:
  """`validate` finds the broken files, and nothing wrong with the records."""
  found = validate_annotations(files.root / "train.json", files.root, workers=2)
  assert len(found.problems) == len(files.broken), found.problems
  assert validate_records(records).problems == []


def check_epoch(files: Files, records: pathlib.Path, pack: bool, workers: int = 0) -> int:
  """One epoch of training batches holds every good sample once. Returns its rows."""
  pipeline = TrainPipeline(
    RecordSource(records), TOKENIZER, GEOMETRY, 1, seed=5, pack=pack, workers=workers
  )
  rows = len(pipeline.schedule._rows[0][0])
  batches = pipeline.iterate()
  got = collections.Counter(answer for _ in range(rows) for answer in answers_of(next(batches)))
  batches.close()
  assert got == collections.Counter(files.answers)
  assert pipeline.num_failures == 0
  return rows


def answers_of(batch) -> list[str]:
  """The learned text of every sample of a row."""
  found = []
  for segment in range(1, int(batch.segments.max()) + 1):
    mine = (batch.segments[0] == segment) & (batch.loss_weights[0] > 0)
    found.append(TOKENIZER.decode(batch.targets[0][mine].tolist()))
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--videos", type=int, default=300)
  parser.add_argument("--kills", type=int, default=5)
  parser.add_argument("--scale", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, required=True, help="must not exist")
  args = parser.parse_args()
  args.folder.mkdir(parents=True)
  files = make_files(
    args.folder / "files", args.videos, max(args.videos // 20, len(BROKEN)), args.scale
  )
  print(f"{files.records} good media and texts, {len(files.broken)} broken files")
  shards, whole, killed = max(args.videos // 15, 2), args.folder / "whole", args.folder / "killed"

  began = time.monotonic()
  assert start_preparing(files, whole, shards).wait() == 0
  lasted = time.monotonic() - began
  print(f"prepared in one go in {lasted:.1f} s")
  check_errors(files, whole)
  print("every broken file is listed with its line and reason")
  check_validation(files, whole)
  print("validate agrees")

  rng = random.Random(args.seed)
  startup = 1.0  # Seconds; before, there is nothing to interrupt.
  delays = [startup + rng.uniform(0, (lasted - startup) / args.kills) for _ in range(args.kills)]
  found = prepare_with_kills(files, killed, shards, delays)
  print(f"{len(found)} SIGKILLs, after which {found} of {shards} shards were there")
  assert content(killed) == content(whole)
  print(f"byte for byte the same: {len(content(whole))} files")

  for pack in (False, True):
    for workers in (0, 2):
      rows = check_epoch(files, killed, pack, workers)
      print(
        f"an epoch, packed {pack}, {workers} workers: {len(files.answers)} samples, each once, in "
        f"{rows} rows"
      )


if __name__ == "__main__":
  main()
