# SPDX-License-Identifier: Apache-2.0
"""Where a release keeps a video, and videos that it keeps as folders of pictures."""

from pathlib import Path

# Archives mix containers, and the questions do not say which.
_SUFFIXES = (".MP4", ".mkv", ".webm")


def find_video(path: Path) -> Path:
  """The file of this name, or else of this name with another video suffix."""
  if path.exists():
    return path
  others = (path.with_name(path.stem + suffix) for suffix in _SUFFIXES)
  return next((other for other in others if other.exists()), path)
