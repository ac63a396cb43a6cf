# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run, through Orbax: its training state, and the export that others open.

`Checkpoints` holds the newest training states of a run. An export is a folder with all that
evaluation and chat need: config.json, the tokenizer's files and the parameters (see `parts.py`);
one that was converted also has `huggingface/`, with what its first folder had besides.
"""

import dataclasses
import json
import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from slowfast_jax.checkpoints.export import Export, HubFiles, VideoConfig
from slowfast_jax.checkpoints.folders import replaced
from slowfast_jax.checkpoints.hub_files import TOKENIZER_FILES, read_hub_files, write_hub_files
from slowfast_jax.checkpoints.parts import PartsReader, PartsWriter
from slowfast_jax.checkpoints.source import Source, check_dtype, place, source_of
from slowfast_jax.checkpoints.trees import (
  first_line,
  flatten,
  read_arrays,
  unflatten,
  with_shardings,
)
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import SlowFastConfig, abstract_params

__all__ = [
  "Checkpoints",
  "Export",
  "Restored",
  "VideoConfig",
  "flatten",
  "load_export",
  "open_export",
  "save_export",
  "unflatten",
  "with_shardings",
  "write_export",
]

T = TypeVar("T")

FORMAT, FORMAT_VERSION = "slowfast_jax", 2
CONFIG_FILE, PARAMS_FOLDER, HUB_FOLDER = "config.json", "params", "huggingface"


# --- The running state ---


@dataclasses.dataclass(frozen=True)
class Restored:
  """A training state that was read back.

  Attributes:
    step: steps that it has done.
    state: the state, in the structure and on the devices that were asked for.
    run: what the run said about itself when it saved.
  """

  step: int
  state: Any
  run: dict[str, Any]


class _NewestAndBest:
  """Orbax asks it which checkpoints stay."""

  def __init__(self, keep: int, scores: Mapping[int, float]):
    self._keep, self._scores = keep, scores

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*sorted(steps)[-self._keep :], best_of(self._scores, steps)}
    return [step in kept for step in steps]


def best_of(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
  """The step with the highest score, the latest of several; None: none has one."""
  rated = [step for step in steps if step in scores]
  return max(rated, key=lambda step: (scores[step], step), default=None)


class Checkpoints:
  """The newest training states of a run, and its best: DIR/STEP/, written in the background.

  A folder appears under its name only when it is complete, so a killed run leaves none that is
  torn. One that was torn later (by a copy that broke off) is moved aside with a warning, once an
  older one could be read.
  """

  def __init__(
    self, folder: str | os.PathLike, keep: int | None, scores: Mapping[int, float] | None = None
  ):
    """
    Args:
      folder: of the checkpoints.
      keep: so many of the newest stay; None: nothing in the folder is changed, whoever writes it.
      scores: of steps; the checkpoint with the highest stays too. May grow while the run goes on.
    """
    if keep is not None and keep < 1:
      raise UserError(f"train.keep must be at least 1, got {keep}.")
    self._folder = epath.Path(folder).absolute()
    if keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    else:
      options = ocp.CheckpointManagerOptions(
        preservation_policy=_NewestAndBest(keep, {} if scores is None else scores),
        cleanup_tmp_directories=True,
      )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
    """Copies the state off the devices and returns; the files are written meanwhile.

    Args:
      step: steps that the state has done.
      state: any tree of arrays; may be donated once this returns.
      run: JSON values that come back as `Restored.run`.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(flatten(state)), run=ocp.args.JsonSave(dict(run))
    )
    self._manager.save(step, args=args)

  def all_steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def restore(
    self, abstract: Any, check: Callable[[dict[str, Any]], None], only: int | None = None
  ) -> Restored | None:
    """The newest state that can be read, or None if there is no checkpoint.

    Args:
      abstract: shapes, dtypes and shardings, see `with_shardings`.
      check: is given `run` before anything large is read; raises what should stop the restoring.
      only: the step of the one that is read; None: the newest that can be.

    Raises:
      UserError: the newest state is whole, but that of another model; or all that were tried are
        torn, and stay where they are.
      Exception: a state could not be reached, which says nothing against it.
    """
    torn: dict[int, Exception] = {}
    for step in reversed(self.all_steps() if only is None else [only]):
      try:
        restored = self._read(step, abstract, check)
      except Exception as error:
        if not _is_damage(error):
          raise
        torn[step] = error
        continue
      for newer, reason in torn.items():
        self._move_aside(newer, reason)
      return restored
    if torn:
      raise UserError(self._none_of(torn))
    return None

  def _read(self, step: int, abstract: Any, check: Callable[[dict[str, Any]], None]) -> Restored:
    parts = ocp.args.Composite(run=ocp.args.JsonRestore())
    run = self._manager.restore(step, args=parts)["run"]
    check(run)
    leaves = read_arrays(self._folder / str(step) / "state", flatten(abstract))
    return Restored(step, unflatten(abstract, leaves), run)

  def _none_of(self, torn: Mapping[int, Exception]) -> str:
    step, error = next(iter(torn.items()))
    others = ", ".join(str(step) for step in self.all_steps() if step not in torn)
    return f"{self._folder / str(step)}: it cannot be read: {first_line(error)}; " + (
      f"there is also {others}."
      if others
      else "there is no other checkpoint that can be read. Copy the folder here again, or begin "
      "anew in another --workdir."
    )

  def wait(self) -> None:
    """Until everything that was saved is written."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()

  def _move_aside(self, step: int, error: Exception) -> None:
    """Without its number the folder is no checkpoint, and the step can be saved again."""
    torn = self._folder / str(step)
    aside = self._folder / f"torn-{step}"
    logging.warning("%s: torn, so it is moved to %s: %s", torn, aside.name, first_line(error))
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      torn.rename(aside)
    self._manager.reload()


# What TensorStore begins with where it says that a file could not be reached.
_NOT_REACHED = (
  "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
  "UNAUTHENTICATED", "UNAVAILABLE", "UNKNOWN",
)  # fmt: skip


def _is_damage(error: Exception) -> bool:
  """Whether files are missing or cut off; Orbax raises a bare Exception for most of that."""
  if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
    return False  # Not the folder's fault.
  if isinstance(error, OSError):
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
  return not str(error.__cause__ or error).startswith(_NOT_REACHED)


# --- The export ---


def save_export(folder: str | os.PathLike, export: Export) -> None:
  """Writes the folder, or replaces it; under its name it is complete at any time."""
  write_export(folder, source_of(export))


def write_export(
  folder: str | os.PathLike,
  source: Source,
  dtype: str | None = None,
  tell: Callable[[int], None] = lambda count: None,
) -> None:
  """Writes an export, or replaces one, a piece at a time.

  Args:
    folder: where to.
    source: the model.
    dtype: of the parameters; None: as they are.
    tell: is given the bytes of every piece, once it is read.
  """
  wanted = check_dtype(dtype)
  with replaced(folder) as new:
    if jax.process_index() == 0:
      text = json.dumps(_config_json(source.export), indent=2)
      new.joinpath(CONFIG_FILE).write_text(text + "\n")
      if source.export.tokenizer is not None:
        _save_tokenizer(source.export.tokenizer, new)
      if source.export.hub is not None:
        write_hub_files(new / HUB_FOLDER, source.export.hub)
    writer = PartsWriter(new / PARAMS_FOLDER)
    for piece in source.pieces(None):
      tell(piece.array.nbytes)
      array = piece.array if wanted is None else piece.array.astype(wanted)
      writer.add(dataclasses.replace(piece, array=array))
    writer.close()


def load_export(
  folder: str | os.PathLike, mesh: Mesh | None = None, dtype: str | None = None
) -> Export:
  """Opens an export.

  Args:
    folder: what `save_export` wrote, or the folder of a run that has it as `export`.
    mesh: where the parameters go; None: the first device.
    dtype: of the parameters; None: as they are stored.

  Raises:
    UserError: the folder is none, or a part of it is missing or damaged.
  """
  return place(open_export(folder), mesh, dtype)


def open_export(folder: str | os.PathLike) -> Source:
  """An export whose parameters are not read yet; arguments and errors as of `load_export`."""
  source = epath.Path(folder).absolute()
  if not (source / CONFIG_FILE).exists() and (source / "export" / CONFIG_FILE).exists():
    source = source / "export"
  export = _parse_config(_read_config(source), source / CONFIG_FILE)
  export = dataclasses.replace(export, tokenizer=_load_tokenizer(source))
  if export.hub is not None:
    hub = read_hub_files(source / HUB_FOLDER, head_copy=export.hub.head_copy)
    export = dataclasses.replace(export, hub=hub)
  reader = PartsReader(source / PARAMS_FOLDER, flatten(abstract_params(export.model)))
  return Source(export, reader.dtypes, reader.pieces, reader.num_bytes)


def _config_json(export: Export) -> dict[str, Any]:
  return {
    "format": FORMAT,
    "version": FORMAT_VERSION,
    "model": dataclasses.asdict(export.model),
    "video": dataclasses.asdict(export.video),
    "system": export.system,
    "max_length": export.max_length,
    "stop_ids": export.stop_ids,
    "huggingface": None if export.hub is None else {"head_copy": export.hub.head_copy},
  }


def _read_config(folder: epath.Path) -> dict[str, Any]:
  file = folder / CONFIG_FILE
  if not folder.is_dir():
    raise UserError(f"{folder}: there is no such folder; give an export or a Hugging Face folder.")
  if not file.exists():
    raise UserError(
      f"{folder}: not an export, it has no {CONFIG_FILE}; give the --workdir of a `slowfast train` "
      "that has finished, or a Hugging Face folder."
    )
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file}: not readable as JSON: {error}") from error
  config = config if isinstance(config, dict) else {}
  found = config.get("format"), config.get("version")
  if found[0] != FORMAT or found[1] not in range(1, FORMAT_VERSION + 1):
    raise UserError(
      f'{file}: expected "format": "{FORMAT}" and "version": 1 to {FORMAT_VERSION}, got {found}; '
      "it is no export, or a newer version of slowfast_jax wrote it."
    )
  return config


def _parse_config(config: dict[str, Any], file: epath.Path) -> Export:
  """The export without tokenizer, parameters and the files of its hub."""
  try:
    hub = config.get("huggingface")  # Like the two below, new in version 2.
    return Export(
      model=_from_dict(SlowFastConfig, config["model"]),
      params=nnx.State({}),
      tokenizer=None,
      video=_from_dict(VideoConfig, config["video"]),
      system=config["system"],
      max_length=config.get("max_length"),
      stop_ids=tuple(config.get("stop_ids", ())),
      hub=None if hub is None else HubFiles({}, head_copy=bool(hub["head_copy"])),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{file}: not the config of an export: {error}.") from error


def _from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
  """A dataclass from the nested dictionary that `dataclasses.asdict` makes of it."""
  hints = typing.get_type_hints(kind)
  unknown = sorted(set(values) - set(hints))
  if unknown:
    raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
  made = {}
  for name, value in values.items():
    nested = None if value is None else _dataclass_of(hints[name], value)
    made[name] = value if nested is None else _from_dict(nested, value)
  return kind(**made)


def _dataclass_of(hint: Any, values: Mapping[str, Any]) -> type | None:
  """The dataclass that a field holds; of several, the one whose `family` may be the values'."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  kinds = [kind for kind in options if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
  if len(kinds) < 2:
    return kinds[0] if kinds else None
  families = {
    family: kind
    for kind in kinds
    for family in typing.get_args(typing.get_type_hints(kind)["family"])
  }
  if values.get("family") not in families:
    raise ValueError(f"family must be one of {tuple(families)}, got {values.get('family')!r}")
  return families[values["family"]]


def _save_tokenizer(tokenizer: Tokenizer, folder: epath.Path) -> None:
  """By way of a local folder: the export may go to a bucket."""
  with tempfile.TemporaryDirectory() as local:
    tokenizer.save(local)
    for file in epath.Path(local).iterdir():
      file.copy(folder / file.name)


def _load_tokenizer(folder: epath.Path) -> Tokenizer | None:
  if not any((folder / name).exists() for name in TOKENIZER_FILES):
    return None
  with tempfile.TemporaryDirectory() as local:
    for file in folder.glob("*.json"):
      file.copy(epath.Path(local) / file.name)
    try:
      return Tokenizer.from_dir(local)
    except UserError as error:
      raise UserError(str(error).replace(local, str(folder))) from None
