# SPDX-License-Identifier: Apache-2.0
"""Records: what `slowfast prepare` writes and training reads, one video a record.

A records folder is an ordinary TFDS data set of ArrayRecord shards, so `tfds` and Grain read it
too. Frames are stored as JPEG, once, however many conversations a video has; `index.npy` lists the
(record, conversation) pairs that an epoch goes through, and `texts.jsonl` repeats all but the
frames, for what would otherwise read terabytes to count words.
"""

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import Float32, Int32, UInt8

from slowfast_jax.errors import UserError

DATASET, SPLIT, VERSION = "slowfast", "train", "1.0.0"
INDEX_FILE, FEATURES_FILE, INFO_FILE = "index.npy", "features.json", "dataset_info.json"
TEXTS_FILE = "texts.jsonl"
SHARD_PREFIX = f"{DATASET}-{SPLIT}.array_record-"
# group_size 1: a read touches one record only. Uncompressed: JPEG does not shrink any further.
WRITER_OPTIONS = "group_size:1,uncompressed"


class RecordsError(UserError):
  """A records folder cannot be read: what is wrong with which file, and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One video or still image with its conversations, or one conversation without either.

  Attributes:
    id: unique in its folder.
    source: path of the media file below the media folder; empty for text.
    frames: JPEG images in the order of time, all of one size.
    timestamps: seconds of each frame from the video's first frame.
    frame_indices: number of each frame in the video.
    duration: of the video, in seconds; 0 for images and text.
    fps: of the video; 0 for images and text.
    num_video_frames: frames that the video had.
    height: of the source, upright.
    width: of the source, upright.
    conversations: each a list of turns {"from", "value"}.
    metadata: "kind"; "entries" with the id and all further fields that were annotated, one for each
      conversation; "decode_errors" and "rotation" of videos.
  """

  id: str
  source: str
  frames: list[bytes]
  timestamps: Float32[np.ndarray, " F"]
  frame_indices: Int32[np.ndarray, " F"]
  duration: float
  fps: float
  num_video_frames: int
  height: int
  width: int
  conversations: list[list[dict[str, str]]]
  metadata: dict[str, Any]


def decode_frames(record: Record) -> UInt8[np.ndarray, "F h w C"]:
  """The frames of a record as RGB pixels; shape [0, 0, 0, 3] where it has none."""
  if not record.frames:
    return np.empty((0, 0, 0, 3), np.uint8)
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(record.frames[0])
    images = np.empty((len(record.frames), height, width, 3), np.uint8)
    for image, jpeg in zip(images, record.frames):
      # Not fastdct or fastupsample: they differ from what every other decoder gives.
      decoded = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=image)
      if decoded.shape != image.shape:
        raise ValueError(f"expected {image.shape}, got {decoded.shape}")
  except ValueError as error:
    raise RecordsError(
      f"record {record.id!r}: a frame is no readable JPEG of the record's size ({error}); "
      "prepare the records again"
    ) from error
  return images


def features():
  """The TFDS features of a record."""
  import tensorflow_datasets as tfds

  text, sequence = tfds.features.Text(), tfds.features.Sequence
  return tfds.features.FeaturesDict(
    {
      "id": text,
      "source": text,
      "frames": sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
      "timestamps": sequence(np.float32),
      "frame_indices": sequence(np.int32),
      "duration": np.float32,
      "fps": np.float32,
      "num_video_frames": np.int32,
      "height": np.int32,
      "width": np.int32,
      "conversations": sequence(text),
      "metadata": text,
    }
  )


@dataclasses.dataclass(frozen=True)
class RecordText:
  """What can be known of a record without its frames.

  Attributes:
    kind: "video", "image" or "text".
    frames: how many it has.
    duration: of the video, in seconds.
    conversations: as in `Record`.
  """

  kind: str
  frames: int
  duration: float
  conversations: list[list[dict[str, str]]]


def text_of(record: Record) -> RecordText:
  """What `texts.jsonl` says of a record."""
  kind = record.metadata.get("kind", "video")
  duration = float(np.float32(record.duration))  # As the record stores it.
  return RecordText(kind, len(record.frames), duration, record.conversations)


def encode_text(text: RecordText) -> str:
  """A line of `texts.jsonl`."""
  return _json(dataclasses.asdict(text)) + "\n"


