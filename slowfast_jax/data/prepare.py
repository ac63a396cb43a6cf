# SPDX-License-Identifier: Apache-2.0
"""Raw videos and their annotations to frame-sampled records.

Decoding a video costs about sixty times what reading its frames as JPEG does, so it is done once,
by all cores, before training. The shards depend on nothing but videos, annotations and settings:
not on the number of workers, nor on how often the run was killed.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import resource
import time
from collections.abc import Callable
from typing import Any

from slowfast_jax.data.media import Media, Paths
from slowfast_jax.data.prepare_config import PrepareConfig, PrepareError
from slowfast_jax.data.prepare_folder import OutputFolder, Shard
from slowfast_jax.data.prepare_items import place_items, read_items
from slowfast_jax.data.prepare_record import Item
from slowfast_jax.data.prepare_shards import MakeShards, make_locally
from slowfast_jax.files import replace_json

# About 500 MB at 32 frames of 384 px: few files, and little to do again after a kill.
_VIDEOS_PER_SHARD = 256

Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
  """What `prepare` did; `report.json` holds the same.

  Attributes:
    records: written, one a video, image or text.
    conversations: in all records.
    frames: in all records.
    lost_frames: wanted, but damaged in their videos.
    num_bytes: of all records.
    shards: files.
    resumed_shards: files that an earlier run had finished.
    errors: videos and annotations that were left out; `errors.jsonl` names them.
    duplicates: media files that hold the same bytes as another (with `dedup`).
    seconds: of this run.
    cpu_seconds: of this run, all workers of this machine together.
    settings: what decided the content.
  """

  records: int
  conversations: int
  frames: int
  lost_frames: int
  num_bytes: int
  shards: int
  resumed_shards: int
  errors: int
  duplicates: int
  seconds: float
  cpu_seconds: float
  settings: dict[str, Any]


def prepare(
  videos: Paths,
  annotations: str | os.PathLike,
  output: str | os.PathLike,
  config: PrepareConfig | None = None,
  progress: Progress | None = None,
  make_shards: MakeShards = make_locally,
) -> Report:
  """Writes a records folder. The same call again resumes; see `slowfast_jax.data.records`.

  Args:
    videos: the folder below which the annotated media lie, a tar or tar.gz archive that holds
      them, or several of either.
    annotations: LLaVA-style JSON or JSONL, see `slowfast_jax.data.annotations`.
    output: the records folder.
    config: how; None = the defaults.
    progress: called with (videos done, videos in all, errors so far) as work goes on.
    make_shards: who does the work: this machine, or `prepare_beam.beam_runner`. Changes no byte.

  Raises:
    UserError: nothing could be prepared, more is broken than `config.on_error` allows, or `output`
      holds something else.
  """
  run = _Run(videos, annotations, config or PrepareConfig(), progress or (lambda *_: None))
  return run(output, make_shards)


class _Run:
  """One call of `prepare`."""

  def __init__(self, videos: Paths, annotations, config: PrepareConfig, progress: Progress):
    self._media = Media(videos, config.follow_links)
    self._annotations, self._config, self._progress = pathlib.Path(annotations), config, progress
    self._items, self._errors = read_items(self._annotations)
    self._total = len(self._items) + len(self._errors)
    self._check_errors()

  def __call__(self, output: str | os.PathLike, make_shards: MakeShards) -> Report:
    started, cpu = time.monotonic(), _cpu_seconds()
    with OutputFolder(output) as folder:
      self._items = place_items(self._items, self._media.open(folder.scratch), self._config.dedup)
      self._num_shards = self._config.shards or math.ceil(len(self._items) / _VIDEOS_PER_SHARD)
      self._num_shards = min(self._num_shards, len(self._items))
      settings = self._settings()
      folder.adopt(settings, self._num_shards)
      try:
        shards, resumed = self._finish(folder, make_shards)
        self._check_nothing_prepared(shards)
      finally:
        folder.write_errors(sorted(self._errors, key=lambda error: error["line"]))
      folder.publish(shards)
      report = Report(
        records=sum(len(shard.conversations) for shard in shards),
        conversations=sum(sum(shard.conversations) for shard in shards),
        frames=sum(shard.frames for shard in shards),
        lost_frames=sum(shard.lost_frames for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        shards=len(shards),
        resumed_shards=resumed,
        errors=len(self._errors),
        duplicates=sum(len(item.duplicates) for item in self._items),
        seconds=round(time.monotonic() - started, 3),
        cpu_seconds=round(_cpu_seconds() - cpu, 3),
        settings=settings,
      )
      file = folder.path / "report.json"
      if resumed < len(shards) or not file.exists():  # Else it tells of the run that did the work.
        replace_json(file, dataclasses.asdict(report))
      folder.clean()
    return report

  def _settings(self) -> dict[str, Any]:
    """All that decides the bytes of the shards."""
    config = dataclasses.asdict(self._config)
    for name in ("workers", "on_error", "timeout", "follow_links"):
      del config[name]
    with self._annotations.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = {"annotations": f"sha256:{digest}", "videos": self._describe_media()}
    return {**named, **config, "shards": self._num_shards}

  def _describe_media(self) -> str:
    return ", ".join(map(str, self._media.roots))

  def _finish(self, folder: OutputFolder, make_shards: MakeShards) -> tuple[list[Shard], int]:
    """Has the shards made that are missing. Returns all, and how many were there before."""
    shards = {i: folder.finished(i) for i in range(self._num_shards)}
    pending = {i: self._items_of(i) for i, shard in shards.items() if shard is None}
    self._done = len(self._items) - sum(map(len, pending.values()))
    for shard in shards.values():
      self._errors += shard.errors if shard else []
    self._check_errors()
    self._progress(self._done, len(self._items), len(self._errors))
    if pending:
      folder.unpublish()
      make_shards(folder, pending, self._config, self._tell)
    finished = [shard for i in shards if (shard := folder.finished(i))]
    if len(finished) < len(shards):
      raise PrepareError(
        f"{folder.path}: {len(finished)} of {len(shards)} shards are here; all that make shards "
        "must see this folder under this path"
      )
    return finished, len(shards) - len(pending)

  def _tell(self, error: dict[str, Any] | None) -> None:
    """Takes note of an item that is done."""
    if error is not None:
      self._errors.append(error)
      self._check_errors()
    self._done += 1
    self._progress(self._done, len(self._items), len(self._errors))

  def _items_of(self, shard: int) -> list[Item]:
    # Dealt out like cards: files sorted by length or kind still give shards alike.
    return self._items[shard :: self._num_shards]

  def _check_errors(self) -> None:
    budget = self._config.error_budget()
    if len(self._errors) <= budget * self._total:
      return
    if budget == 0:
      raise PrepareError(
        f"{self._describe_first()}; --on-error skip goes past such entries and lists them"
      )
    raise PrepareError(
      f"{len(self._errors)} of {self._total} are broken, more than --on-error "
      f"{self._config.on_error} allows; errors.jsonl lists them, the first is "
      f"{self._describe_first()}"
    )

  def _describe_first(self) -> str:
    first = min(self._errors, key=lambda error: error["line"])
    about = "" if first["file"] == self._annotations.name else f"{first['file']}: "
    return f"{self._annotations}:{first['line']}: {about}{first['reason']}"

  def _check_nothing_prepared(self, shards: list[Shard]) -> None:
    if any(shard.conversations for shard in shards):
      return
    raise PrepareError(
      f"none of the {len(self._items)} videos could be prepared from {self._describe_media()}; the "
      f"first: {self._describe_first()}"
    )


def _cpu_seconds() -> float:
  usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)
