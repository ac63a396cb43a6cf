# SPDX-License-Identifier: Apache-2.0
"""Where annotated media lie: below folders, or in tar archives that are read without unpacking.

Annotations come from strangers. What they name is looked up below the folders and among the regular
files of the archives that the user gave, and nowhere else: a link that leads out of a folder counts
as missing, and members of an archive that are links, devices or lie outside of it are not there.
"""

import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import posixpath
import shutil
import tarfile
import zlib
from collections.abc import Sequence

from slowfast_jax.data.prepare_config import PrepareError
from slowfast_jax.errors import UserError

Paths = str | os.PathLike | Sequence[str | os.PathLike]

_TAR, _TAR_GZ = (".tar",), (".tar.gz", ".tgz")
_CHUNK = 2**20
# What a damaged archive makes tarfile and gzip raise.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


@dataclasses.dataclass(frozen=True)
class Medium:
  """One file, or the part of an archive that is one. Small, so that it travels to a worker.

  Attributes:
    name: for messages.
    path: of the file, or of the archive.
    offset: of the first byte; in an archive that is compressed, after decompression.
    size: bytes; None = all of the file.
    compressed: the archive is a tar.gz, of which reading a member reads all before it.
    problem: why there is no such thing; empty where there is.
  """

  name: str
  path: str
  offset: int = 0
  size: int | None = None
  compressed: bool = False
  problem: str = ""

  def open(self) -> str | io.BufferedReader | io.BytesIO:
    """A path, or a seekable binary file that reads this member only.

    Raises:
      UserError: there is no such file.
    """
    if self.problem:
      raise UserError(f"{self.name}: {self.problem}")
    if self.size is None:
      return self.path
    if not self.compressed:
      return io.BufferedReader(_Span(self))
    with gzip.open(self.path) as archive:
      archive.seek(self.offset)
      return io.BytesIO(archive.read(self.size))

  def num_bytes(self) -> int | None:
    """Its size; None where there is no such regular file."""
    if self.problem:
      return None
    if self.size is not None:
      return self.size
    try:
      return os.path.getsize(self.path) if os.path.isfile(self.path) else None
    except OSError:
      return None

  def digest(self) -> str:
    """The SHA-256 of its content."""
    source = self.open()
    with open(source, "rb") if isinstance(source, str) else source as file:
      return hashlib.file_digest(file, "sha256").hexdigest()


class _Span(io.RawIOBase):
  """A part of a file, as a file."""

  def __init__(self, medium: Medium):
    self.name = medium.name
    self._file = open(medium.path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
    self._offset, self._size, self._position = medium.offset, medium.size or 0, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
    if start + offset < 0:
      raise OSError(22, "negative position")
    self._position = start + offset
    return self._position

  def readinto(self, buffer) -> int:
    count = max(min(len(buffer), self._size - self._position), 0)
    self._file.seek(self._offset + self._position)
    read = self._file.readinto(memoryview(buffer)[:count])
    self._position += read or 0
    return read or 0

  def close(self) -> None:
    self._file.close()
    super().close()


class Media:
  """Finds media by their annotated paths.

  Args:
    paths: folders and archives. What is in two of them is in neither: which one is not guessed.
    follow_links: links may lead out of a folder.

  Raises:
    PrepareError: a path is neither a folder nor a tar archive.
  """

  def __init__(self, paths: Paths, follow_links: bool = False):
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    self.roots = [pathlib.Path(path).absolute() for path in paths]
    self._follow_links = follow_links
    self._members: dict[pathlib.Path, dict[str, Medium]] = {}
    for given, root in zip(paths, self.roots):
      if not root.is_dir() and not (root.is_file() and root.name.endswith(_TAR + _TAR_GZ)):
        what = "is neither a folder nor a .tar, .tar.gz or .tgz file"
        problem = what if root.exists() else "there is no such folder or archive"
        raise PrepareError(f"{given}: {problem}; give the videos' folder as --videos")

  def open(self, scratch: pathlib.Path | None = None) -> "Media":
    """Lists the archives.

    Args:
      scratch: folder for the plain tar of each tar.gz, whose members could not be reached
        otherwise; None leaves them as they are, and reading a member slow.

    Raises:
      PrepareError: an archive is damaged or the disk is full.
    """
    for i, root in enumerate(self.roots):
      if root.is_dir() or root in self._members:
        continue
      plain, compressed = root, root.name.endswith(_TAR_GZ)
      if compressed and scratch is not None:
        plain, compressed = _decompress(root, scratch / f"media-{i}.tar"), False
      self._members[root] = _list_members(root, plain, compressed)
    return self

  def find(self, media: str) -> Medium:
    """Where a path leads that `annotations` has checked. Says so in `problem` if nowhere."""
    found = [medium for root in self.roots if (medium := self._find_in(root, media))]
    if len(found) == 1:
      return found[0]
    name = os.fspath(self.roots[0] / media)
    if found:
      places = " and ".join(os.fspath(medium.path) for medium in found)
      return Medium(name, name, problem=f"is in several places: {places}; leave one of them out")
    if len(self.roots) == 1 and self.roots[0].is_dir():
      return Medium(name, name)  # Opening it says what is wrong.
    return Medium(name, name, problem="there is no such file")

  def _find_in(self, root: pathlib.Path, media: str) -> Medium | None:
    if root in self._members:
      return self._members[root].get(media)
    path = os.path.join(root, media)
    try:
      if not os.path.lexists(path):
        return None
      real = os.path.realpath(path)
    except (OSError, ValueError) as error:
      return Medium(path, path, problem=str(error))
    if not self._follow_links and not pathlib.Path(real).is_relative_to(os.path.realpath(root)):
      problem = f"is a link to {real}, outside of the folder; --follow-links allows that"
      return Medium(path, path, problem=problem)
    return Medium(path, path)


def _decompress(archive: pathlib.Path, plain: pathlib.Path) -> pathlib.Path:
  if plain.exists():
    return plain
  partial = plain.with_name(plain.name + ".partial")
  try:
    plain.parent.mkdir(exist_ok=True)
    with gzip.open(archive) as source, partial.open("wb") as target:
      shutil.copyfileobj(source, target, _CHUNK)
  except _DAMAGE as error:
    partial.unlink(missing_ok=True)
    raise _damaged(archive, error) from error
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise PrepareError(
      f"{archive}: cannot be decompressed to {plain} ({error.strerror}); make room there, or "
      "unpack it yourself and give the folder"
    ) from error
  os.replace(partial, plain)
  return plain


def _list_members(root: pathlib.Path, plain: pathlib.Path, compressed: bool) -> dict[str, Medium]:
  """The regular files of an archive by their normalised names; of equal names the last, as tar."""
  members = {}
  try:
    with tarfile.open(plain, "r:gz" if compressed else "r:") as archive:
      for info in archive:
        archive.members = []  # type: ignore[attr-defined]  # Else it keeps them all.
        name = posixpath.normpath(info.name)
        if not info.isreg() or info.issparse() or name.startswith(("/", "../")) or name == "..":
          continue
        place = (os.fspath(plain), info.offset_data, info.size, compressed)
        members[name] = Medium(f"{root}/{name}", *place)
  except _DAMAGE as error:
    raise _damaged(root, error) from error
  if not members:
    raise PrepareError(f"{root}: the archive holds no file")
  return members


def _damaged(archive: pathlib.Path, error: Exception) -> PrepareError:
  return PrepareError(f"{archive}: is no whole archive ({error}); copy or download it again")
