# SPDX-License-Identifier: Apache-2.0
"""An evaluation on several hosts: each answers questions of its own videos on its own devices.

Hosts never compute together, so that none waits for the videos of another; they meet before the
first question and after the last one.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from slowfast_jax.errors import UserError
from slowfast_jax.sharding import make_mesh

# A host with short videos may wait long for another one; one that died ends the wait at once.
_PATIENCE_MS = 7 * 24 * 3600 * 1000


def wait_for_all(folder: Path, place: str) -> None:
  """Returns when every process is at this place; a process must not come there twice.

  Args:
    folder: of the evaluation. A training run has several, in folders of other names.
    place: in the program.

  Raises:
    UserError: another process has stopped.
  """
  if jax.process_count() == 1:
    return
  try:
    multihost.get_barrier_sync_fn()(
      key=f"slowfast_jax/eval/{folder.name}/{place}", timeout_ms=_PATIENCE_MS
    )
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      "Another process of this evaluation has stopped, see its messages; start all of them again, "
      "and they go on where they were."
    ) from error


def local_mesh(sizes: Mapping[str, int]) -> Mesh:
  """A mesh over the devices of this process.

  Raises:
    UserError: the sizes do not fit them, for instance because they count those of all hosts.
  """
  local, everywhere = jax.local_device_count(), jax.device_count()
  if local < everywhere == math.prod(sizes.values()):
    raise UserError(
      f"mesh: {dict(sizes)} takes the {everywhere} devices of all {jax.process_count()} processes, "
      f"but in an evaluation every process answers for itself on its own {local}; for instance "
      f"--config.mesh.data={local} with every other axis 1 does. A model that needs more devices "
      "than a host has cannot be evaluated."
    )
  return make_mesh(sizes, jax.local_devices())
