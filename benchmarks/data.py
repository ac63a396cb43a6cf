# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench data`: training from records beside decoding the videos at every step.

Counted in CPU-seconds, which other work on the machine does not change much; only the stall of a
consumer is wall time. The video is made here: moving textures with noise, whose JPEG frames are as
large as those of ordinary videos.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.preprocess import preprocess
from slowfast_jax.data.records import Record, RecordSource, decode_frames
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.data.video import read_frames
from slowfast_jax.errors import UsageError

HELP = "training from records beside decoding mp4 each time; stalls and memory"

_HEIGHT, _WIDTH, _FPS = 720, 1280, 30
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Result:
  """The measurements; rates are for one core.

  Attributes:
    records_fps: frames a second that are read from records and decoded.
    records_per_second: such records.
    pipeline_fps: frames a second of whole batches, text and collating included.
    pipeline_wall_fps: the same by the clock, all threads together.
    mp4_fps: frames a second that are decoded from 720p video and resized.
    advantage: CPU-seconds of mp4 for each of the records'.
    jpeg_kilobytes: of a stored frame.
    stall_seconds: for which the consumer had to wait, of `consumer_seconds`.
    consumer_seconds: for which it took a sample every `consumer_rate`-th of a second.
    memory_megabytes: by which the process grew over `memory_records` records.
  """

  frames: int
  size: int
  records_fps: float
  records_per_second: float
  pipeline_fps: float
  pipeline_wall_fps: float
  mp4_fps: float
  advantage: float
  jpeg_kilobytes: float
  stall_seconds: float
  consumer_seconds: float
  consumer_rate: float
  memory_megabytes: float
  memory_records: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--frames", type=int, default=64, help="of a record (%(default)s)")
  add("--size", type=int, default=384, help="of a frame in pixels (%(default)s)")
  add("--seconds", type=float, default=30.0, help="length of the video (%(default)g)")
  add("--records", type=int, default=60, help="records to read for the rates (%(default)s)")
  add("--rate", type=float, default=20.0, help="samples a second of the consumer (%(default)g)")
  add("--memory-records", type=int, default=20_000, help="records to grow over (%(default)s)")
  add("--threads", type=int, default=2, help="of the pipeline (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the table."""
  for name in ("frames", "size", "records", "memory_records", "threads"):
    if getattr(args, name) < 1:
      raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
  with tempfile.TemporaryDirectory(prefix="slowfast-bench-") as folder:
    result = measure(pathlib.Path(folder), args)
  print(_table(result))
  if args.json:
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    pathlib.Path(args.json).write_text(json.dumps(about | dataclasses.asdict(result), indent=2))
  return 0


def measure(folder: pathlib.Path, args: argparse.Namespace) -> Result:
  """Makes a video, prepares it, and measures."""
  video = write_video(folder / "clips" / "a.mp4", args.seconds)
  record = _prepare(folder, "records", args.frames, args.size)
  # Without threads, which would read ahead while something else is measured.
  batches = _pipeline(record, args.frames, args.size, threads=0).iterate()
  # In turns, and of each the best: what else runs on the machine disturbs all of them, not one.
  part = math.ceil(args.records / _ROUNDS)
  mp4_fps = records_fps = pipeline_fps = 0.0
  for _ in range(_ROUNDS):
    used, _ = _cpu(lambda: _decode_video(video, args.frames, args.size))
    mp4_fps = max(mp4_fps, args.frames / used)
    used, _ = _cpu(lambda: [decode_frames(r) for r in _reread(record, part)])
    records_fps = max(records_fps, args.frames * part / used)
    used, _ = _cpu(lambda: [next(batches) for _ in range(part)])
    pipeline_fps = max(pipeline_fps, args.frames * part / used)
  batches = _pipeline(record, args.frames, args.size, args.threads).iterate()
  _, wall = _cpu(lambda: [next(batches) for _ in range(args.records)])
  wall_fps = args.frames * args.records / wall
  batches.close()  # type: ignore[attr-defined]

  stalled, lasted = _consume(record, args)
  short = _prepare(folder, "short", min(args.frames, 4), args.size)
  grown = _memory(short, min(args.frames, 4), args)
  jpegs = [len(frame) for frame in record[0].frames]
  return Result(
    frames=args.frames,
    size=args.size,
    records_fps=records_fps,
    records_per_second=records_fps / args.frames,
    pipeline_fps=pipeline_fps,
    pipeline_wall_fps=wall_fps,
    mp4_fps=mp4_fps,
    advantage=records_fps / mp4_fps,
    jpeg_kilobytes=float(np.mean(jpegs)) / 1e3,
    stall_seconds=stalled,
    consumer_seconds=lasted,
    consumer_rate=args.rate,
    memory_megabytes=grown,
    memory_records=args.memory_records,
  )


def write_video(path: pathlib.Path, seconds: float) -> pathlib.Path:
  """A 720p H.264 video of textures that move, at the settings of ordinary uploads."""
  path.parent.mkdir(parents=True)
  rng = np.random.default_rng(0)
  layers = [_texture(rng, cells) for cells in (6, 24, 120)]
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=_FPS, options={"preset": "veryfast", "crf": "23"})
    stream.width, stream.height, stream.pix_fmt, stream.gop_size = _WIDTH, _HEIGHT, "yuv420p", 250
    for i in range(round(seconds * _FPS)):
      shifted = [np.roll(x, (i * k, 2 * i * k), (0, 1)) for k, x in enumerate(layers)]
      image = sum(weight * x for weight, x in zip((0.6, 0.3, 0.1), shifted))
      grain = rng.integers(-4, 5, (_HEIGHT, _WIDTH, 1))
      pixels = np.clip(image + grain, 0, 255).astype(np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())
  return path


