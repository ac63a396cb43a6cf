# SPDX-License-Identifier: Apache-2.0
"""Records of coloured squares, their tokenizer, and configs/tiny.py on them."""

import inspect
from pathlib import Path

import ml_collections
import numpy as np
import simplejpeg
from array_record.python import array_record_module

from slowfast_jax.config import load_config
from slowfast_jax.data import records
from slowfast_jax.data.records import Record
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.train.step import TrainState

# A state is built of shapes and of shardings too, which no array annotation describes.
TrainState.__init__ = inspect.unwrap(TrainState.__init__)

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
COLOURS = {"red": (220, 0, 0), "green": (0, 220, 0), "blue": (0, 0, 220)}


def overrides(data: Path, *more: str) -> list[str]:
  words = [f"data.records={data / 'records'}", f"data.tokenizer={data / 'tokenizer'}", *more]
  return [f"--config.{word}" for word in words]


def tiny_config(data: Path, *more: str) -> ml_collections.ConfigDict:
  return load_config(TINY, overrides(data, *more))


def write_data(folder: Path, num_records: int = 12) -> Path:
  """Makes folder/records and folder/tokenizer."""
  write_records(folder / "records", [record(i) for i in range(num_records)])
  text = "You are a helpful assistant. system user assistant Which colour? red green blue"
  train_tokenizer([text] * 5, 300).save(folder / "tokenizer")
  return folder


def record(i: int, num_frames: int = 4, size: int = 16) -> Record:
  name, colour = list(COLOURS.items())[i % len(COLOURS)]
  jpeg = simplejpeg.encode_jpeg(np.full((size, size, 3), colour, np.uint8), quality=95)
  turns = [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": name}]
  return Record(
    id=f"square{i}",
    source="",
    frames=[jpeg] * num_frames,
    timestamps=np.arange(num_frames, dtype=np.float32),
    frame_indices=np.arange(num_frames, dtype=np.int32),
    duration=float(num_frames),
    fps=1.0,
    num_video_frames=num_frames,
    height=size,
    width=size,
    conversations=[turns],
    metadata={"kind": "video"},
  )


def write_records(folder: Path, content: list[Record]) -> None:
  folder.mkdir(parents=True)
  file = folder / records.shard_name(0, 1)
  writer = array_record_module.ArrayRecordWriter(str(file), records.WRITER_OPTIONS)
  encoded = [records.encode_record(one) for one in content]
  for data in encoded:
    writer.write(data)
  writer.close()
  index = [(i, 0) for i in range(len(content))]
  records.write_dataset_info(folder, [len(content)], sum(map(len, encoded)), index)
