# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS itself wrote, opened as records; what is said of those that do not fit."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from slowfast_jax.cli.main import main
from slowfast_jax.data import records
from slowfast_jax.data.mixture import open_mixture
from slowfast_jax.data.needs import count_lengths
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.records import RecordsError, decode_frames, text_of
from slowfast_jax.data.tfds import TfdsSource, open_records
from tests.data.test_pipeline import GEOMETRY, TOKENIZER, answers, take
from tests.train.tiny_run import record as square
from tests.train.tiny_run import write_records

SIZES = {"learn": 5, "held_out": 3}


def example(i: int) -> dict:
  """The even ones are videos of two frames, the odd ones texts."""
  shades = [20 * i + j for j in range(2 * (i % 2 == 0))]
  pictures = [np.full((8, 8, 3), shade, np.uint8) for shade in shades]
  # As files: to encode pictures, TFDS takes TensorFlow.
  frames = [io.BytesIO(simplejpeg.encode_jpeg(picture)) for picture in pictures]
  asked = "<video>\nnumber" if frames else "number"
  talks = [
    json.dumps([{"from": "human", "value": asked}, {"from": "gpt", "value": f"{i}{letter}"}])
    for letter in "ab"[: 1 + i % 2]
  ]
  return {
    "id": f"clip {i}",
    "source": "",
    "frames": frames,
    "timestamps": [float(j) for j in range(len(frames))],
    "frame_indices": list(range(len(frames))),
    "duration": 2.0,
    "fps": 1.0,
    "num_video_frames": len(frames),
    "height": 8,
    "width": 8,
    "conversations": talks,
    "metadata": "" if i % 3 else '{"licence": "MIT"}',
    "mood": 7,
  }


class Others(tfds.core.GeneratorBasedBuilder):
  """A data set of somebody else: another name, version, splits, and a feature more."""

  VERSION = tfds.core.Version("2.1.0")
  code_path = None  # Looking for it takes a package that TFDS does not ask for.

  def _info(self):
    fields = {**records.features(), "mood": np.int64}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

  def _split_generators(self, dl_manager):
    del dl_manager
    return {name: self._examples(name) for name in SIZES}

  def _generate_examples(self, name):
    raise NotImplementedError

  def _examples(self, name):
    for i in range(SIZES[name]):
      yield i, example(i)


def write(folder):
  made = Others(data_dir=folder, file_format="array_record")
  made.download_and_prepare()
  return made.data_path