def encode_record(record: Record) -> bytes:
  """The record as a serialised `tf.train.Example`; equal records give equal bytes."""
  pb = _proto()

  def texts(values: Sequence[str | bytes]):
    values = [v if isinstance(v, bytes) else v.encode() for v in values]
    return pb.Feature(bytes_list=pb.BytesList(value=values))

  def floats(values):
    return pb.Feature(float_list=pb.FloatList(value=values))

  def ints(values):
    return pb.Feature(int64_list=pb.Int64List(value=values))

  fields = {
    "id": texts([record.id]),
    "source": texts([record.source]),
    "frames": texts(record.frames),
    "timestamps": floats(record.timestamps.tolist()),
    "frame_indices": ints(record.frame_indices.tolist()),
    "duration": floats([record.duration]),
    "fps": floats([record.fps]),
    "num_video_frames": ints([record.num_video_frames]),
    "height": ints([record.height]),
    "width": ints([record.width]),
    "conversations": texts([_json(turns) for turns in record.conversations]),
    "metadata": texts([_json(record.metadata)]),
  }
  example = pb.Example(features=pb.Features(feature=fields))
  # Deterministic: the order of map entries otherwise differs between processes.
  return example.SerializeToString(deterministic=True)


def parse_record(data: bytes, parse_metadata: Callable[[str], dict] = json.loads) -> Record:
  """The inverse of `encode_record`."""
  fields = _proto().Example.FromString(data).features.feature

  def text(name: str) -> str:
    return fields[name].bytes_list.value[0].decode()

  def number(name: str) -> float:
    return fields[name].float_list.value[0]

  def integer(name: str) -> int:
    return fields[name].int64_list.value[0]

  return Record(
    id=text("id"),
    source=text("source"),
    frames=list(fields["frames"].bytes_list.value),
    timestamps=np.array(fields["timestamps"].float_list.value, np.float32),
    frame_indices=np.array(fields["frame_indices"].int64_list.value, np.int32),
    duration=number("duration"),
    fps=number("fps"),
    num_video_frames=integer("num_video_frames"),
    height=integer("height"),
    width=integer("width"),
    conversations=[json.loads(turns) for turns in fields["conversations"].bytes_list.value],
    metadata=parse_metadata(text("metadata")),
  )


# Two threads that import it at once wait for each other, each with a lock of TFDS's lazy imports.
_importing = threading.Lock()


def _proto():
  with _importing:
    return _import_proto()


@functools.cache
def _import_proto():
  # Late: importing it takes half a second, which listing or opening a folder need not spend.
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  class Proto:
    Example = tf_example_pb2.Example
    Features, Feature = tf_feature_pb2.Features, tf_feature_pb2.Feature
    BytesList, FloatList = tf_feature_pb2.BytesList, tf_feature_pb2.FloatList
    Int64List = tf_feature_pb2.Int64List

  return Proto


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, allow_nan=False)


def shard_name(shard: int, num_shards: int) -> str:
  """The name of a shard's file, as TFDS writes it."""
  return f"{SHARD_PREFIX}{shard:05d}-of-{num_shards:05d}"


def write_dataset_info(
  folder: str | os.PathLike, shard_lengths: Sequence[int], num_bytes: int, index: Sequence
) -> None:
  """Writes what makes finished shards a data set: TFDS metadata and `index.npy`.

  Args:
    folder: where to; it holds files named as the shards are, for TFDS to recognise.
    shard_lengths: records of each shard.
    num_bytes: of all serialised records.
    index: (record, conversation) pairs, one for each conversation.
  """
  import tensorflow_datasets as tfds

  np.save(os.path.join(folder, INDEX_FILE), np.array(index, np.int32).reshape(-1, 2))
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=DATASET, split=SPLIT, filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name=SPLIT, shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features(),
    split_infos=[split],
    version=VERSION,
    check_data=False,
    description="Videos sampled to JPEG frames, with their conversations.",
  )


@dataclasses.dataclass(frozen=True)
class ShardSlice:
  """A whole file, in the form that lets ArrayRecordDataSource open it only when it is read."""

  filename: str
  take: int
  skip: int = 0

  @property
  def examples_in_shard(self) -> int:
    return self.take


