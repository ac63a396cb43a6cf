# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run, through Orbax: its training state, and the export that others open.

`Checkpoints` holds the newest training states of a run. An export is a folder with all that
evaluation and chat need: config.json, the tokenizer's files and the parameters.

Arrays are stored by their dotted path ("decoder.layers.mlp.up.kernel") and are read straight onto
their devices, whatever number of devices wrote them.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import SlowFast, SlowFastConfig
from slowfast_jax.sharding import make_mesh, state_shardings

T = TypeVar("T")

FORMAT, FORMAT_VERSION = "slowfast_jax", 1
CONFIG_FILE, PARAMS_FOLDER = "config.json", "params"


# --- Trees as flat dictionaries ---


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves of a state by their dotted paths."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_dotted(path): leaf for path, leaf in leaves}


def unflatten(like: T, leaves: Mapping[str, Any]) -> T:
  """The inverse of `flatten`, for a tree of the structure of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flatten(like)])


def abstract_state(init: Callable[..., T], mesh: Mesh, *args: Any) -> T:
  """Shapes, dtypes and places on the mesh of what `init(*args)` returns; nothing is computed."""
  shapes = jax.eval_shape(init, *args)
  shardings = state_shardings(shapes, mesh)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def _dotted(path: tuple) -> str:
  keys = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
  # The step into an nnx.Variable says nothing.
  return ".".join(keys[:-1] if len(keys) > 1 and keys[-1] == "value" else keys)


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


class Checkpoints:
  """The newest training states of a run: DIR/STEP/, written in the background.

  A folder appears under its name only when it is complete, so a killed run leaves none that is
  torn. One that was torn later (by a copy that broke off) is moved aside with a warning.
  """

  def __init__(self, folder: str | os.PathLike, keep: int):
    if keep < 1:
      raise UserError(f"train.keep must be at least 1, got {keep}.")
    self._folder = epath.Path(folder).absolute()
    self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self._folder, options=self._options)

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

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def restore(self, abstract: Any, check: Callable[[dict[str, Any]], None]) -> Restored | None:
    """The newest state that can be read, or None if there is none.

    Args:
      abstract: shapes, dtypes and shardings, see `abstract_state`.
      check: is given `run` before anything large is read; raises what should stop the restoring.

    Raises:
      UserError: the newest state is whole, but that of another model.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
          "run"
        ]
        check(run)
        leaves = _read_arrays(self._folder / str(step) / "state", flatten(abstract))
        return Restored(step, unflatten(abstract, leaves), run)
      except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # Not the folder's fault.
      except Exception as error:  # Orbax raises a bare Exception where a file is cut off.
        self._move_aside(step, error)
    return None

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.close()

  def _move_aside(self, step: int, error: Exception) -> None:
    """Without its number the folder is no checkpoint, and the step can be saved again."""
    torn = self._folder / str(step)
    aside = self._folder / f"torn-{step}"
    logging.warning("%s: torn, so it is moved to %s: %s", torn, aside.name, _first_line(error))
    if jax.process_index() == 0:
      if aside.exists():
        aside.rmtree()
      torn.rename(aside)
    self._manager.reload()


# --- The export ---


@dataclasses.dataclass(frozen=True)
class VideoConfig:
  """How frames are taken from a video, so that a question is asked as the training asked it.

  Attributes:
    num_frames: frames of a video.
    sampler: "uniform" or "fps".
    target_fps: frames a second of "fps".
    policy: how a frame becomes square, see `data.preprocess`.
  """

  num_frames: int
  sampler: str = "uniform"
  target_fps: float = 2.0
  policy: str = "siglip"


@dataclasses.dataclass(frozen=True)
class Export:
  """A model with all that is needed to ask it.

  Attributes:
    model: its sizes and variants.
    params: the parameters of `SlowFast(model)`.
    tokenizer: the tokenizer that it was trained with.
    video: how frames are taken from a video.
    system: the system prompt.
  """

  model: SlowFastConfig
  params: nnx.State
  tokenizer: Tokenizer
  video: VideoConfig
  system: str


def save_export(folder: str | os.PathLike, export: Export) -> None:
  """Writes the folder, or replaces it; under its name it is complete at any time."""
  target = epath.Path(folder).absolute()
  new = target.with_name(target.name + ".new")
  first = jax.process_index() == 0
  if first:
    if new.exists():
      new.rmtree()
    new.mkdir(parents=True)
    new.joinpath(CONFIG_FILE).write_text(json.dumps(_config_json(export), indent=2) + "\n")
    _save_tokenizer(export.tokenizer, new)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(new / PARAMS_FOLDER, flatten(export.params))
  if first:
    old = target.with_name(target.name + ".old")
    if old.exists():
      old.rmtree()
    if target.exists():
      target.rename(old)
    new.rename(target)
    if old.exists():
      old.rmtree()


