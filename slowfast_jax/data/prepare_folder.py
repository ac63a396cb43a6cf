# SPDX-License-Identifier: Apache-2.0
"""The output folder of `slowfast prepare`: shards appear whole or not at all, and work resumes.

Beside the shards lies `.prepare/`: the settings that the folder was started with, and for each
finished shard its texts and one small file with what it holds. A shard counts as finished when
these are there and the shard has the size named, so a run that is killed anywhere loses one shard
at most.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from array_record.python import array_record_module

from slowfast_jax.data import records
from slowfast_jax.data.prepare_config import PrepareError
from slowfast_jax.data.prepare_record import Made
from slowfast_jax.files import replace_json, replace_text

# How the command line calls the fields that it does not call by their name.
_FLAGS = {"num_frames": "--frames"}


@dataclasses.dataclass(frozen=True)
class Shard:
  """What a finished shard holds.

  Attributes:
    conversations: how many each record has.
    frames: in all records.
    lost_frames: wanted, but damaged in their videos.
    num_bytes: of all serialised records.
    file_bytes: size of the file.
    errors: of the videos that should have been in it; see `errors.jsonl`.
  """

  conversations: list[int]
  frames: int
  lost_frames: int
  num_bytes: int
  file_bytes: int
  errors: list[dict[str, Any]]


class OutputFolder:
  """The folder, locked against a second run while used as a context manager.

  Args:
    path: is made if it is not there.
    num_shards: of a folder that another process has locked and adopted.

  Raises:
    PrepareError: the folder holds something else, or is in use.
  """

  def __init__(self, path: str | os.PathLike, num_shards: int = 0):
    if "://" in os.fspath(path):
      raise PrepareError(f"{path}: shards are written to a local folder; upload it when it is done")
    self.path = pathlib.Path(path)
    self.num_shards = num_shards
    self._state = self.path / ".prepare"
    self.scratch = self._state / "scratch"

  def __enter__(self) -> "OutputFolder":
    if self.path.exists() and not self.path.is_dir():
      raise PrepareError(f"{self.path}: is a file; give a folder as --output")
    if self.path.exists() and not self._state.exists() and any(self.path.iterdir()):
      raise PrepareError(
        f"{self.path}: holds files that `slowfast prepare` did not write; give another --output"
      )
    self._state.mkdir(parents=True, exist_ok=True)
    self._lock = (self._state / "lock").open("w")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.close()
      raise PrepareError(
        f"{self.path}: another `slowfast prepare` is writing here; wait for it or end it"
      ) from None
    for file in self._state.glob("*.tmp"):  # Of a run that was killed.
      file.unlink()
    return self

  def __exit__(self, *_) -> None:
    self._lock.close()

  def adopt(self, settings: Mapping[str, Any], num_shards: int) -> None:
    """Says what this run makes, before it makes anything.

    Args:
      settings: all that decides the content of the shards.
      num_shards: how many there will be.

    Raises:
      PrepareError: the folder holds records of other settings.
    """
    self.num_shards = num_shards
    file = self._state / "settings.json"
    settings = json.loads(json.dumps(settings))
    if file.exists():
      before = json.loads(file.read_text())
      changed = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
      if not changed:
        return
      if self._has_records():
        raise PrepareError(self._describe_change(changed[0], before, settings))
      self._forget()  # Nothing worth keeping, as after a wrong --videos.
    replace_json(file, settings)

  def _describe_change(self, name: str, before: Mapping, now: Mapping) -> str:
    flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
    return (
      f"{self.path}: was started with {name} = {before.get(name)!r}, this run has "
      f"{now.get(name)!r} ({flag}); give the same again, or another --output"
    )

  def _has_records(self) -> bool:
    states = self._state.glob("shard-*.json")
    return any(json.loads(state.read_text())["conversations"] for state in states)

  def _forget(self) -> None:
    for file in [*self.path.glob(records.SHARD_PREFIX + "*"), *self._state.glob("*.json*")]:
      file.unlink()

  def finished(self, shard: int) -> Shard | None:
    """What the shard holds, or None where it is missing, cut off or was never finished."""
    try:
      found = Shard(**json.loads(self._state_file(shard).read_text()))
      size = self._shard_file(shard).stat().st_size
      self._texts_file(shard).stat()
    except FileNotFoundError:
      return None
    return found if size == found.file_bytes else None

  def begin(self, shard: int) -> "ShardWriter":
    return ShardWriter(self._shard_file(shard), self._texts_file(shard), self._state_file(shard))

  def publish(self, shards: list[Shard]) -> None:
    """Makes the finished shards a records folder, if they are not one yet."""
    if records.is_records_folder(self.path):
      return
    counts = [count for shard in shards for count in shard.conversations]
    index = [(record, i) for record, count in enumerate(counts) for i in range(count)]
    lengths = [len(shard.conversations) for shard in shards]
    with tempfile.TemporaryDirectory(dir=self._state) as beside:
      pathlib.Path(beside, records.shard_name(0, self.num_shards)).touch()  # TFDS looks for shards.
      records.write_dataset_info(beside, lengths, sum(shard.num_bytes for shard in shards), index)
      with pathlib.Path(beside, records.TEXTS_FILE).open("wb") as texts:
        for shard in range(self.num_shards):
          with self._texts_file(shard).open("rb") as part:
            shutil.copyfileobj(part, texts)
      names = (records.INDEX_FILE, records.TEXTS_FILE, records.FEATURES_FILE, records.INFO_FILE)
      # The description comes last: its presence means that the folder is complete.
      for name in names:
        os.replace(os.path.join(beside, name), self.path / name)

  def clean(self) -> None:
    """Removes what only the work needed."""
    shutil.rmtree(self.scratch, ignore_errors=True)

  def unpublish(self) -> None:
    """Until `publish`, readers are told that the folder is not complete."""
    (self.path / records.INFO_FILE).unlink(missing_ok=True)

  def write_errors(self, errors: list[dict[str, Any]]) -> None:
    lines = [json.dumps(error, ensure_ascii=False) + "\n" for error in errors]
    replace_text(self.path / "errors.jsonl", "".join(lines))

  def _shard_file(self, shard: int) -> pathlib.Path:
    return self.path / records.shard_name(shard, self.num_shards)

  def _texts_file(self, shard: int) -> pathlib.Path:
    return self._state / f"texts-{shard:05d}.jsonl"

  def items_file(self, shard: int) -> pathlib.Path:
    """Where the items of a shard lie while other machines make it."""
    return self.scratch / f"items-{shard:05d}.pickle"

  def _state_file(self, shard: int) -> pathlib.Path:
    return self._state / f"shard-{shard:05d}.json"


class ShardWriter:
  """Writes one shard beside its place, and moves it there when the `with` block has ended well."""

  def __init__(self, file: pathlib.Path, texts_file: pathlib.Path, state_file: pathlib.Path):
    self._file, self._texts_file, self._state_file = file, texts_file, state_file
    # Not one name for all: a machine that was taken for dead may still write the same shard.
    unique = f"{state_file.stem}-{uuid.uuid4().hex[:8]}"
    self._temporary = state_file.with_name(f"{unique}.tmp")
    self._temporary_texts = state_file.with_name(f"{unique}.texts.tmp")
    self._conversations: list[int] = []
    self._frames = self._lost_frames = self._bytes = 0
    self.errors: list[dict[str, Any]] = []

  def __enter__(self) -> "ShardWriter":
    self._state_file.unlink(missing_ok=True)
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._temporary), records.WRITER_OPTIONS
    )
    self._texts = self._temporary_texts.open("w", encoding="utf-8")
    return self

  def write(self, made: Made, conversations: int) -> None:
    try:
      self._writer.write(made.data)
      self._texts.write(made.text)
    except (RuntimeError, OSError) as error:
      raise self._unwritable(error) from error
    self._conversations.append(conversations)
    self._frames += made.frames
    self._lost_frames += made.lost_frames
    self._bytes += len(made.data)

  def __exit__(self, exception_type, *_) -> None:
    try:
      self._writer.close()
      self._texts.close()
    except (RuntimeError, OSError) as error:
      self._discard()
      if exception_type is None:
        raise self._unwritable(error) from error
    if exception_type is not None:
      self._discard()
      return
    size = self._temporary.stat().st_size
    os.replace(self._temporary_texts, self._texts_file)
    os.replace(self._temporary, self._file)
    counts = (self._frames, self._lost_frames, self._bytes, size)
    shard = Shard(self._conversations, *counts, self.errors)
    replace_json(self._state_file, dataclasses.asdict(shard))

  def _discard(self) -> None:
    self._temporary.unlink(missing_ok=True)
    self._temporary_texts.unlink(missing_ok=True)

  def _unwritable(self, error: Exception) -> PrepareError:
    free = shutil.disk_usage(self._file.parent).free / 2**20
    return PrepareError(
      f"{self._file}: cannot be written, {free:.0f} MiB are free on its disk; make room and run "
      f"the same command again ({error})"
    )
