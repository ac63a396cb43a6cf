# SPDX-License-Identifier: Apache-2.0
"""From files of many kinds to training batches: every good sample once an epoch, the rest told."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
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
NUM_VIDEOS = 48


def entry(identity: str, media: str | None, kind: str) -> dict:
  asked = "What?" if media is None else "<video>\nWhat?"
  turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"number {identity}"}]
  return {"id": identity, **({kind: media} if media else {}), "conversations": turns}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Videos of eight kinds, images, texts, and files that are broken in ten ways."""
  root = tmp_path_factory.mktemp("files")
  entries = []
  for i in range(NUM_VIDEOS):
    name, spec = list(KINDS.items())[i % len(KINDS)]
    write_video(root / f"{i}_{name}", spec)
    entries += [entry(f"v{i}{letter}", f"{i}_{name}", "video") for letter in "ab"[: 1 + i % 2]]
  for i in range(6):
    Image.fromarray(np.full((20, 30 + i, 3), 9 * i, np.uint8)).save(root / f"{i}.png")
    entries += [entry(f"i{i}", f"{i}.png", "image"), entry(f"t{i}", None, "text")]
  good = (root / "0_h264.mp4").read_bytes()
  (root / "empty.mp4").write_bytes(b"")
  (root / "page.mp4").write_text("<html>Not found</html>")
  (root / "cut.mp4").write_bytes(good[: len(good) // 2])
  (root / "zeros.mp4").write_bytes(bytes(len(good)))
  (root / "headless.mp4").write_bytes(good[100:])
  (root / "folder.mp4").mkdir()
  (root / "list.m3u8").write_text("#EXTM3U\n0_h264.mp4\n")
  write_audio(root / "sound.m4a")
  (root / "cut.png").write_bytes((root / "1.png").read_bytes()[:40])
  names = ["empty.mp4", "page.mp4", "cut.mp4", "zeros.mp4", "headless.mp4", "folder.mp4"]
  bad = [*names, "list.m3u8", "sound.m4a", "gone.mp4", "cut.png"]
  for i, name in enumerate(bad):
    kind = "image" if name.endswith("png") else "video"
    entries.insert(5 * i + 2, entry(f"bad{i}", name, kind))
  (root / "train.json").write_text(json.dumps(entries, indent=1))
  return root, bad, [e["conversations"][1]["value"] for e in entries if "bad" not in e["id"]]


@pytest.fixture(scope="module")
def records(files, tmp_path_factory):
  root, bad, _ = files
  output = tmp_path_factory.mktemp("out") / "records"
  config = PrepareConfig(num_frames=8, size=16, sampler="fps", target_fps=4.0, shards=3, workers=2)
  report = prepare(root, root / "train.json", output, config)
  listed = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
  assert sorted(error["file"] for error in listed) == sorted(bad)
  assert report.errors == len(bad)
  assert report.records == NUM_VIDEOS + 12
  return output


def test_validation_agrees_with_what_was_prepared(files, records):
  root, bad, _ = files
  found = validate_annotations(root / "train.json", root, workers=2)
  assert len(found.problems) == len(bad)
  assert validate_records(records).problems == []


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_holds_every_good_sample_once(files, records, pack):
  _, _, expected = files
  source = RecordSource(records)
  pipeline = TrainPipeline(source, TOKENIZER, GEOMETRY, 1, seed=5, pack=pack)
  rows = len(pipeline.schedule._rows[0][0])
  batches = pipeline.iterate()
  got = collections.Counter(a for _ in range(rows) for a in answers_of(next(batches)))
  assert got == collections.Counter(expected)
  assert pipeline.num_failures == 0
  assert rows < len(expected) / 2 if pack else rows == len(expected)


def answers_of(batch) -> list[str]:
  """The learned text of every sample of a row."""
  found = []
  for segment in range(1, int(batch.segments.max()) + 1):
    mine = (batch.segments[0] == segment) & (batch.loss_weights[0] > 0)
    found.append(TOKENIZER.decode(batch.targets[0][mine].tolist()))
  return found
