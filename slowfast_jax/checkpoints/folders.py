# SPDX-License-Identifier: Apache-2.0
"""Folders that are there as a whole or not at all, whatever stops the program."""

import contextlib
import os
from collections.abc import Iterator

import jax
from etils import epath

from slowfast_jax.errors import UserError

CONFIG_FILE = "config.json"


@contextlib.contextmanager
def replaced(folder: str | os.PathLike) -> Iterator[epath.Path]:
  """A new folder that takes the place of the old checkpoint when everything is in it.

  What an earlier attempt left behind (NAME.new) is deleted.

  Raises:
    UserError: in the folder is something, and it is no checkpoint.
  """
  target = epath.Path(folder).absolute()
  if target.exists() and not _may_go(target):
    raise UserError(f"{target}: what is there is no checkpoint, so it is not replaced.")
  new = target.with_name(target.name + ".new")
  old = target.with_name(target.name + ".old")
  first = jax.process_index() == 0
  if first:
    if new.exists():
      new.rmtree()
    new.mkdir(parents=True)
  yield new
  if first:
    if old.exists():
      old.rmtree()
    if target.exists():
      target.rename(old)
    new.rename(target)
    if old.exists():
      old.rmtree()


def _may_go(folder: epath.Path) -> bool:
  if not folder.is_dir():
    return False
  return (folder / CONFIG_FILE).exists() or not any(folder.iterdir())
