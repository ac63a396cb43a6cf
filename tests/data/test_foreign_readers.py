# SPDX-License-Identifier: Apache-2.0
"""What `prepare` writes is read back by plain TFDS and plain Grain, without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest

from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.records import RecordSource, decode_frames
from tests.data.video_files import VideoSpec, write_video

# Each prints, for every record, what an outsider can know of it.
WITH_TFDS = """
import json, sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source(split="train")
for i in range(len(source)):
  r = source[i]
  print(json.dumps({
    "id": r["id"].decode(), "source": r["source"].decode(), "height": int(r["height"]),
    "times": [float(t) for t in r["timestamps"]],
    "pixels": [int(f.astype(int).sum()) for f in r["frames"]],
    "talks": [json.loads(t) for t in r["conversations"]],
    "kind": json.loads(r["metadata"])["kind"],
  }))
"""
WITH_GRAIN = """
import glob, io, json, sys
import grain
import numpy as np
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
files = sorted(glob.glob(sys.argv[1] + "/*.array_record-*"))
dataset = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
for data in dataset.map(tf_example_pb2.Example.FromString).to_iter_dataset():
  f = data.features.feature
  frames = [np.array(Image.open(io.BytesIO(b))) for b in f["frames"].bytes_list.value]
  print(json.dumps({
    "id": f["id"].bytes_list.value[0].decode(), "source": f["source"].bytes_list.value[0].decode(),
    "height": f["height"].int64_list.value[0], "times": list(f["timestamps"].float_list.value),
    "pixels": [int(frame.astype(int).sum()) for frame in frames],
    "talks": [json.loads(t) for t in f["conversations"].bytes_list.value],
    "kind": json.loads(f["metadata"].bytes_list.value[0])["kind"],
  }))
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  entries = []
  for i in range(3):
    write_video(folder / f"{i}.mp4", VideoSpec(num_frames=6 + i))
    for j in range(2):
      turns = [{"from": "human", "value": f"<video>\n{j} é?"}, {"from": "gpt", "value": "“Ja”"}]
      entries.append({"id": f"{i}", "video": f"{i}.mp4", "conversations": turns})
  turns = [{"from": "human", "value": "No video."}, {"from": "gpt", "value": "None."}]
  entries.append({"id": "text", "conversations": turns})
  (folder / "train.json").write_text(json.dumps(entries))
  config = PrepareConfig(num_frames=4, size=16, shards=2, workers=1)
  prepare(folder, folder / "train.json", folder / "records", config)
  return folder / "records"


@pytest.mark.parametrize("code", [WITH_TFDS, WITH_GRAIN], ids=["tfds", "grain"])
def test_records_are_read_without_this_package(records, tmp_path, code):
  # Isolated, and elsewhere: nothing of this project is on its path.
  program = tmp_path / "read.py"
  program.write_text(code + "assert not {'slowfast_jax', 'tensorflow'} & set(sys.modules)\n")
  done = subprocess.run(
    [sys.executable, "-I", str(program), str(records)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  found = [json.loads(line) for line in done.stdout.splitlines()]
  expected = list(RecordSource(records))
  assert len(found) == len(expected) == 4
  for outside, record in zip(found, expected):
    frames = decode_frames(record).astype(int)
    assert outside == {
      "id": record.id,
      "source": record.source,
      "height": record.height,
      "times": pytest.approx(np.asarray(record.timestamps).tolist()),
      "pixels": [int(frame.sum()) for frame in frames],
      "talks": record.conversations,
      "kind": record.metadata["kind"],
    }
