# SPDX-License-Identifier: Apache-2.0
"""From what a message points at to frames: data URLs, uploaded files, files of allowed folders.

Addresses on the network are never fetched: the server would do it with its own rights.
"""

import base64
import binascii
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import stat
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from slowfast_jax.serve.decode import DecodedMedia
from slowfast_jax.serve.errors import ApiError, bad_request
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.sniff import FileType, Kind, check_label, sniff
from slowfast_jax.serve.uploads import Uploads

_DATA_URL = re.compile(r"data:([^,]{0,200}?)(;base64)?,", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Medium:
  """An image or video of a request.

  Attributes:
    key: tells its content and kind.
    frames: as the model takes them.
  """

  key: str
  frames: DecodedMedia


class MediaReader:
  """Finds, checks and decodes the media of requests; equal content is decoded once.

  Args:
    decode: content and kind to frames.
    limits: of a file.
    uploads: files that clients have sent.
    folders: files in these may be named by their path.
    cache_bytes: of frames that are kept.
  """

  def __init__(
    self,
    decode: Callable[[bytes, Kind], DecodedMedia],
    limits: Limits,
    uploads: Uploads,
    folders: Sequence[Path] = (),
    cache_bytes: int = 2**29,
  ):
    self._limits, self._uploads = limits, uploads
    self._folders = [Path(folder).resolve() for folder in folders]
    self._cache = FramesCache(decode, cache_bytes)

  def from_url(self, url: str, wanted: Kind | None) -> Medium:
    """Reads what a part of a message points at; `wanted` is what it must be, if that is known.

    Raises:
      ApiError: it is not there, not allowed, or not what it should be.
    """
    if url[:5].lower() == "data:":
      content, label = self._data_url(url)
    elif re.match(r"(?!file:)[a-z][a-z0-9+.-]+:", url, re.IGNORECASE):
      raise bad_request(
        f"Addresses are not fetched, got {url[:60]!r}; send the content as a data URL, or upload "
        "it to /v1/files and name its file_id.",
        code="remote_url",
      )
    else:
      content, label = self._local_file(url), ""
    return self.from_content(content, label, wanted)

  def from_upload(self, file_id: str) -> Medium:
    """Reads an uploaded file.

    Raises:
      ApiError: there is none of this id.
    """
    return self.from_content(self._uploads.content(file_id), "", None)

  def forget_upload(self, file_id: str) -> list[str]:
    """Deletes an uploaded file and its frames; returns the keys that its medium may have.

    Raises:
      ApiError: there is none of this id.
    """
    content = self._uploads.content(file_id)
    self._uploads.delete(file_id)
    return self._cache.forget(content)

  def from_content(self, content: bytes, label: str, wanted: Kind | None) -> Medium:
    """Checks what the content is against its label and the part that it came in; decodes it."""
    if len(content) > self._limits.body_bytes:
      raise too_many_bytes(self._limits)
    found = sniff(content)
    check_label(label, found)
    self._check_kind(found, wanted)
    return self._cache.get(content, found.kind)

  def _check_kind(self, found: FileType, wanted: Kind | None) -> None:
    # GIF is both.
    if wanted in (None, found.kind) or found.mime == "image/gif":
      return
    raise ApiError(
      415,
      f"Expected {wanted} content, got {found.mime}; send it as {found.kind}_url.",
      "mislabelled_media",
    )

  def _data_url(self, url: str) -> tuple[bytes, str]:
    match = _DATA_URL.match(url)
    if not match or not match[2]:
      raise bad_request("Expected a data URL as in data:video/mp4;base64,AAAA.", code="bad_url")
    try:
      return base64.b64decode(url[match.end() :], validate=True), match[1]
    except (binascii.Error, ValueError) as error:
      raise bad_request(f"The data URL is not base64: {error}.", code="bad_url") from error

  def _local_file(self, url: str) -> bytes:
    """The content of a file that lies, all links followed, in an allowed folder."""
    if not self._folders:
      raise ApiError(
        403,
        "This server reads no local files; send the content as a data URL, or upload it.",
        "path_not_allowed",
      )
    path = urllib.parse.unquote(url[7:]) if url[:7].lower() == "file://" else url
    try:
      # The same words whether it exists or not: nobody shall probe the disk.
      real = Path(path).resolve()
      if not path.startswith("/") or not any(real.is_relative_to(f) for f in self._folders):
        raise ApiError(
          403, f"{path[:200]!r} is not in a folder that this server may read.", "path_not_allowed"
        )
      return self._read(real)
    except (OSError, ValueError, RuntimeError) as error:  # A null byte; a loop of links.
      raise ApiError(404, f"{path[:200]!r}: there is no such file.", "file_not_found") from error

  def _read(self, real: Path) -> bytes:
    # Not blocking: a pipe would hold the thread. No link: it was resolved, so it is a new one.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(real, flags), "rb") as file:
      about = os.fstat(file.fileno())
      if not stat.S_ISREG(about.st_mode):
        raise ApiError(403, f"{str(real)!r} is not a regular file.", "path_not_allowed")
      if about.st_size > self._limits.body_bytes:
        raise too_many_bytes(self._limits)
      return file.read(self._limits.body_bytes + 1)


def too_many_bytes(limits: Limits) -> ApiError:
  """The refusal of what is larger than a request may be."""
  return ApiError(
    413,
    f"It is larger than the {limits.body_mb:g} MB that this server takes; send a smaller one.",
    "too_large",
  )


class FramesCache:
  """Frames by content, of which the least recently used go first; equal work is done once."""

  def __init__(self, decode: Callable[[bytes, Kind], DecodedMedia], max_bytes: int):
    self._decode, self._max_bytes = decode, max_bytes
    self._lock = threading.Lock()
    self._frames: collections.OrderedDict[str, Medium] = collections.OrderedDict()
    self._pending: dict[str, concurrent.futures.Future[Medium]] = {}
    self._bytes = 0

  def get(self, content: bytes, kind: Kind) -> Medium:
    """The decoded content. Waits, where another thread is decoding the same.

    Raises:
      ApiError: it cannot be decoded.
    """
    key = _key(content, kind)
    with self._lock:
      if key in self._frames:
        self._frames.move_to_end(key)
        return self._frames[key]
      future = self._pending.get(key)
      mine = future is None
      if future is None:
        future = self._pending[key] = concurrent.futures.Future()
    if mine:
      self._fill(key, content, kind, future)
    return future.result()

  def forget(self, content: bytes) -> list[str]:
    """Drops what was made of this content; returns the keys that it may have had."""
    keys = [_key(content, kind) for kind in get_args(Kind)]
    with self._lock:
      for key in keys:
        if (medium := self._frames.pop(key, None)) is not None:
          self._bytes -= medium.frames.images.nbytes
    return keys

  def _fill(
    self, key: str, content: bytes, kind: Kind, future: "concurrent.futures.Future[Medium]"
  ) -> None:
    try:
      medium = Medium(key, self._decode(content, kind))
    except BaseException as error:
      with self._lock:
        del self._pending[key]
      future.set_exception(error)
      return
    with self._lock:
      del self._pending[key]
      self._frames[key] = medium
      self._bytes += medium.frames.images.nbytes
      while self._bytes > self._max_bytes and len(self._frames) > 1:
        _, old = self._frames.popitem(last=False)
        self._bytes -= old.frames.images.nbytes
    future.set_result(medium)


def _key(content: bytes, kind: Kind) -> str:
  return f"{kind}-{hashlib.sha256(content).hexdigest()}"
