# SPDX-License-Identifier: Apache-2.0
"""Public releases are read as they lie on the hub, and what is wrong with a copy is named."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from slowfast_jax.checkpoints.export import Export, VideoConfig
from slowfast_jax.data.preprocess import preprocess
from slowfast_jax.errors import UserError
from slowfast_jax.eval import get_task
from slowfast_jax.eval.pictures import read_picture_folder
from slowfast_jax.eval.tasks import BENCHMARKS
from slowfast_jax.eval.tasks.media import find_video
from slowfast_jax.eval.tasks.mvbench import FOLDERS
from slowfast_jax.eval.tasks.release import read_release
from tests.data.video_files import VideoSpec, write_video
from tests.eval.tasks.docs import DOCS
from tests.eval.tasks.releases import FILES, SRT, write_release
from tests.generate.tiny import CONFIG, SIZE


@pytest.fixture(scope="module", params=BENCHMARKS)
def release(request, tmp_path_factory):
  return request.param, write_release(tmp_path_factory.mktemp("release") / "copy", request.param)


def test_every_release_is_read_and_has_its_videos(release):
  name, root = release
  task = get_task(name)
  docs = task.docs(str(root))
  ids = [task.doc_id(doc) for doc in docs]
  assert len(set(ids)) == len(ids)
  assert len(ids) == 20 if name == "mvbench" else len(ids) in (2, 3)
  for doc in docs:
    assert find_video(root / task.video(doc)).exists()
    assert task.prompt(doc)
    assert task.gold(doc) or name == "egoschema"
  assert [task.doc_id(doc) for doc in task.docs(str(root))] == ids


def test_one_file_or_json_is_a_release_too(release, tmp_path):
  name, root = release
  task = get_task(name)
  if name == "mvbench":
    with pytest.raises(UserError, match="MVBench is twenty files"):
      task.docs(str(root / "json/action_count.json"))
    return
  docs = task.docs(str(root))
  assert task.docs(str(root / FILES[name]), str(root)) == docs
  rows = parquet.read_table(root / FILES[name]).to_pylist()
  (tmp_path / f"{task.split}.json").write_text(json.dumps(rows))
  assert task.docs(str(tmp_path), str(root)) == docs
  (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert task.docs(str(tmp_path / "mine.jsonl"), str(root)) == docs


def test_shards_are_read_in_order(tmp_path):
  for i in (1, 0):
    table = pa.Table.from_pylist([{**DOCS["mlvu"], "video_name": f"{i}.mp4"}])
    parquet.write_table(table, tmp_path / f"test-0000{i}-of-00002.parquet")
  docs = get_task("mlvu").docs(str(tmp_path))
  assert [doc["video_name"] for doc in docs] == ["0.mp4", "1.mp4"]


def test_questions_of_one_video_are_numbered(tmp_path):
  (tmp_path / "test.json").write_text(json.dumps([DOCS["mlvu"]] * 2))
  docs = get_task("mlvu").docs(str(tmp_path))
  assert [get_task("mlvu").doc_id(d) for d in docs] == ["order_1.mp4/order", "order_1.mp4/order#2"]
  assert get_task("mlvu").doc_id(DOCS["mlvu"]) == "order_1.mp4/order"


def test_what_is_wrong_with_a_copy_is_named(tmp_path):
  task = get_task("nextqa_mc")
  with pytest.raises(UserError, match=r"there are no questions; looked for MC/test-\*.parquet"):
    task.docs(str(tmp_path))
  file = tmp_path / "test.json"
  for content, message in [
    ("{", "test.json: not readable as JSON"),
    ("{}", "test.json: expected a JSON list, got dict"),
    ("[]", "there is no question in it"),
    ("[1]", "test.json: row 1: expected an object, got int"),
    (json.dumps([DOCS["nextqa_mc"], {"video": 1}]), "row 2: lacks question, a0, .* it has video"),
  ]:
    file.write_text(content)
    with pytest.raises(UserError, match=message):
      task.docs(str(tmp_path))
  (tmp_path / "broken.parquet").write_text("nothing")
  with pytest.raises(UserError, match="broken.parquet: not a Parquet file that can be read"):
    task.docs(str(tmp_path / "broken.parquet"))
  (tmp_path / "table.csv").write_text("nothing")
  with pytest.raises(UserError, match="table.csv: expected a file of .parquet, .json, .jsonl"):
    read_release(tmp_path / "table.csv", "MC", "test", ())


def test_mvbench_folders(tmp_path):
  root = write_release(tmp_path / "copy", "mvbench")
  task = get_task("mvbench")
  assert len(FOLDERS) == 20
  by_task = {doc["sub_task"]: task.video(doc) for doc in task.docs(str(root))}
  assert by_task["action_sequence"] == "star/Charades_v1_480/a.mp4"
  assert by_task["episodic_reasoning"] == "tvqa/frames_fps3_hq/clip"
  assert by_task["moving_count"] == "clevrer/video_validation/a.mp4"
  cut = {d["sub_task"]: task.video(d) for d in get_task("mvbench", "upstream").docs(str(root))}
  assert {name for name, video in cut.items() if "segment" in video or "convert" in video} == {
    *("action_sequence", "action_prediction", "object_interaction"),
    *("action_localization", "episodic_reasoning", "fine_grained_pose"),
  }
  (root / "data0613").mkdir()
  shutil.move(root / "clevrer", root / "data0613/clevrer")
  moved = {doc["sub_task"]: task.video(doc) for doc in task.docs(str(root))}
  assert moved["moving_count"] == "data0613/clevrer/video_validation/a.mp4"
  assert moved["action_sequence"] == by_task["action_sequence"]
  assert task.video(DOCS["mvbench"]) == "star/Charades_v1_480/ABC.mp4"


def test_pictures_are_frames_in_the_order_of_their_names(tmp_path):
  root = write_release(tmp_path / "copy", "mvbench")
  export = Export(CONFIG, None, None, VideoConfig(4), "")
  folder = root / "tvqa/frames_fps3_hq/clip"
  frames = read_picture_folder(folder, export)
  # As numpy's linspace(0, 9, 4) has them; three pictures are a second.
  for image, name in zip(frames.images, ("00000", "00003", "00006", "00009"), strict=True):
    picture = np.array(Image.open(folder / f"{name}.jpg"))
    np.testing.assert_array_equal(image, preprocess(picture, SIZE, "siglip"))
  assert frames.timestamps.tolist() == pytest.approx([0, 1, 2, 3])
  assert frames.duration == pytest.approx(10 / 3)
  many = read_picture_folder(folder, Export(CONFIG, None, None, VideoConfig(20), ""))
  assert len(many.images) == 20
  (folder / "00003.jpg").write_text("no picture")
  with pytest.raises(UserError, match="00003.jpg: not a picture"):
    read_picture_folder(folder, export)
  with pytest.raises(UserError, match="there are no pictures"):
    read_picture_folder(root / "json", export)


@pytest.fixture
def subtitled(tmp_path):
  (tmp_path / "videomme").mkdir()
  (tmp_path / "data").mkdir()
  (tmp_path / "subtitle").mkdir()
  row = {**DOCS["videomme"], "videoID": "a"}
  parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "videomme/test-0.parquet")
  write_video(tmp_path / "data/a.mp4", VideoSpec(num_frames=200))

  def prompt(text):
    (tmp_path / "subtitle/a.srt").write_text(text, encoding="utf-8")
    (doc,) = get_task("videomme_w_subtitle").docs(str(tmp_path))
    return doc["subtitles"]

  return prompt


def block(start, end, text, markup='<font color="white" size=".72c">{}</font>'):
  times = [f"00:00:{seconds:06.3f}".replace(".", ",") for seconds in (start, end)]
  return f"1\n{times[0]} --> {times[1]}\n{markup.format(text)}\n\n"


def test_subtitles_of_32_frames_are_kept(subtitled):
  # 200 frames at 25 a second: frames 0, 6, 12, 19, 25, ... are looked at.
  blocks = block(0, 4, "one") + block(0.05, 0.25, "of 1 to 5") + block(0.25, 0.29, "of 6")
  assert subtitled(blocks) == "one\nof 6"
  assert subtitled(block(0, 1, "plain", "{}")) == ""
  assert subtitled(block(0, 1, "first") + block(0, 1, "later, same times")) == "later, same times"
  assert subtitled(block(0, 1, "two\nlines")) == "two lines"
  assert subtitled("") == ""
  assert subtitled(SRT.replace("\n", "\r\n")) == subtitled(SRT) == "Hello there.\nBye."


def test_subtitles_stand_in_the_order_of_a_set(subtitled):
  """CPython's sets of small numbers are sorted up to a point, and then wrap around."""
  blocks = "".join(block(i * 0.04 + 0.01, i * 0.04 + 0.05, i) for i in range(200))
  shown = [int(text) for text in subtitled(blocks).split("\n")]
  kept = np.linspace(0, 199, 32, dtype=int).tolist()
  assert shown == list(set(kept)) != kept


def test_damaged_subtitles_are_named(subtitled):
  with pytest.raises(UserError, match="a.srt: expected START --> END, got 'nonsense'"):
    subtitled("1\nnonsense\ntext\n\n")


def test_without_files_there_are_no_subtitles(tmp_path):
  root = write_release(tmp_path / "copy", "videomme_w_subtitle")
  task = get_task("videomme_w_subtitle")
  by_video = {doc["videoID"]: doc["subtitles"] for doc in task.docs(str(root))}
  assert by_video == {"a": "Hello there.\nBye.", "b": None}
  # What a video that cannot be opened has to say does not matter: it is reported when asked.
  (root / "data/a.mp4").write_text("no video")
  assert task.docs(str(root))[0]["subtitles"] is None
