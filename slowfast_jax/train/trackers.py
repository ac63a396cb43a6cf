# SPDX-License-Identifier: Apache-2.0
"""Programs besides files that a run's numbers go to: TensorBoard and Weights & Biases."""

import hashlib
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_collections
from etils import epath

from slowfast_jax.errors import UserError


class Tracker(Protocol):
  """Takes the numbers of a line, by name."""

  def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class _TensorBoard:
  def __init__(self, folder: epath.Path, step: int, config: ml_collections.ConfigDict):
    del config
    writer = _import("tensorboardX", "tensorboard").SummaryWriter
    # Steps that a resumed run does again are taken back.
    self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
      self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WeightsAndBiases:
  def __init__(self, folder: epath.Path, step: int, config: ml_collections.ConfigDict):
    del step
    # The same folder is the same run, however often it is resumed.
    name = hashlib.sha256(folder.as_posix().encode()).hexdigest()[:16]
    self._run = _import("wandb", "wandb").init(
      project="slowfast_jax", name=folder.name, id=name, resume="allow", config=config.to_dict()
    )

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    self._run.log(dict(numbers), step=step)

  def close(self) -> None:
    self._run.finish()


_TRACKERS: Mapping[str, Callable[[epath.Path, int, ml_collections.ConfigDict], Tracker]] = {
  "tensorboard": _TensorBoard,
  "wandb": _WeightsAndBiases,
}


def open_trackers(
  names: str, folder: epath.Path, step: int, config: ml_collections.ConfigDict
) -> list[Tracker]:
  """
  Args:
    names: of `_TRACKERS`, with commas between; empty: none.
    folder: of the run.
    step: that the run begins after.
    config: of the run.

  Raises:
    UserError: there is no such tracker, or its package is not installed.
  """
  wanted = [name.strip() for name in names.split(",") if name.strip()]
  if unknown := [name for name in wanted if name not in _TRACKERS]:
    raise UserError(f"train.trackers: {unknown[0]!r} is none; choose from {', '.join(_TRACKERS)}.")
  return [_TRACKERS[name](folder, step, config) for name in wanted]


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
  """The finite numbers of a line by name; those of a list by name and place."""
  flat: dict[str, float] = {}
  for name, value in line.items():
    items = {f"{name}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {}
    flat |= items or {name: value}
  return {
    name: value
    for name, value in flat.items()
    if isinstance(value, int | float) and math.isfinite(value)
  }


def _import(package: str, extra: str) -> Any:
  try:
    return importlib.import_module(package)
  except ImportError as error:
    raise UserError(
      f'train.trackers: {package} is not installed; pip install ".[{extra}]" in the checkout, or '
      f"leave {extra} out."
    ) from error
