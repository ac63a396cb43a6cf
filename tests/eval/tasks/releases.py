# SPDX-License-Identifier: Apache-2.0
"""Tiny copies of the public releases, as they lie on the hub once their videos are unpacked."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from slowfast_jax.eval.tasks.mvbench import FOLDERS
from tests.data.video_files import VideoSpec, numbered_frame, write_video
from tests.eval.tasks.docs import DOCS

SRT = """1
00:00:00,000 --> 00:00:00,120
<font color="white" size=".72c">Hello
there.</font>

2
00:00:00,200 --> 00:00:09,000
<font color="white" size=".72c">Bye.</font>

3
00:00:00,240 --> 00:00:09,000
not shown
"""
# Where the questions of each task lie; the name of a Parquet file has its split in it.
FILES = {
  "videomme": "videomme/test-00000-of-00001.parquet",
  "videomme_w_subtitle": "videomme/test-00000-of-00001.parquet",
  "mlvu": "data/test-00000-of-00001.parquet",
  "egoschema": "GENERATION/test-00000-of-00001.parquet",
  "egoschema_subset": "Subset/test-00000-of-00001.parquet",
  "longvideobench": "validation-00000-of-00001.parquet",
  "perceptiontest": "mc_question_val/validation-00000-of-00001.parquet",
  "nextqa_mc": "MC/test-00000-of-00001.parquet",
  "activitynetqa": "data/test-00000-of-00001.parquet",
  "tempcompass_multi_choice": "multi-choice/test-00000-of-00001.parquet",
  "tempcompass_yes_no": "yes_no/test-00000-of-00001.parquet",
  "tempcompass_caption_matching": "caption_matching/test-00000-of-00001.parquet",
  "tempcompass_captioning": "captioning/test-00000-of-00001.parquet",
}
# The videos a and b of each task: the field that names them, its values, and their paths.
VIDEOS = {
  "videomme": ("videoID", ["a", "b"], ["data/a.mp4", "data/b.mkv"]),
  "videomme_w_subtitle": ("videoID", ["a", "b"], ["data/a.mp4", "data/b.mkv"]),
  "mlvu": ("video_name", ["order/a.mp4", "b.mp4"], ["order/a.mp4", "b.mp4"]),
  "egoschema": ("video_idx", ["a", "b"], ["videos/a.mp4", "videos/b.MP4"]),
  "egoschema_subset": ("video_idx", ["a", "b"], ["videos/a.mp4", "videos/b.MP4"]),
  "longvideobench": ("video_path", ["a.mp4", "b.mp4"], ["videos/a.mp4", "videos/b.mp4"]),
  "perceptiontest": ("video_name", ["a", "b"], ["videos/a.mp4", "videos/b.mp4"]),
  "nextqa_mc": ("video", [1, 2], ["NExTVideo/1.mp4", "NExTVideo/2.mp4"]),
  "activitynetqa": ("video_name", ["a", "b"], ["all_test/v_a.mp4", "all_test/v_b.webm"]),
  "tempcompass_multi_choice": ("video_id", ["a", "b"], ["videos/a.mp4", "videos/b.mp4"]),
  "tempcompass_yes_no": ("video_id", ["a", "b"], ["videos/a.mp4", "videos/b.mp4"]),
  "tempcompass_caption_matching": ("video_id", ["a", "b"], ["videos/a.mp4", "videos/b.mp4"]),
  "tempcompass_captioning": ("video_id", ["a", "b"], ["videos/a.mp4", "videos/b.mp4"]),
}


def write_release(root: Path, task: str) -> Path:
  """Writes a release with three or, for EgoSchema, two questions on two videos."""
  if task == "mvbench":
    return _write_mvbench(root)
  field, names, paths = VIDEOS[task]
  doc = {name: value for name, value in DOCS[task].items() if name != "id"}
  count = 2 if task.startswith("egoschema") else 3
  rows = [{**doc, field: names[i % 2], **_numbered(task, i)} for i in range(count)]
  file = root / FILES[task]
  file.parent.mkdir(parents=True)
  parquet.write_table(pa.Table.from_pylist(rows), file)
  source = write_video(root / "source.mp4", VideoSpec(num_frames=12))
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, root / path)
  if task == "videomme_w_subtitle":
    (root / "subtitle").mkdir()
    (root / "subtitle/a.srt").write_text(SRT)
  return root


def _numbered(task: str, i: int) -> dict:
  ids = {"videomme": "question_id", "videomme_w_subtitle": "question_id"}
  ids |= {"activitynetqa": "question_id"}
  if task in ids:
    return {ids[task]: f"q{i}"}
  return {"question_id": i} if task == "perceptiontest" else {}


def _write_mvbench(root: Path) -> Path:
  """One question a task, some on one video; one task has pictures."""
  (root / "json").mkdir(parents=True)
  source = write_video(root / "source.mp4", VideoSpec(num_frames=12))
  doc = {name: value for name, value in DOCS["mvbench"].items() if name != "sub_task"}
  for task, folder in FOLDERS.items():
    (root / folder).mkdir(parents=True, exist_ok=True)
    if task == "episodic_reasoning":
      _write_pictures(root / folder / "clip", 10)
    else:
      shutil.copy(source, root / folder / "a.mp4")
    video = "clip" if task == "episodic_reasoning" else "a.mp4"
    (root / f"json/{task}.json").write_text(json.dumps([{**doc, "video": video}]))
  return root


def _write_pictures(folder: Path, count: int) -> None:
  folder.mkdir()
  for i in reversed(range(count)):  # So that the file system's order is not the right one.
    Image.fromarray(numbered_frame(i)).save(folder / f"{i:05d}.jpg")
