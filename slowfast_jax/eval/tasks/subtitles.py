# SPDX-License-Identifier: Apache-2.0
"""VideoMME's subtitles as its evaluation tool puts them into the prompt, oddities included."""

import re
from pathlib import Path

import av
import numpy as np

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks.media import find_video

# Moments whose subtitles are shown, however many frames the model sees.
MOMENTS = 32
# A block without this markup is dropped.
_SHOWN = re.compile(r'<font color="white" size=".72c">(.*?)</font>')


def subtitle_text(subtitles: Path, video: Path) -> str | None:
  """The subtitles of evenly spaced frames, a line each; None where the video has no subtitles.

  Args:
    subtitles: an SRT file; need not be there.
    video: the file that they belong to. If it cannot be opened its question cannot be asked
      either, so that there the text does not matter.

  Raises:
    UserError: the file is no SRT.
  """
  if not subtitles.is_file():
    return None
  blocks = _read_srt(subtitles)
  try:
    total, rate = _frames_and_rate(find_video(video))
  except (av.FFmpegError, OSError, IndexError, ValueError):
    return None
  spans = [(int(start * rate), int(end * rate)) for start, end in blocks]
  frames = np.linspace(0, total - 1, MOMENTS, dtype=int).tolist()
  kept = [i for f in frames for i, (start, end) in enumerate(spans) if start <= f < end]
  texts = list(blocks.values())
  # The tool's order is that of a Python set, which is not always sorted.
  shown = [_SHOWN.findall(texts[i]) for i in list(set(kept))]
  return "\n".join(found[0] for found in shown if found)


def _read_srt(path: Path) -> dict[tuple[float, float], str]:
  """Text by (start, end) in seconds; of equal times the last."""
  blocks = {}
  for block in path.read_text(encoding="utf-8").split("\n\n"):
    lines = block.split("\n")
    if not block.strip() or len(lines) < 3:
      continue
    try:
      start, end = lines[1].split(" --> ")
      blocks[_seconds(start), _seconds(end)] = " ".join(lines[2:])
    except ValueError as error:
      raise UserError(f"{path}: expected START --> END, got {lines[1]!r}.") from error
  return blocks


def _seconds(time: str) -> float:
  hours, minutes, rest = time.split(":")
  seconds, milliseconds = rest.split(",")
  return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(milliseconds) / 1000


def _frames_and_rate(video: Path) -> tuple[int, float]:
  """As the header says; without a count, from the duration."""
  with av.open(str(video)) as container:
    stream = container.streams.video[0]
    if not stream.average_rate:
      raise ValueError("no frame rate")
    rate = float(stream.average_rate)
    total = stream.frames or round((container.duration or 0) / av.time_base * rate)
  return max(total, 1), rate
