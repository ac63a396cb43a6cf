# SPDX-License-Identifier: Apache-2.0
"""Several processes that are one program: how they find each other, and what they tell each other.

On Cloud TPU every host finds the others by itself. Elsewhere three variables of the environment
say who is who: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID.
"""

import contextlib
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from slowfast_jax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# Key in the store of the coordinator, and its barrier: some process leaves, so all have to.
_LEAVING = "slowfast_jax/leaving"

_meeting = False  # Whether this process waits for the others.


def initialize() -> None:
  """Joins the other processes, if there are any; to be called before anything touches a device.

  Raises:
    UserError: the variables of the environment do not fit together.
  """
  if jax.distributed.is_initialized():
    return
  # JAX would take SIGTERM for itself; see `train.preemption`.
  jax.config.update("jax_enable_preemption_service", False)
  global _meeting
  _meeting = True
  try:
    _meet()
  finally:
    _meeting = False


def _meet() -> None:
  given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
  if given:
    jax.distributed.initialize(*_parse(given))
  elif "tpu" in (jax.config.values["jax_platforms"] or ""):  # So JAX marks a machine with TPUs.
    try:
      jax.distributed.initialize()
    except ValueError:  # Nothing says that there are others: one machine with TPUs of its own.
      return


def _parse(given: dict[str, str]) -> tuple[str, int, int]:
  if missing := [name for name in VARIABLES if name not in given]:
    raise UserError(
      f"{', '.join(given)} is set and {missing[0]} is not; set all of {', '.join(VARIABLES)}, or "
      "none of them."
    )
  address, count, index = (given[name] for name in VARIABLES)
  if ":" not in address:
    raise UserError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, got {address!r}.")
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise UserError(
      "JAX_PROCESS_ID must be a number below JAX_NUM_PROCESSES, and both not negative; got "
      f"{index!r} of {count!r}."
    )
  return address, int(count), int(index)


def sum_over_processes(size: int) -> Callable[[list[int]], Int[Array, " n"]]:
  """Makes a function that adds `size` integers up over all processes.

  Every process has to call it at the same place in its program. It does not wait: the sum is an
  array that is being computed, and reading it waits.
  """
  mesh = Mesh(np.array(jax.devices()), ("devices",))
  spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
  add = jax.jit(lambda values: values.sum(axis=0), out_shardings=everywhere)
  rows = np.zeros((jax.local_device_count(), size), np.int32)

  def total(values: list[int]) -> Int[Array, " n"]:
    mine = rows.copy()
    mine[0] = values
    return add(jax.make_array_from_process_local_data(spread, mine))

  return total


def part() -> None:
  """Waits until all other processes are done too, if there are any."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def is_first() -> bool:
  """Whether this is process 0, also while its devices are being found.

  `jax.process_index` waits for them, and they for all other processes.
  """
  return _state().process_id == 0


def tell_leaving() -> None:
  """Tells all other processes that this one leaves; see `someone_leaves`."""
  if (client := _client()) is not None:
    client.key_value_set(_LEAVING, str(_state().process_id), allow_overwrite=True)


def someone_leaves() -> bool:
  """Whether a process has told so. Asks the coordinator: a message over the network."""
  client = _client()
  if client is None:
    return False
  try:
    return bool(client.key_value_try_get(_LEAVING))
  except jax.errors.JaxRuntimeError:  # There is no such key: nobody does.
    return False


def wait_for_leavers(seconds: float) -> None:
  """Waits until all processes have come here, on their way out; at most so long."""
  if (client := _client()) is None:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # One does not come: leave it behind.
    client.wait_at_barrier(_LEAVING, int(1000 * seconds))


def _client():
  """The coordinator's store, once all have met: asked earlier, it ends the process."""
  return None if _meeting else _state().client


def _state():
  # JAX has no public name for the coordinator's store; Orbax takes it from here too.
  from jax._src import distributed

  return distributed.global_state
