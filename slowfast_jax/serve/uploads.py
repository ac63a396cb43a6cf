# SPDX-License-Identifier: Apache-2.0
"""Files that clients upload and then name by id, in OpenAI's manner."""

import collections
import dataclasses
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from slowfast_jax.serve.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Upload:
  """A file that was uploaded.

  Attributes:
    id: its name here; nobody can guess it.
    filename: its name at the client's; shown, never used.
    num_bytes: its size.
    created: seconds since 1970.
    purpose: what the client said.
  """

  id: str
  filename: str
  num_bytes: int
  created: int
  purpose: str

  @property
  def body(self) -> dict[str, Any]:
    return {
      "id": self.id,
      "object": "file",
      "bytes": self.num_bytes,
      "created_at": self.created,
      "filename": self.filename,
      "purpose": self.purpose,
      "status": "processed",
    }


class Uploads:
  """A temporary folder of files, of which the least recently used go when there are too many.

  Args:
    max_bytes: of all files together.
  """

  def __init__(self, max_bytes: int):
    self._max_bytes = max_bytes
    self._folder = tempfile.TemporaryDirectory(prefix="slowfast-uploads-")
    self._lock = threading.Lock()
    self._files: collections.OrderedDict[str, Upload] = collections.OrderedDict()

  def add(self, content: bytes, filename: str, purpose: str) -> Upload:
    """Keeps a file.

    Raises:
      ApiError: it is larger than all files may be.
    """
    if len(content) > self._max_bytes:
      raise ApiError(413, "The file is larger than the room for uploads.", "too_large")
    upload = Upload(
      f"file-{secrets.token_hex(12)}", filename[:200], len(content), int(time.time()), purpose[:64]
    )
    with self._lock:
      while self._files and self._total() + len(content) > self._max_bytes:
        self._remove(next(iter(self._files)))
      self._path(upload.id).write_bytes(content)
      self._files[upload.id] = upload
    return upload

  def get(self, file_id: str) -> Upload:
    """
    Raises:
      ApiError: there is none of this id.
    """
    with self._lock:
      return self._get(file_id)

  def content(self, file_id: str) -> bytes:
    """What is in the file; errors as of `get`."""
    with self._lock:
      self._get(file_id)
      self._files.move_to_end(file_id)
      return self._path(file_id).read_bytes()

  def delete(self, file_id: str) -> None:
    """Removes a file; errors as of `get`."""
    with self._lock:
      self._get(file_id)
      self._remove(file_id)

  def all(self) -> list[Upload]:
    with self._lock:
      return list(self._files.values())

  def close(self) -> None:
    self._folder.cleanup()

  def _get(self, file_id: str) -> Upload:
    # Looked up, never made into a path: an id from outside could be one that leads elsewhere.
    if file_id not in self._files:
      raise ApiError(
        404,
        f"There is no file {file_id[:80]!r}; upload it to /v1/files (again: old ones make room).",
        "file_not_found",
      )
    return self._files[file_id]

  def _total(self) -> int:
    return sum(file.num_bytes for file in self._files.values())

  def _remove(self, file_id: str) -> None:
    del self._files[file_id]
    self._path(file_id).unlink(missing_ok=True)

  def _path(self, file_id: str) -> Path:
    return Path(self._folder.name) / file_id
