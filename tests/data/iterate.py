# SPDX-License-Identifier: Apache-2.0
"""A program to be killed: iterates over a pipeline and prints each step with its batch's digest.

python -m tests.data.iterate FOLDER --workers 2 --pack
"""

import argparse
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.pipeline import Bucket, TrainPipeline
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.tokenizer import Tokenizer, train_tokenizer
from slowfast_jax.shapes import Batch
from tests.data.test_pipeline import record
from tests.train.tiny_run import write_records

NUM_RECORDS, BATCH_SIZE = 60, 4
ROW = Geometry(
  num_frames=4,
  decoder_length=120,
  text_bound=100,
  image_size=(8, 8),
  tokens_per_frame=4,
  temporal_stride=1,
  min_fast_frames=1,
)


def write_data(folder: pathlib.Path) -> pathlib.Path:
  """Texts, stills and short videos, one of them damaged, and a tokenizer."""
  content = []
  for i in range(NUM_RECORDS):
    one = record(i % 6, num_frames=(0, 1, 4, 7)[i % 4])
    asked = "<video>\nnumber" if one.frames else "number"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"user {i}"}]
    content.append(dataclasses.replace(one, id=str(i), conversations=[turns]))
  content[9] = dataclasses.replace(content[9], frames=[b"no jpeg"])
  write_records(folder / "records", content)
  train_tokenizer(["You are a helpful assistant. system user number"] * 9, 300).save(folder)
  return folder


def open_pipeline(folder: pathlib.Path, **options) -> TrainPipeline:
  small = dataclasses.replace(ROW, num_frames=1, decoder_length=60, max_fast_frames=0)
  return TrainPipeline(
    RecordSource(folder / "records"),
    Tokenizer.from_dir(folder),
    ROW,
    BATCH_SIZE,
    **{"seed": 1, "random_offset": True, "buckets": [Bucket(small, BATCH_SIZE)]} | options,
  )


def digest(batch: Batch) -> str:
  content = hashlib.sha256()
  for field in dataclasses.fields(batch):
    array = np.ascontiguousarray(getattr(batch, field.name))
    content.update(f"{field.name} {array.dtype} {array.shape}".encode() + array.tobytes())
  return content.hexdigest()


def digests(pipeline: TrainPipeline, start: int) -> Iterator[str]:
  return map(digest, pipeline.iterate(start))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--workers", type=int)
  parser.add_argument("--pack", action="store_true")
  args = parser.parse_args()
  pipeline = open_pipeline(args.folder, workers=args.workers, pack=args.pack)
  for step, one in enumerate(digests(pipeline, 0)):
    print(step, one, flush=True)


if __name__ == "__main__":
  main()
