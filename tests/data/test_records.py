# SPDX-License-Identifier: Apache-2.0
"""Records: what is written is what is read, by us, by TFDS and Grain, and damage is explained."""

import dataclasses
import io
import json
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
import simplejpeg
from array_record.python import array_record_module
from PIL import Image

from slowfast_jax.data import records
from slowfast_jax.data.records import Record, RecordsError, RecordSource, decode_frames

SHARD_LENGTHS = (3, 0, 4)


def jpeg(seed: int, size: int = 16) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels, 95, colorspace="RGB", colorsubsampling="420")


def make_record(i: int, num_frames: int = 2) -> Record:
  return Record(
    id=f"clip {i} é",
    source=f"a/{i}.mp4",
    frames=[jpeg(10 * i + frame) for frame in range(num_frames)],
    timestamps=np.arange(num_frames, dtype=np.float32) / 3,
    frame_indices=np.arange(num_frames, dtype=np.int32),
    duration=1.5,
    fps=30.0,
    num_video_frames=45,
    height=720,
    width=1280,
    conversations=[[{"from": "human", "value": f"{j} “?”"}] for j in range(i % 3 + 1)],
    metadata={"kind": "video", "entries": [{"id": i}], "decode_errors": 0},
  )


RECORDS = [make_record(i, num_frames=i) for i in range(sum(SHARD_LENGTHS))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("records")
  data = [records.encode_record(record) for record in RECORDS]
  position = 0
  for shard, length in enumerate(SHARD_LENGTHS):
    file = folder / records.shard_name(shard, len(SHARD_LENGTHS))
    writer = array_record_module.ArrayRecordWriter(str(file), records.WRITER_OPTIONS)
    for _ in range(length):
      writer.write(data[position])
      position += 1
    writer.close()
  index = [(i, j) for i, record in enumerate(RECORDS) for j in range(len(record.conversations))]
  records.write_dataset_info(folder, SHARD_LENGTHS, sum(map(len, data)), index)
  return folder


@pytest.fixture
def folder(written, tmp_path):
  return shutil.copytree(written, tmp_path / "records")


def assert_same(left: Record, right: Record) -> None:
  for field in dataclasses.fields(Record):
    np.testing.assert_equal(getattr(left, field.name), getattr(right, field.name), field.name)


def test_what_is_written_is_read(written):
  source = RecordSource(written)
  assert len(source) == len(RECORDS)
  for read, record in zip((source[i] for i in range(len(source))), RECORDS, strict=True):
    assert_same(read, record)
  pairs = [(i, j) for i, r in enumerate(RECORDS) for j in range(len(r.conversations))]
  assert source.index.tolist() == [list(pair) for pair in pairs]
  assert source.index.dtype == np.int32
  with pytest.raises(IndexError):
    source[len(source)]


def test_the_bytes_are_those_of_tfds():
  record = RECORDS[3]
  fields = dataclasses.asdict(record) | {
    "frames": [io.BytesIO(frame) for frame in record.frames],
    "conversations": [json.dumps(turns, ensure_ascii=False) for turns in record.conversations],
    "metadata": json.dumps(record.metadata, ensure_ascii=False),
  }
  by_tfds = records.features().serialize_example(fields)
  assert_same(records.parse_record(by_tfds), record)
  assert len(by_tfds) == len(records.encode_record(record))


def test_the_bytes_are_those_of_another_process():
  code = (
    "import hashlib; from tests.data.test_records import make_record, records\n"
    "print(hashlib.sha256(records.encode_record(make_record(5))).hexdigest())"
  )
  digests = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
  assert len(digests) == 1


def test_plain_tfds_reads_it(written):
  import tensorflow_datasets as tfds

  source = tfds.builder_from_directory(written).as_data_source(split="train")
  assert len(source) == len(RECORDS)
  for i in (0, 4):  # The first has no frame.
    read, record = source[i], RECORDS[i]
    assert read["id"].decode() == record.id
    assert json.loads(read["conversations"][0]) == record.conversations[0]
    np.testing.assert_array_equal(read["timestamps"], record.timestamps)
    assert len(read["frames"]) == len(record.frames)
    for image, expected in zip(read["frames"], decode_frames(record)):
      np.testing.assert_array_equal(image, expected)


def test_plain_grain_reads_it(written):
  files = sorted(str(file) for file in written.glob("*.array_record-*"))
  source = grain.sources.ArrayRecordDataSource(files)
  assert_same(records.parse_record(source[5]), RECORDS[5])


def test_grain_threads_and_copies_share_a_source(written):
  source = RecordSource(written)
  source[0]
  source = pickle.loads(pickle.dumps(source))
  options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
  epochs = grain.MapDataset.source(source).repeat(5).to_iter_dataset(options)
  assert [record.id for record in epochs] == [record.id for record in RECORDS] * 5


def test_frames_decode_as_pillow_decodes_them():
  record = RECORDS[3]
  expected = np.stack([np.array(Image.open(io.BytesIO(frame))) for frame in record.frames])
  np.testing.assert_array_equal(decode_frames(record), expected)
  assert decode_frames(RECORDS[0]).shape == (0, 0, 0, 3)


@pytest.mark.parametrize("bad", [b"", b"no jpeg", jpeg(0)[:200], jpeg(0, size=8), jpeg(0, size=24)])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_frame_names_its_record(bad, place):
  frames = [jpeg(1), jpeg(2)]
  frames[place] = bad
  record = dataclasses.replace(RECORDS[2], frames=frames)
  with pytest.raises(RecordsError, match="record 'clip 2 é': a frame is no readable JPEG"):
    decode_frames(record)


def test_opening_needs_no_heavy_import(written):
  code = (
    "import sys; from slowfast_jax.data.records import RecordSource\n"
    f"RecordSource({str(written)!r})\n"
    "print(sorted({'jax', 'tensorflow', 'tensorflow_datasets', 'torch'} & set(sys.modules)))"
  )
  assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_folders_that_hold_no_records(tmp_path):
  with pytest.raises(RecordsError, match="there is no such folder"):
    RecordSource(tmp_path / "none")
  with pytest.raises(
    RecordsError, match=r"not a records folder.*give a folder that `slowfast prep"
  ):
    RecordSource(tmp_path)


def test_a_folder_that_is_not_finished(folder):
  (folder / records.INFO_FILE).unlink()
  with pytest.raises(RecordsError, match="has not finished; run the same `slowfast prepare`"):
    RecordSource(folder)


def test_records_of_another_data_set(folder):
  info = folder / records.INFO_FILE
  info.write_text(info.read_text().replace('"slowfast"', '"mnist"'))
  with pytest.raises(RecordsError, match="holds the data set 'mnist'"):
    RecordSource(folder)
  info.write_text("{")
  with pytest.raises(RecordsError, match="not the description of one 'train' split"):
    RecordSource(folder)


def test_a_missing_shard(folder):
  name = records.shard_name(2, 3)
  (folder / name).unlink()
  with pytest.raises(RecordsError, match=f"1 files are missing, among them {name}"):
    RecordSource(folder)


def test_a_shard_that_is_cut_off(folder):
  file = folder / records.shard_name(2, 3)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  source = RecordSource(folder)
  assert_same(source[2], RECORDS[2])
  with pytest.raises(
    RecordsError, match=f"{file}: cut off or damaged: expected 4 records, found 0"
  ):
    source[3]


def test_a_damaged_record_spoils_no_other(folder):
  file = folder / records.shard_name(2, 3)
  content = bytearray(file.read_bytes())
  content[content.index(RECORDS[5].frames[2]) + 50] ^= 1
  file.write_bytes(content)
  source = RecordSource(folder)
  assert_same(source[4], RECORDS[4])
  assert_same(source[6], RECORDS[6])
  with pytest.raises(RecordsError, match=f"{file}: record 2 is damaged"):
    source[5]


@pytest.mark.parametrize(
  ("content", "reason"),
  [(np.zeros((3, 3), np.int32), "expected .record, conversation. pairs"), (None, "not readable")],
)
def test_a_wrong_index(folder, content, reason):
  with (folder / records.INDEX_FILE).open("wb") as file:
    file.write(b"?") if content is None else np.save(file, content)
  with pytest.raises(RecordsError, match=reason):
    RecordSource(folder)


def test_threads_that_parse_at_once_import_one_after_the_other(monkeypatch):
  """Else two of them wait for each other for ever, each with a lock of TFDS's lazy imports."""
  inside, at_once = [], []

  def slow_import():
    inside.append(1)
    at_once.append(len(inside))
    time.sleep(0.02)
    inside.pop()

  monkeypatch.setattr(records, "_import_proto", slow_import)
  with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: records._proto(), range(4)))
  assert at_once == [1, 1, 1, 1]
