# SPDX-License-Identifier: Apache-2.0
"""Records that others wrote: TFDS data sets of ArrayRecord files with the features of ours.

Such a set has any name, splits and shards, and no list of its conversations: this is made when the
set is opened for the first time, by reading all of it once, and kept beside it where that can be
written. Further features are not looked at.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from array_record.python import array_record_data_source
from etils import epath

from slowfast_jax.data.records import (
  DATASET,
  INDEX_FILE,
  INFO_FILE,
  SPLIT,
  Record,
  RecordsError,
  RecordSource,
  RecordText,
  ShardSlice,
  encode_text,
  features,
  parse_record,
)


def open_records(path: str | os.PathLike) -> RecordSource:
  """Opens what `slowfast prepare` wrote, or a TFDS data set with the same features.

  Args:
    path: a folder; of a TFDS data set with several splits, "FOLDER:SPLIT".

  Raises:
    RecordsError: it cannot be read; what to do.
  """
  folder, split = split_path(path)
  file = epath.Path(folder) / INFO_FILE
  ours = (epath.Path(folder) / INDEX_FILE).exists() or not file.exists()
  if ours and split in ("", SPLIT):
    return RecordSource(folder)
  with contextlib.suppress(ValueError, AttributeError):
    if json.loads(file.read_text()).get("name") == DATASET and split in ("", SPLIT):
      return RecordSource(folder)
  return TfdsSource(folder, split)


def split_path(path: str | os.PathLike) -> tuple[str, str]:
  """ "FOLDER:SPLIT" in its parts; a folder that exists has no split."""
  text = os.fspath(path)
  folder, colon, split = text.rpartition(":")
  if not colon or "/" in split or epath.Path(text).exists():
    return text, ""
  return folder, split


class TfdsSource(RecordSource):
  """A split of a TFDS data set, as a `RecordSource`.

  Args:
    path: the folder with dataset_info.json.
    split: its name; empty = the only one, or "train".
  """

  def __init__(self, path: str | os.PathLike, split: str = ""):
    self.path = os.fspath(path)
    builder = _open_builder(self.path)
    _check_features(self.path, builder.info.features)
    self.split = _choose_split(self.path, split, builder.info.splits)
    info = builder.info.splits[self.split]
    self.num_bytes = int(info.num_bytes)
    self.shards = [(os.fspath(f), n) for f, n in zip(info.filepaths, info.shard_lengths)]
    if missing := [file for file, _ in self.shards if not epath.Path(file).exists()]:
      raise RecordsError(
        f"{self.path}: {len(missing)} files of split {self.split!r} are missing, among them "
        f"{missing[0]}; copy the folder again"
      )
    slices = [ShardSlice(*shard) for shard in self.shards if shard[1]]
    self._records = array_record_data_source.ArrayRecordDataSource(slices)
    self.index = self._load_index()

  def __repr__(self) -> str:
    return f"TfdsSource({self.path!r}, {self.split!r})"

  def texts(self) -> Iterator[RecordText | None]:
    file = self._kept("texts.jsonl")
    if file is not None and file.exists():
      return self._read_texts(epath.Path(file))
    return self._texts_of_records()

  def _parse(self, data: bytes) -> Record:
    return _checked(parse_record(data, _metadata))

  def _load_index(self) -> np.ndarray:
    file = self._kept("index.npy")
    if file is not None and file.exists():
      return self._read_index(epath.Path(file))
    if len(self):
      self[0]  # Wrong in every record: better one error now than a warning for each.
    logging.info("Reading all %d records of %s once, for their texts", len(self), self)
    index, lines, unreadable = [], [], 0
    for i, text in enumerate(self._texts_of_records()):
      if text is None:
        unreadable += 1
      else:
        index += [(i, conversation) for conversation in range(len(text.conversations))]
        lines.append(encode_text(text))
    table = np.array(index, np.int32).reshape(-1, 2)
    if unreadable:  # Not kept: a copy that is whole may follow.
      logging.warning(
        "%d of %d records of %s are damaged and left out", unreadable, len(self), self
      )
    elif file is not None:
      self._keep(table, "".join(lines))
    return table

  def _keep(self, index: np.ndarray, texts: str) -> None:
    """Writes what was found beside the records, unless the folder may only be read."""
    with contextlib.suppress(OSError):
      for name, write in {
        "texts.jsonl": lambda file: file.write_text(texts, encoding="utf-8"),
        "index.npy": lambda file: np.save(file, index),
      }.items():
        file = self._kept(name)
        assert file is not None
        partial = file.with_name(f"{os.getpid()}-{file.name}")
        write(partial)
        os.replace(partial, file)

  def _kept(self, name: str) -> pathlib.Path | None:
    if "://" in self.path:
      return None
    facts = json.dumps([[length for _, length in self.shards], self.num_bytes])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return pathlib.Path(self.path) / f"slowfast-{self.split}-{digest}-{name}"


def _metadata(text: str) -> dict[str, Any]:
  """Others may have none, or put another kind of value there."""
  with contextlib.suppress(ValueError):
    value = json.loads(text)
    if isinstance(value, dict):
      return value
  return {}


def _checked(record: Record) -> Record:
  for turns in record.conversations:
    if not isinstance(turns, list) or not all(
      isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns
    ):
      raise RecordsError(
        f"record {record.id!r}: each of its conversations must be the JSON of a list of turns "
        f'{{"from": ..., "value": ...}}, got {turns!r:.80}'
      )
  kind = "text" if not record.frames else "image" if record.num_video_frames <= 1 else "video"
  record.metadata.setdefault("kind", kind)
  return record


def _open_builder(path: str):
  import tensorflow_datasets as tfds

  folder = epath.Path(path)
  if not (folder / INFO_FILE).exists():
    below = [*folder.glob(f"*/{INFO_FILE}"), *folder.glob(f"*/*/{INFO_FILE}")]
    hint = f"; give {below[0].parent}" if below else "; give the folder of one version of the set"
    raise RecordsError(f"{path}: has no {INFO_FILE}{hint}")
  try:
    builder = tfds.builder_from_directory(path)
  except Exception as error:  # Whatever TFDS finds wrong with its files.
    raise RecordsError(
      f"{path}: TFDS cannot open it ({type(error).__name__}: {error}); features that need "
      "TensorFlow, such as Video, have to be written as a Sequence of Image"
    ) from error
  form = builder.info.file_format
  if form is None or form.value != "array_record":
    raise RecordsError(
      f"{path}: its files are {form.value if form else 'of an unknown format'}, expected "
      "array_record; write the set with file_format='array_record'"
    )
  return builder


def _choose_split(path: str, split: str, splits: Any) -> str:
  names = sorted(splits)
  if split in names:
    return split
  if not split and (len(names) == 1 or SPLIT in names):
    return names[0] if len(names) == 1 else SPLIT
  wanted = f"no split {split!r}" if split else f"several splits and none is {SPLIT!r}"
  raise RecordsError(f"{path}: has {wanted}; it has {names}: give {path}:{(names or ['SPLIT'])[0]}")


def _check_features(path: str, found: Any) -> None:
  """All features of ours must be there, each of its type."""
  problems = []
  for name, feature in features().items():
    expected = _describe(feature)
    got = _describe(found[name]) if name in found else "nothing"
    if got != expected:
      problems.append(f"{name}: expected {expected}, got {got}")
  if problems:
    raise RecordsError(
      f"{path}: its features are not those of records: {'; '.join(problems)}. See "
      "slowfast_jax.data.records.features for what writes such a set"
    )


def _describe(feature: Any) -> str:
  """What is stored of a feature, in words; equal words are stored alike."""
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.Sequence):
    return f"a sequence of {_describe(feature.feature)}"
  if isinstance(feature, tfds.features.Image):
    return f"{feature._image_encoder.encoding_format or 'PNG or JPEG'} images"
  if not isinstance(feature, tfds.features.Tensor):
    return type(feature).__name__
  rank = len(feature.shape)
  if rank > 1:
    return f"{type(feature).__name__} of shape {feature.shape}"
  kinds: dict[str, Callable[[np.dtype], bool]] = {
    "text": lambda dtype: dtype.kind in "OSU",
    "whole number": lambda dtype: dtype.kind in "iu",
    "number": lambda dtype: dtype.kind == "f",
  }
  dtype = np.dtype(feature.np_dtype)
  kind = next((name for name, fits in kinds.items() if fits(dtype)), str(dtype))
  return f"a sequence of {kind}" if rank else kind
