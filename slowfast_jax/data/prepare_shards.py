# SPDX-License-Identifier: Apache-2.0
"""Items to finished shards, with the cores of this machine; `prepare_beam` does it with others'."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.prepare_folder import OutputFolder, ShardWriter
from slowfast_jax.data.prepare_items import error_entry
from slowfast_jax.data.prepare_record import Item, Made, make
from slowfast_jax.data.workers import Failure, Workers

# Is told of every item that is done: None, or the line of errors.jsonl that it became.
Tell = Callable[[dict[str, Any] | None], None]
# make_shards(folder, items of each shard that is missing, config, tell) finishes these shards.
MakeShards = Callable[[OutputFolder, Mapping[int, Sequence[Item]], PrepareConfig, Tell], None]


def make_locally(
  folder: OutputFolder, pending: Mapping[int, Sequence[Item]], config: PrepareConfig, tell: Tell
) -> None:
  """Makes one shard after the other; worker processes are never idle in between."""
  jobs = [item for items in pending.values() for item in items]
  count = min(config.workers or len(os.sched_getaffinity(0)), len(jobs))
  with Workers(functools.partial(make, config), count, config.timeout) as workers:
    outcomes = workers.map(jobs)
    for shard, items in pending.items():
      write_shard(folder.begin(shard), items, outcomes, tell)


def write_shard(
  writer: ShardWriter, items: Sequence[Item], outcomes: Iterator[Made | Failure], tell: Tell
) -> None:
  """Takes the outcomes of the items and writes their shard."""
  with writer:
    for item in items:
      outcome = next(outcomes)
      if isinstance(outcome, Failure):
        error = _describe(item, outcome)
        writer.errors.append(error)
        tell(error)
      else:
        writer.write(outcome, len(item.entries))
        tell(None)


def _describe(item: Item, failure: Failure) -> dict[str, Any]:
  first = item.entries[0]
  name = item.medium.name if item.medium else ""
  reason = failure.reason.removeprefix(f"{name}: ")
  return error_entry(item.media or first.id, first.line, len(item.entries), reason)
