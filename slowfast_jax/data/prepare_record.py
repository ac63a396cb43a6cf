# SPDX-License-Identifier: Apache-2.0
"""One annotated video, still image or text to its record: the part of `prepare` that workers do."""

import dataclasses
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from slowfast_jax.data.annotations import Annotation
from slowfast_jax.data.media import Medium
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.preprocess import CLIP_MEAN, preprocess
from slowfast_jax.data.records import Record, encode_record, encode_text, text_of
from slowfast_jax.data.video import read_frames

_SIGLIP_MEAN = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Item:
  """All that is annotated about one media file, or one conversation without any.

  Attributes:
    media: the annotated path; None for text.
    kind: "video", "image" or "text".
    entries: the annotations.
    medium: where the media lie; None for text.
    duplicates: other annotated paths that hold the same bytes; their entries are here too.
  """

  media: str | None
  kind: str
  entries: list[Annotation]
  medium: Medium | None = None
  duplicates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Made:
  """A serialised record, on its way from a worker."""

  data: bytes
  text: str
  frames: int
  lost_frames: int


def make(config: PrepareConfig, item: Item) -> Made:
  """Reads one item's media and makes its record. Runs in a worker."""
  record = _MAKERS[item.kind](config, item)
  lost = record.metadata.get("decode_errors", 0)
  return Made(encode_record(record), encode_text(text_of(record)), len(record.frames), lost)


def _video_record(config: PrepareConfig, item: Item) -> Record:
  assert item.medium is not None
  frames = read_frames(
    item.medium.open(),
    config.num_frames,
    sampler=config.sampler,
    target_fps=config.target_fps,
    transform=lambda image: _jpeg(preprocess(image, config.size, config.policy), config),
  )
  about = {"decode_errors": frames.decode_errors, "rotation": frames.rotation}
  return Record(
    frames=list(frames.images),
    timestamps=frames.timestamps,
    frame_indices=frames.indices,
    duration=frames.duration,
    fps=frames.fps,
    num_video_frames=frames.total_frames,
    height=frames.height,
    width=frames.width,
    **_annotated(item, about),
  )


def _image_record(config: PrepareConfig, item: Item) -> Record:
  assert item.medium is not None
  with Image.open(item.medium.open()) as opened:
    image = np.array(opened.convert("RGB"))
  height, width, _ = image.shape
  mean = CLIP_MEAN if config.policy == "clip" else _SIGLIP_MEAN
  square = preprocess(image, config.size, "pad", mean=mean)
  return _still_record([_jpeg(square, config)], height, width, item)


def _text_record(config: PrepareConfig, item: Item) -> Record:
  return _still_record([], 0, 0, item)


_MAKERS = {"video": _video_record, "image": _image_record, "text": _text_record}


def _still_record(frames: list[bytes], height: int, width: int, item: Item) -> Record:
  return Record(
    frames=frames,
    timestamps=np.zeros(len(frames), np.float32),
    frame_indices=np.zeros(len(frames), np.int32),
    duration=0.0,
    fps=0.0,
    num_video_frames=len(frames),
    height=height,
    width=width,
    **_annotated(item, {}),
  )


def _annotated(item: Item, about: dict[str, Any]) -> dict[str, Any]:
  """The fields of a record that come from the annotations."""
  entries = [{"id": entry.id, **entry.extra} for entry in item.entries]
  if item.duplicates:
    about = {**about, "duplicates": list(item.duplicates)}
  return {
    "id": item.entries[0].id,
    "source": item.media or "",
    "conversations": [entry.conversations for entry in item.entries],
    "metadata": {"kind": item.kind, "entries": entries, **about},
  }


def _jpeg(image: np.ndarray, config: PrepareConfig) -> bytes:
  return simplejpeg.encode_jpeg(
    np.ascontiguousarray(image), config.quality, colorspace="RGB", colorsubsampling="420"
  )