@pytest.fixture(scope="module")
def others(tmp_path_factory):
  return write(tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("split", SIZES)
def test_it_holds_what_tfds_reads(others, split):
  source = open_records(f"{others}:{split}")
  expected = tfds.builder_from_directory(others).as_data_source(split=split)
  assert isinstance(source, TfdsSource)
  assert len(source) == len(expected) == SIZES[split]
  for record, theirs in zip(source, expected):
    assert record.id == theirs["id"].decode()
    assert [json.dumps(turns) for turns in record.conversations] == [
      turns.decode() for turns in theirs["conversations"]
    ]
    if record.frames:
      np.testing.assert_array_equal(decode_frames(record), theirs["frames"])
    assert record.metadata["kind"] == ("video" if record.frames else "text")


def test_every_conversation_is_in_the_index_and_found_once_only(others, monkeypatch):
  source = open_records(f"{others}:learn")
  talks = [len(record.conversations) for record in source]
  assert source.index.tolist() == [[i, j] for i, n in enumerate(talks) for j in range(n)]
  texts = list(source.texts())
  assert texts == [text_of(record) for record in source]
  monkeypatch.setattr(TfdsSource, "_parse", lambda *_: pytest.fail("read again"))
  again = open_records(f"{others}:learn")
  np.testing.assert_array_equal(again.index, source.index)
  assert list(again.texts()) == texts


def test_it_trains_like_records(others):
  source = open_records(f"{others}:learn")
  pipeline = TrainPipeline(pickle.loads(pickle.dumps(source)), TOKENIZER, GEOMETRY, 1, seed=0)
  batches = take(pipeline.iterate(), len(source.index))
  found = [answer for batch in batches for answer in answers(batch)]
  assert sorted(found) == sorted(
    turns[-1]["value"] for record in source for turns in record.conversations
  )
  assert pipeline.num_failures == 0


def test_the_splits_of_one_folder_are_counted_apart(others):
  lengths = [count_lengths(open_records(f"{others}:{name}"), TOKENIZER, "") for name in SIZES]
  assert [len(one.text) for one in lengths] == [
    len(open_records(f"{others}:{name}").index) for name in SIZES
  ]


def test_commands_and_mixtures_take_it(others, tmp_path, capsys):
  assert main(["inspect", f"{others}:held_out", "--html", str(tmp_path / "page.html")]) == 0
  assert "3 records, 4 conversations" in capsys.readouterr().out
  assert main(["data", "validate", f"{others}:learn"]) == 0
  assert main(["data", "stats", f"{others}:learn"]) == 0
  (tmp_path / "mix.json").write_text(json.dumps([{"path": f"{others}:learn"}]))
  (source,), weights = open_mixture(tmp_path / "mix.json")
  assert weights == [len(source.index)]


def test_a_folder_that_may_only_be_read_is_read_each_time(others, tmp_path, monkeypatch):
  copy = shutil.copytree(others, tmp_path / "copy", ignore=shutil.ignore_patterns("slowfast-*"))
  monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(PermissionError))
  expected = open_records(f"{others}:learn")
  source = open_records(f"{copy}:learn")
  np.testing.assert_array_equal(source.index, expected.index)


# What is wrong is named.


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"fps": None}, "fps: expected number, got nothing"),
    ({"height": np.float32}, "height: expected whole number, got number"),
    (
      {"conversations": tfds.features.Text()},
      "conversations: expected a sequence of text, got text",
    ),
    (
      {"frames": tfds.features.Sequence(tfds.features.Image(encoding_format="png"))},
      "frames: expected a sequence of jpeg images, got a sequence of png images",
    ),
  ],
)
def test_features_that_are_missing_or_of_another_type(tmp_path, changes, words):
  write_records(tmp_path / "set", [square(0)])
  (tmp_path / "set/index.npy").unlink()
  about = tmp_path / "set/dataset_info.json"
  about.write_text(about.read_text().replace('"slowfast"', '"others"'))
  fields = {k: v for k, v in {**records.features(), **changes}.items() if v is not None}
  tfds.features.FeaturesDict(fields).save_config(tmp_path / "set")
  with pytest.raises(RecordsError, match="its features are not those of records") as caught:
    open_records(tmp_path / "set")
  assert words in str(caught.value)


def test_splits_files_and_folders_that_are_not_there(others, tmp_path):
  with pytest.raises(RecordsError, match=r"no split 'test'; it has \['held_out', 'learn'\]"):
    open_records(f"{others}:test")
  with pytest.raises(RecordsError, match="several splits and none is 'train'"):
    open_records(others)
  with pytest.raises(RecordsError, match="2.1.0"):
    TfdsSource(others.parent)
  copy = shutil.copytree(others, tmp_path / "copy")
  next(copy.glob("*learn*array_record*")).unlink()
  with pytest.raises(RecordsError, match="1 files of split 'learn' are missing"):
    open_records(f"{copy}:learn")
  with pytest.raises(RecordsError, match="no such folder"):
    open_records(tmp_path / "nowhere")


def test_conversations_that_are_no_turns(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "SIZES", {"learn": 1})
  right = example(0)
  monkeypatch.setitem(globals(), "example", lambda i: {**right, "conversations": ['{"a": 1}']})
  others = write(tmp_path)
  with pytest.raises(RecordsError, match="'clip 0': each of its conversations must be the JSON"):
    open_records(others)
