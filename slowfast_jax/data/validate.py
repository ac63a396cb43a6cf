# SPDX-License-Identifier: Apache-2.0
"""What is wrong with annotations, with the files that they name, or with records: all of it, each
with its place, before days of preparing or training find out one by one."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from slowfast_jax.data.annotations import Annotation, AnnotationError, scan_annotations
from slowfast_jax.data.chat import SYSTEM_PROMPT, check_turns, encode_chat
from slowfast_jax.data.media import Media, Medium, Paths
from slowfast_jax.data.records import Record, RecordSource, decode_frames
from slowfast_jax.data.tfds import open_records
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.data.video import read_frames
from slowfast_jax.data.workers import Failure, Workers
from slowfast_jax.errors import UserError

# The first frame, the last and one between: broken and cut files show, at the cost of opening.
_FRAMES = 3

Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that is wrong, and where.

  Attributes:
    place: "FILE:LINE", or "FOLDER: record N (ID)".
    reason: what is wrong.
  """

  place: str
  reason: str

  def __str__(self) -> str:
    return f"{self.place}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Findings:
  """What was looked at, and what is wrong with it, in the order of the files.

  Attributes:
    conversations: how many were found, bad ones included.
    media: files or records that were opened.
    problems: all that is wrong.
  """

  conversations: int
  media: int
  problems: list[Problem]


@dataclasses.dataclass(frozen=True)
class LengthLimit:
  """When a sample is too long for a row.

  Attributes:
    tokenizer: counts.
    max_tokens: decoder positions of a row.
    visual_tokens: positions that a video or image takes.
    system: prompt of conversations that bring none.
  """

  tokenizer: Tokenizer
  max_tokens: int
  visual_tokens: int = 0
  system: str = SYSTEM_PROMPT


def validate_annotations(
  annotations: str | os.PathLike,
  videos: Paths | None = None,
  limit: LengthLimit | None = None,
  workers: int = 1,
  timeout: float = 60.0,
  progress: Progress | None = None,
  follow_links: bool = False,
) -> Findings:
  """Checks every entry, and opens every file that one names.

  Args:
    annotations: JSON or JSONL, see `slowfast_jax.data.annotations`.
    videos: folders or archives; None does not look for the files.
    limit: None counts no tokens.
    workers: processes that open files.
    timeout: seconds that opening one file may take.
    progress: called with (files done, files in all, problems so far).
    follow_links: links may lead out of the folders.

  Raises:
    UserError: the annotations cannot be read on, or `videos` is no place of media.
  """
  entries: list[Annotation] = []
  problems: list[tuple[int, Problem]] = []
  kinds: dict[str, Annotation] = {}

  def add(line: int, reason: str) -> None:
    problems.append((line, Problem(f"{os.fspath(annotations)}:{line}", reason)))

  count = 0
  for item in scan_annotations(annotations):
    count += 1
    if isinstance(item, AnnotationError):
      add(item.line, item.reason)
      continue
    entries.append(item)
    if item.media is not None:
      first = kinds.setdefault(item.media, item)
      if first.kind != item.kind:
        add(item.line, f"{item.media} is {item.kind} here and {first.kind} in line {first.line}")
    for reason in _conversation_problems(item.conversations, item.media is not None, limit):
      add(item.line, reason)
  opened = 0
  if videos is not None:
    media = Media(videos, follow_links).open()
    named = list(kinds.values())
    jobs = [(entry.kind, media.find(entry.media or "")) for entry in named]
    opened = len(jobs)
    with Workers(_check_medium, min(workers, max(opened, 1)), timeout) as pool:
      for i, (entry, found) in enumerate(zip(named, pool.map(jobs)), start=1):
        if isinstance(found, Failure):
          name = jobs[i - 1][1].name
          add(entry.line, f"{entry.media}: {found.reason.removeprefix(f'{name}: ')}")
        if progress:
          progress(i, opened, len(problems))
  problems.sort(key=lambda problem: problem[0])
  return Findings(count, opened, [problem for _, problem in problems])


def validate_records(
  path: str | os.PathLike, limit: LengthLimit | None = None, progress: Progress | None = None
) -> Findings:
  """Reads every record, decodes every frame, and checks every conversation.

  Raises:
    UserError: it is no records folder.
  """
  source = open_records(path)
  problems: list[Problem] = []
  for i in range(len(source)):
    problems += _record_problems(source, i, limit)
    if progress:
      progress(i + 1, len(source), len(problems))
  listed = set(map(tuple, source.index.tolist()))
  if len(listed) < len(source.index):
    problems.append(Problem(f"{source.path}: index.npy", "names a conversation twice"))
  return Findings(len(source.index), len(source), problems)


def _record_problems(source: RecordSource, i: int, limit: LengthLimit | None) -> Iterator[Problem]:
  place = f"{source.path}: record {i}"
  try:
    record = source[i]
    place += f" ({record.id})"
    decode_frames(record)
  except UserError as error:
    yield Problem(place, str(error))
    return
  for reason in _inconsistencies(record):
    yield Problem(place, reason)
  known = source.index[source.index[:, 0] == i, 1]
  if len(known) and known.max() >= len(record.conversations):
    yield Problem(
      place, f"index.npy names conversation {known.max()}, and it has {len(record.conversations)}"
    )
  for number, turns in enumerate(record.conversations):
    for reason in _conversation_problems(turns, bool(record.frames), limit):
      yield Problem(f"{place}, conversation {number}", reason)


def _inconsistencies(record: Record) -> Iterator[str]:
  kind, frames = record.metadata.get("kind"), len(record.frames)
  if kind in ("video", "image") and not frames:
    yield f"a record of kind {kind!r} has no frame"
  if len(record.timestamps) != frames or len(record.frame_indices) != frames:
    yield (
      f"{frames} frames, {len(record.timestamps)} timestamps and {len(record.frame_indices)} "
      "frame_indices; there must be one of each for every frame"
    )
  elif np.any(np.diff(record.timestamps) < 0):
    yield "its frames are not in the order of time"


def _conversation_problems(
  turns: Sequence[dict[str, str]], has_media: bool, limit: LengthLimit | None
) -> Iterator[str]:
  try:
    check_turns(turns, int(has_media))
  except UserError as error:
    yield str(error)
    return
  if not any(turn["from"] == "gpt" and turn["value"].strip() for turn in turns):
    yield "no answer to learn from: every gpt turn is empty"
  if limit is None:
    return
  ids = encode_chat(limit.tokenizer, turns, limit.system).ids
  count = len(ids) + has_media * (limit.visual_tokens - 1)
  if count > limit.max_tokens:
    yield f"{count} tokens, more than {limit.max_tokens}: its end would be cut off"


def _check_medium(job: tuple[str, Medium]) -> None:
  """Runs in a worker; what it raises is the problem."""
  kind, medium = job
  if kind == "image":
    with Image.open(medium.open()) as image:
      image.convert("RGB")
    return
  shrink = functools.partial(np.mean, axis=(0, 1))
  frames = read_frames(medium.open(), _FRAMES, transform=shrink)
  if frames.decode_errors:
    raise UserError(
      f"{frames.decode_errors} of {_FRAMES} frames that were tried are damaged or missing"
    )


def default_workers() -> int:
  return len(os.sched_getaffinity(0))


def is_annotations(path: str | os.PathLike) -> bool:
  return pathlib.Path(path).suffix in (".json", ".jsonl") or pathlib.Path(path).is_file()