class RecordSource:
  """Random access to the records of a folder. Cheap to open, picklable, safe to share by threads.

  Attributes:
    path: the folder.
    split: of the data set.
    index: (record, conversation) pairs, one for each conversation.
    shards: file and number of records of each shard.
    num_bytes: of all records.
  """

  path: str
  split: str = SPLIT
  index: Int32[np.ndarray, "n 2"]

  def __init__(self, path: str | os.PathLike):
    folder = epath.Path(path)
    self.path = os.fspath(path)
    lengths, self.num_bytes = _read_info(folder)
    names = [shard_name(i, len(lengths)) for i in range(len(lengths))]
    present = {file.name for file in folder.iterdir()}
    if missing := [name for name in [*names, INDEX_FILE] if name not in present]:
      raise RecordsError(
        f"{self.path}: {len(missing)} files are missing, among them {missing[0]}; copy the folder "
        "again, or run `slowfast prepare` again with the same arguments to make them anew"
      )
    self.shards = [(os.fspath(folder / name), n) for name, n in zip(names, lengths)]
    self._records = array_record_data_source.ArrayRecordDataSource(
      [ShardSlice(*shard) for shard in self.shards]
    )
    self.index = self._read_index(folder / INDEX_FILE)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Record:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)} in {self.path}")
    try:
      return self._parse(self._records[i])
    except RecordsError:
      raise
    # A file that is cut off gives empty records without any complaint: parsing finds them out.
    except (RuntimeError, IndexError, ValueError, DecodeError) as error:
      raise self._unreadable(i, error) from error

  def __repr__(self) -> str:
    return f"RecordSource({self.path!r})"

  def texts(self) -> Iterator[RecordText | None]:
    """All records without their frames, in order; None for one that cannot be read."""
    file = epath.Path(self.path) / TEXTS_FILE
    if file.exists():
      yield from self._read_texts(file)
      return
    yield from self._texts_of_records()

  def _parse(self, data: bytes) -> Record:
    return parse_record(data)

  def _texts_of_records(self) -> Iterator[RecordText | None]:
    for i in range(len(self)):
      try:
        yield text_of(self[i])
      except RecordsError:
        yield None

  def _read_index(self, file: epath.Path) -> Int32[np.ndarray, "n 2"]:
    with file.open("rb") as opened:
      try:
        index = np.load(opened, allow_pickle=False)
      except (ValueError, EOFError) as error:
        raise RecordsError(f"{file}: not readable ({error}); prepare the records again") from error
    if index.ndim != 2 or index.shape[1] != 2 or (len(index) and index[:, 0].max() >= len(self)):
      raise RecordsError(
        f"{file}: expected (record, conversation) pairs of {len(self)} records, got an array of "
        f"shape {list(index.shape)}; it belongs to other records, prepare them again"
      )
    return index

  def _read_texts(self, file: epath.Path) -> Iterator[RecordText]:
    count = 0
    with file.open("rb") as lines:
      for count, line in enumerate(lines, start=1):
        try:
          yield RecordText(**json.loads(line))
        except (ValueError, TypeError) as error:
          raise RecordsError(f"{file}:{count}: not readable ({error}); copy it again") from error
    if count != len(self):
      raise RecordsError(f"{file}: has {count} lines for {len(self)} records; copy it again")

  def _unreadable(self, i: int, error: Exception) -> RecordsError:
    ends = np.cumsum([length for _, length in self.shards])
    shard = int(np.searchsorted(ends, i, side="right"))
    file, length = self.shards[shard]
    found = array_record_module.ArrayRecordReader(file).num_records()
    if found == length:
      what = f"record {i - ends[shard] + length} is damaged ({error})"
    else:
      what = f"cut off or damaged: expected {length} records, found {found}"
    return RecordsError(
      f"{file}: {what}; copy it again, or delete it and run `slowfast prepare` again with the same "
      "arguments to make it anew"
    )


def is_records_folder(path: str | os.PathLike) -> bool:
  """Whether the folder has the files that make records a data set."""
  return (epath.Path(path) / INFO_FILE).exists() and (epath.Path(path) / INDEX_FILE).exists()


def _read_info(folder: epath.Path) -> tuple[list[int], int]:
  """Records of each shard, and bytes of all."""
  if not folder.is_dir():
    raise RecordsError(f"{folder}: there is no such folder; give one that `slowfast prepare` wrote")
  file = folder / INFO_FILE
  if not file.exists():
    if any(entry.name.startswith(SHARD_PREFIX) for entry in folder.iterdir()):
      remedy = "preparing it has not finished; run the same `slowfast prepare` command again"
    else:
      remedy = "give a folder that `slowfast prepare` wrote"
    raise RecordsError(f"{folder}: not a records folder, it has no {INFO_FILE}; {remedy}")
  try:
    info = json.loads(file.read_text())
    (split,) = [split for split in info["splits"] if split["name"] == SPLIT]
    lengths, num_bytes = [int(n) for n in split["shardLengths"]], int(split["numBytes"])
    name = info["name"]
  except (ValueError, KeyError, TypeError) as error:
    raise RecordsError(
      f"{file}: not the description of one {SPLIT!r} split ({error!r}); prepare the records again"
    ) from error
  if name != DATASET:
    raise RecordsError(
      f"{folder}: holds the data set {name!r}, not records of `slowfast prepare` ({DATASET!r})"
    )
  return lengths, num_bytes
