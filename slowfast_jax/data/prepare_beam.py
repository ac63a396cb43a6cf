# SPDX-License-Identifier: Apache-2.0
"""`prepare` beyond one machine: every shard an element of an Apache Beam pipeline.

Any Beam runner will do: its workers need this package, and the media and the output folder under
the paths that they have here (a network file system, or a bucket that is mounted as one). A worker
makes a shard as the local runner does, a process apart from it that may hang or crash, so the
shards have the same bytes, and a run that one of the two began the other finishes.
"""

import functools
import os
import pickle
from collections.abc import Mapping, Sequence

from slowfast_jax.data.prepare_config import PrepareConfig, PrepareError
from slowfast_jax.data.prepare_folder import OutputFolder
from slowfast_jax.data.prepare_record import Item, make
from slowfast_jax.data.prepare_shards import MakeShards, Tell, write_shard
from slowfast_jax.data.workers import Workers
from slowfast_jax.errors import UserError


def beam_runner(options: Sequence[str] = ()) -> MakeShards:
  """A way of making shards for `prepare`.

  Args:
    options: of Beam, such as "--runner=DataflowRunner"; none = Beam's runner on this machine.

  Raises:
    PrepareError: Beam is not installed.
  """
  try:
    import apache_beam  # noqa: F401
  except ImportError as error:
    raise PrepareError(
      f'--runner beam needs Apache Beam ({error}): pip install ".[beam]" in the checkout'
    ) from error
  return functools.partial(_make_with_beam, tuple(options))


def make_shard(folder: str, num_shards: int, config: PrepareConfig, shard: int) -> int:
  """Makes one shard. Runs on a machine that has nothing but the folder.

  Returns:
    The shard's number.
  """
  output = OutputFolder(folder, num_shards)
  with output.items_file(shard).open("rb") as file:
    items: list[Item] = pickle.load(file)
  count = min(config.workers or 1, len(items))
  with Workers(functools.partial(make, config), count, config.timeout) as workers:
    write_shard(output.begin(shard), items, workers.map(items), lambda _: None)
  return shard


def _make_with_beam(
  options: Sequence[str],
  folder: OutputFolder,
  pending: Mapping[int, Sequence[Item]],
  config: PrepareConfig,
  tell: Tell,
) -> None:
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions

  # As files: a graph with all texts in it would be more than some runners take.
  for shard, items in pending.items():
    file = folder.items_file(shard)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(list(items)))
  path = os.fspath(folder.path.absolute())
  work = functools.partial(make_shard, path, folder.num_shards, config)
  try:
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      shards = pipeline | "Shards" >> beam.Create(list(pending)) | beam.Reshuffle()
      _ = shards | "Make" >> beam.Map(work)
  except UserError:
    raise
  except Exception as error:  # Every runner has its own.
    raise PrepareError(
      f"the Beam pipeline failed ({type(error).__name__}: {error}); finished shards are kept, the "
      "same command goes on"
    ) from error
  for number in pending:
    made = folder.finished(number)
    for outcome in [*made.errors, *[None] * len(made.conversations)] if made else []:
      tell(outcome)
