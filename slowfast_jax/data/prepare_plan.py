# SPDX-License-Identifier: Apache-2.0
"""What `prepare` would do: counted, and estimated from a sample, before any work."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence

from slowfast_jax.data.media import Media, Paths
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.prepare_items import place_items, read_items
from slowfast_jax.data.prepare_record import Item, Made, make
from slowfast_jax.data.video_stream import VideoSource
from slowfast_jax.errors import UserError

# So many are opened for their length, and so many are prepared for their size and time.
_PROBED, _TRIED = 200, 12


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `prepare` would do.

  Attributes:
    videos, images, texts: items that would be prepared.
    conversations: of all items.
    bad_annotations: entries that would be left out.
    missing: files that are annotated and not there.
    source_bytes: of the files that are there.
    video_hours: estimated from `probed` videos; None where none could be read.
    frames: estimated from `tried` items; None where none could be prepared.
    output_bytes: estimated likewise.
    cpu_hours: estimated likewise.
    failed: how many of the items that were tried could not be prepared.
  """

  videos: int
  images: int
  texts: int
  conversations: int
  bad_annotations: int
  missing: int
  source_bytes: int
  video_hours: float | None
  frames: int | None
  output_bytes: int | None
  cpu_hours: float | None
  probed: int
  tried: int
  failed: int


def plan(
  videos: Paths, annotations: str | os.PathLike, config: PrepareConfig | None = None
) -> Plan:
  """Looks at everything, reads a little, writes nothing. Takes the arguments of `prepare`."""
  config = config or PrepareConfig()
  media = Media(videos, config.follow_links).open()
  items, errors = read_items(pathlib.Path(annotations))
  items = place_items(items, media)
  sizes = [item.medium.num_bytes() if item.medium else 0 for item in items]
  present = [item for item, size in zip(items, sizes) if size is not None]
  kinds = [item.kind for item in items]
  lengths = _lengths([item for item in present if item.kind == "video"])
  num_videos = kinds.count("video")
  tries = _tries(present, config)
  made = [(item, seconds) for item, seconds in tries if item is not None]

  def estimate(total: float) -> float | None:
    return total / len(made) * len(present) if made else None

  frames = estimate(sum(item.frames for item, _ in made))
  num_bytes = estimate(sum(len(item.data) for item, _ in made))
  cpu = estimate(sum(seconds for _, seconds in made))
  return Plan(
    videos=num_videos,
    images=kinds.count("image"),
    texts=kinds.count("text"),
    conversations=sum(len(item.entries) for item in items),
    bad_annotations=len(errors),
    missing=sizes.count(None),
    source_bytes=sum(size or 0 for size in sizes),
    video_hours=sum(lengths) / len(lengths) * num_videos / 3600 if lengths else None,
    frames=None if frames is None else round(frames),
    output_bytes=None if num_bytes is None else round(num_bytes),
    cpu_hours=None if cpu is None else cpu / 3600,
    probed=len(lengths),
    tried=len(tries),
    failed=len(tries) - len(made),
  )


def format_plan(plan: Plan) -> str:
  """The plan as text."""
  lines = [
    f"{plan.videos} videos, {plan.images} images, {plan.texts} texts; {plan.conversations} "
    f"conversations; {plan.source_bytes / 1e9:.3g} GB of media"
  ]
  if plan.missing:
    lines.append(f"{plan.missing} files are missing")
  if plan.bad_annotations:
    lines.append(f"{plan.bad_annotations} annotations are wrong: see `slowfast data validate`")
  if plan.video_hours is not None:
    lines.append(f"about {plan.video_hours:.3g} hours of video (from {plan.probed} videos)")
  if plan.frames is not None and plan.output_bytes is not None and plan.cpu_hours is not None:
    lines.append(
      f"about {plan.frames:,} frames, {plan.output_bytes / 1e9:.3g} GB of records and "
      f"{plan.cpu_hours:.3g} CPU-hours (from {plan.tried - plan.failed} items)"
    )
  if plan.failed:
    lines.append(f"{plan.failed} of {plan.tried} items that were tried cannot be prepared")
  return "\n".join([*lines, "Nothing was written."])


def _spread(items: Sequence[Item], count: int) -> list[Item]:
  # Only the beginning of a tar.gz is near: every other member costs reading all before it.
  if any(item.medium and item.medium.compressed for item in items):
    near = sorted(items, key=lambda item: item.medium.offset if item.medium else 0)
    return near[: min(count, _TRIED)]
  count = min(count, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def _lengths(videos: Sequence[Item]) -> list[float]:
  """Seconds of some videos, as their headers say."""
  lengths = []
  for item in _spread(videos, _PROBED):
    assert item.medium is not None
    try:
      with VideoSource(item.medium.open()).open() as video:
        duration = video.container.duration  # Microseconds.
    except (UserError, OSError):
      continue
    if duration is not None and duration > 0:
      lengths.append(duration / 1e6)
  return lengths


def _tries(items: Sequence[Item], config: PrepareConfig) -> list[tuple[Made | None, float]]:
  """Records of some items, None where one cannot be made, and CPU-seconds."""
  tries: list[tuple[Made | None, float]] = []
  for item in _spread(items, _TRIED):
    began = time.process_time()
    made = None
    with contextlib.suppress(Exception):  # Whatever a broken file may raise: it is only counted.
      made = make(config, item)
    tries.append((made, time.process_time() - began))
  return tries
