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
import simplejpeg
from PIL import Image

from slowfast_jax.data.packing import Geometry
from slowfast_jax.data.pipeline import TrainPipeline
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.preprocess import preprocess
from slowfast_jax.data.records import Record, RecordSource, RecordText, decode_frames
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.data.video import read_frames
from slowfast_jax.errors import UsageError

HELP = "training from records beside decoding mp4 each time; stalls, memory and packing"

_HEIGHT, _WIDTH, _FPS = 720, 1280, 30
_ROUNDS = 5
_MIXED_SIZE = 16


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
    packed: the share of decoder positions that hold something, in an epoch of packed batches of
      `packed_samples` texts, stills and short videos.
    alone: the same with every sample in a row of its own.
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
  packed: float
  alone: float
  packed_samples: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--frames", type=int, default=64, help="of a record (%(default)s)")
  add("--size", type=int, default=384, help="of a frame in pixels (%(default)s)")
  add("--seconds", type=float, default=30.0, help="length of the video (%(default)g)")
  add("--records", type=int, default=60, help="records to read for the rates (%(default)s)")
  add("--rate", type=float, default=20.0, help="samples a second of the consumer (%(default)g)")
  add("--memory-records", type=int, default=20_000, help="records to grow over (%(default)s)")
  add("--packed-samples", type=int, default=4000, help="of the mixed set (%(default)s)")
  add("--threads", type=int, default=2, help="of the pipeline (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the table."""
  for name in ("frames", "size", "records", "memory_records", "packed_samples", "threads"):
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
  mixed = MixedSource(args.packed_samples)
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
    packed=_utilisation(mixed, pack=True),
    alone=_utilisation(mixed, pack=False),
    packed_samples=args.packed_samples,
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


class MixedSource:
  """Texts, stills and short videos of many lengths, in memory: instruction data in small.

  Of ten samples four are texts, three ask about a picture and three about a video of 2 to 16
  frames. Questions and answers are log-normal in their number of words, most of them short.
  """

  def __init__(self, num_samples: int):
    rng = np.random.default_rng(0)
    self.index = np.stack([np.arange(num_samples), np.zeros(num_samples, int)], axis=1)
    kinds = rng.choice(3, num_samples, p=[0.4, 0.3, 0.3])
    lengths = rng.integers(2, 17, num_samples)
    self._frames = np.where(kinds == 0, 0, np.where(kinds == 1, 1, lengths))
    words = np.exp(rng.normal((2.5, 3.2), 0.8, (num_samples, 2))).astype(int)
    self._words = np.clip(words, 1, 150)
    self._jpeg = simplejpeg.encode_jpeg(np.zeros((_MIXED_SIZE, _MIXED_SIZE, 3), np.uint8))

  def __getitem__(self, i: int) -> Record:
    text, stamps = self._text(i), np.arange(self._frames[i])
    return Record(
      id=str(i),
      source="",
      frames=[self._jpeg] * text.frames,
      timestamps=stamps.astype(np.float32),
      frame_indices=stamps.astype(np.int32),
      duration=text.duration,
      fps=1.0,
      num_video_frames=text.frames,
      height=_MIXED_SIZE,
      width=_MIXED_SIZE,
      conversations=text.conversations,
      metadata={"kind": text.kind},
    )

  def texts(self) -> Iterator[RecordText]:
    return (self._text(i) for i in range(len(self.index)))

  def _text(self, i: int) -> RecordText:
    frames = int(self._frames[i])
    asked, answered = (" ".join(["word"] * int(n)) for n in self._words[i])
    turns = [
      {"from": "human", "value": f"<video>\n{asked}" if frames else asked},
      {"from": "gpt", "value": answered},
    ]
    kind = "text" if frames == 0 else "image" if frames == 1 else "video"
    return RecordText(kind, frames, float(frames), [turns])


def _utilisation(source: MixedSource, pack: bool) -> float:
  """The share of decoder positions that hold something, counted in the batches of an epoch."""
  geometry = Geometry(
    num_frames=32,
    decoder_length=1024,
    text_bound=1024,
    image_size=(_MIXED_SIZE, _MIXED_SIZE),
    tokens_per_frame=16,
    temporal_stride=1,
    min_fast_frames=1,
  )
  tokenizer = train_tokenizer(["You are a helpful assistant. system user word"] * 9, 320)
  pipeline = TrainPipeline(source, tokenizer, geometry, 1, seed=0, read_threads=0, pack=pack)
  batches = pipeline.iterate()
  samples = filled = rows = 0
  while samples < len(source.index):  # Every row once is an epoch.
    batch = next(batches)
    samples += int(batch.segments.max())
    filled += int((batch.segments > 0).sum())
    rows += 1
  batches.close()  # type: ignore[attr-defined]
  return filled / (rows * geometry.decoder_length)


def _resident() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 1e6


def _cpu(work: Callable[[], Any]) -> tuple[float, float]:
  """CPU-seconds of all threads, and seconds."""
  used, began = time.process_time(), time.monotonic()
  work()
  return time.process_time() - used, time.monotonic() - began


def _table(r: Result) -> str:
  rows: Sequence[tuple[str, ...]] = [
    (
      f"records, {r.frames} frames of {r.size} px",
      f"{r.records_fps:,.0f} frames/s/core",
      ">= 1,500",
    ),
    ("  the same in records", f"{r.records_per_second:.1f} records/s/core"),
    ("  with text, rows and batches", f"{r.pipeline_fps:,.0f} frames/s/core"),
    ("  by the clock, all threads", f"{r.pipeline_wall_fps:,.0f} frames/s"),
    ("  a frame takes", f"{r.jpeg_kilobytes:.1f} kB"),
    ("decoding 720p mp4 each time", f"{r.mp4_fps:,.1f} frames/s/core"),
    ("CPU of mp4 for that of records", f"{r.advantage:.1f} times", ">= 40"),
    (
      f"stall of {r.consumer_rate:g} samples/s",
      f"{r.stall_seconds:.3f} s of {r.consumer_seconds:.1f} s",
      "none, on two cores",
    ),
    (f"memory over {r.memory_records:,} records", f"{r.memory_megabytes:+.1f} MB", "< 50 MB"),
    (f"positions filled, {r.packed_samples:,} mixed samples", f"{r.packed:.1%}", ">= 92%"),
    ("  each sample in its own row", f"{r.alone:.1%}"),
  ]
  names, values = (max(len(row[i]) for row in rows) for i in (0, 1))
  lines = [
    f"{name:<{names}}  {value:<{values}}  {''.join(f'goal {g}' for g in goal)}".rstrip()
    for name, value, *goal in rows
  ]
  return "\n".join(lines)