def load_export(folder: str | os.PathLike, mesh: Mesh | None = None) -> Export:
  """Opens an export.

  Args:
    folder: what `save_export` wrote, or the folder of a run that has it as `export`.
    mesh: where the parameters go; None: the first device.

  Raises:
    UserError: the folder is none, or a part of it is missing or damaged.
  """
  source = epath.Path(folder).absolute()
  if not (source / CONFIG_FILE).exists() and (source / "export" / CONFIG_FILE).exists():
    source = source / "export"
  model, video, system = _parse_config(_read_config(source), source / CONFIG_FILE)
  tokenizer = _load_tokenizer(source)
  mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
  abstract = abstract_state(lambda: nnx.state(SlowFast(model, rngs=nnx.Rngs(0))), mesh)
  return Export(model, _load_params(source / PARAMS_FOLDER, abstract), tokenizer, video, system)


def _config_json(export: Export) -> dict[str, Any]:
  return {
    "format": FORMAT,
    "version": FORMAT_VERSION,
    "model": dataclasses.asdict(export.model),
    "video": dataclasses.asdict(export.video),
    "system": export.system,
  }


def _read_config(folder: epath.Path) -> dict[str, Any]:
  file = folder / CONFIG_FILE
  if not folder.is_dir():
    raise UserError(f"{folder}: there is no such folder; give one that `slowfast train` exported.")
  if not file.exists():
    raise UserError(
      f"{folder}: not an export, it has no {CONFIG_FILE}; give the --workdir of a `slowfast train` "
      "that has finished."
    )
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"{file}: not readable as JSON: {error}") from error
  found = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
  if found != (FORMAT, FORMAT_VERSION):
    raise UserError(
      f'{file}: expected "format": "{FORMAT}" and "version": {FORMAT_VERSION}, got {found}; '
      "it is no export, or a newer version of slowfast_jax wrote it."
    )
  return config


def _parse_config(
  config: dict[str, Any], file: epath.Path
) -> tuple[SlowFastConfig, VideoConfig, str]:
  try:
    model = _from_dict(SlowFastConfig, config["model"])
    return model, _from_dict(VideoConfig, config["video"]), config["system"]
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


def _load_tokenizer(folder: epath.Path) -> Tokenizer:
  with tempfile.TemporaryDirectory() as local:
    for file in folder.glob("*.json"):
      file.copy(epath.Path(local) / file.name)
    try:
      return Tokenizer.from_dir(local)
    except UserError as error:
      raise UserError(str(error).replace(local, str(folder))) from None


def _load_params(folder: epath.Path, abstract: nnx.State) -> nnx.State:
  try:
    return unflatten(abstract, _read_arrays(folder, flatten(abstract)))
  except (UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # As in `Checkpoints.restore`.
    raise UserError(
      f"{folder}: the parameters are missing or damaged ({_first_line(error)}); copy the export "
      "again, or run the training command again to make it anew."
    ) from error


# --- Arrays ---


def _read_arrays(
  folder: epath.Path, expected: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads all arrays of a folder, each straight onto its devices.

  Raises:
    UserError: the folder has other arrays than were expected.
    Exception: it cannot be read.
  """
  handler = ocp.StandardCheckpointHandler()
  with contextlib.closing(handler):
    stored = handler.metadata(folder)
    if stored is None:
      raise ValueError("the description of its arrays is missing")
    _check_names(folder, stored.tree, expected)
    return handler.restore(folder, args=ocp.args.StandardRestore(expected))


def _first_line(error: Exception) -> str:
  """Orbax appends pages of details."""
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_names(folder: epath.Path, stored: Mapping[str, Any], expected: Mapping[str, Any]):
  missing = [name for name in expected if name not in stored]
  extra = [name for name in stored if name not in expected]
  shapes = [
    f"{name} (expected {expected[name].shape}, got {tuple(stored[name].shape)})"
    for name in expected
    if name in stored and tuple(stored[name].shape) != tuple(expected[name].shape)
  ]
  groups = {"missing": missing, "not of this model": extra, "of another shape": shapes}
  wrong = [
    f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in groups.items() if names
  ]
  if wrong:
    raise UserError(
      f"{folder}: the arrays do not fit the model ({'; '.join(wrong)}); the config is another one, "
      "or another version of slowfast_jax wrote them."
    )