def _texture(rng: np.random.Generator, cells: int) -> np.ndarray:
  coarse = rng.integers(0, 256, (cells * 9 // 16 + 1, cells, 3), np.uint8)
  smooth = Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
  return np.asarray(smooth, np.float32)


def _prepare(folder: pathlib.Path, name: str, frames: int, size: int) -> RecordSource:
  turns = [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "All."}]
  annotations = folder / f"{name}.json"
  annotations.write_text(json.dumps([{"id": "a", "video": "a.mp4", "conversations": turns}]))
  config = PrepareConfig(num_frames=frames, size=size, workers=1)
  prepare(folder / "clips", annotations, folder / name, config)
  return RecordSource(folder / name)


def _reread(source: RecordSource, count: int) -> Iterator[Record]:
  return (source[0] for _ in range(count))


def _decode_video(path: pathlib.Path, frames: int, size: int) -> None:
  read_frames(path, frames, transform=lambda image: preprocess(image, size, "siglip"))


def _pipeline(source: RecordSource, frames: int, size: int, threads: int) -> TrainPipeline:
  geometry = Geometry(
    num_frames=frames,
    decoder_length=1024,
    text_bound=512,
    image_size=(size, size),
    tokens_per_frame=1,
    min_fast_frames=1,
  )
  tokenizer = train_tokenizer(["What moves? All."], 300)
  return TrainPipeline(source, tokenizer, geometry, batch_size=1, seed=0, read_threads=threads)


def _consume(source: RecordSource, args: argparse.Namespace) -> tuple[float, float]:
  """Takes a sample at every tick; returns the seconds waited past a tick, and in all."""
  batches = _pipeline(source, args.frames, args.size, args.threads).iterate()
  next(batches)
  time.sleep(0.5)  # The buffers fill while a real run compiles.
  began, stalled = time.monotonic(), 0.0
  late = 0.0  # A stall delays all later ticks.
  for tick in range(1, args.records * 2):
    asked = time.monotonic()
    next(batches)
    waited = time.monotonic() - asked
    if waited > 1e-3:
      stalled += waited
    due = began + late + tick / args.rate
    late += max(time.monotonic() - due, 0.0)
    time.sleep(max(due - time.monotonic(), 0.0))
  batches.close()  # type: ignore[attr-defined]
  return stalled, time.monotonic() - began


def _memory(source: RecordSource, frames: int, args: argparse.Namespace) -> float:
  """Megabytes by which the process grows, after its buffers have filled."""
  batches = _pipeline(source, frames, args.size, args.threads).iterate()
  for _ in range(min(args.memory_records, 500)):
    next(batches)
  before = _resident()
  for _ in range(args.memory_records):
    next(batches)
  grown = _resident() - before
  batches.close()  # type: ignore[attr-defined]
  return grown


def _resident() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


def _cpu(work: Callable[[], Any]) -> tuple[float, float]:
  """CPU-seconds of all threads, and seconds."""
  used, began = time.process_time(), time.monotonic()
  work()
  return time.process_time() - used, time.monotonic() - began


def _table(r: Result) -> str:
  rows: Sequence[tuple[str, str]] = [
    (f"records, {r.frames} frames of {r.size} px", f"{r.records_fps:,.0f} frames/s/core"),
    ("  the same in records", f"{r.records_per_second:.1f} records/s/core"),
    ("  with text, rows and batches", f"{r.pipeline_fps:,.0f} frames/s/core"),
    ("  by the clock, all threads", f"{r.pipeline_wall_fps:,.0f} frames/s"),
    ("  a frame takes", f"{r.jpeg_kilobytes:.1f} kB"),
    ("decoding 720p mp4 each time", f"{r.mp4_fps:,.1f} frames/s/core"),
    ("CPU of mp4 for that of records", f"{r.advantage:.1f} times"),
    (
      f"stall of {r.consumer_rate:g} samples/s",
      f"{r.stall_seconds:.3f} s of {r.consumer_seconds:.1f} s",
    ),
    (f"memory over {r.memory_records:,} records", f"{r.memory_megabytes:+.1f} MB"),
  ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
