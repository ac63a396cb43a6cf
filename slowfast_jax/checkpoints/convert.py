# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from one format to the other, a piece at a time, in memory that does not grow."""

import os
from collections.abc import Callable

from etils import epath

from slowfast_jax.checkpoints.hf import write_hf
from slowfast_jax.checkpoints.source import Source
from slowfast_jax.checkpoints.store import write_export
from slowfast_jax.errors import UserError

FORMATS = ("orbax", "huggingface")

# Tells how many bytes of how many are read.
Tell = Callable[[int, int], None]


def convert(
  source: Source,
  target: str | os.PathLike,
  to: str,
  dtype: str | None = None,
  tell: Tell = lambda done, total: None,
) -> None:
  """Writes a model that is read while it is written.

  The folder appears under its name only when it is complete. What an attempt that was stopped left
  behind (NAME.new) is deleted, and the work starts over.

  Args:
    source: the model, see `open_checkpoint` and `open_parts`.
    target: where to; it must not be there yet, or be empty.
    to: one of FORMATS.
    dtype: of the parameters; None: as they are.
    tell: is called after every piece.

  Raises:
    UserError: the target is there, or an argument is none of its possible values.
  """
  if to not in FORMATS:
    raise UserError(f"the format must be one of {FORMATS}, got {to!r}.")
  path = epath.Path(target).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path}: it is there already; give another name, or delete it.")
  done = 0

  def count(more: int) -> None:
    nonlocal done
    done += more
    tell(done, source.num_bytes)

  tell(0, source.num_bytes)
  if to == "orbax":
    write_export(target, source, dtype, count)
  else:
    write_hf(target, source, dtype, count)
