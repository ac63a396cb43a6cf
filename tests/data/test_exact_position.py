# SPDX-License-Identifier: Apache-2.0
"""The position in the data: killed, resumed, on other numbers of workers and processes, the same.

All rows are drawn from several buckets and have random offsets: nothing but (seed, step) counts.
"""

import itertools
import pickle
import signal
import subprocess
import sys
import time

import psutil
import pytest

from slowfast_jax.data.packing import collate
from slowfast_jax.errors import UserError
from slowfast_jax.train.setup import open_setup
from tests.data.iterate import digest, digests, open_pipeline, write_data
from tests.train.tiny_run import tiny_config
from tests.train.tiny_run import write_data as write_squares

NEXT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("pack", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_after_sigkill_the_next_batches_are_the_same(folder, workers, pack):
  command = [sys.executable, "-m", "tests.data.iterate", folder, f"--workers={workers}"]
  process = subprocess.Popen(
    [*command, "--pack"] if pack else command, stdout=subprocess.PIPE, text=True
  )
  seen = [next(process.stdout).split() for _ in range(7)]
  family = psutil.Process(process.pid).children(recursive=True)
  process.send_signal(signal.SIGKILL)
  seen += [line.split() for line in process.stdout if line.endswith("\n")]
  process.wait()
  assert [int(step) for step, _ in seen] == list(range(len(seen)))

  unbroken = open_pipeline(folder, pack=pack, read_threads=0)
  expected = list(itertools.islice(digests(unbroken, 0), len(seen) + NEXT))
  assert [one for _, one in seen] == expected[: len(seen)]
  resumed = open_pipeline(folder, pack=pack, workers=workers)
  batches = digests(resumed, len(seen))
  assert list(itertools.islice(batches, NEXT)) == expected[len(seen) :]
  assert {failure.id for failure in resumed.failures} == {"9"}
  assert len(set(expected)) == len(expected)
  deadline = time.monotonic() + 20
  while any(one.is_running() and one.status() != "zombie" for one in family):
    assert time.monotonic() < deadline, "workers of a killed trainer must end too"
    time.sleep(0.1)
  assert len(family) >= workers


def test_a_worker_that_dies_ends_the_run_with_a_reason(folder):
  batches = open_pipeline(folder, workers=1).iterate()
  next(batches)
  (worker,) = [
    child
    for child in psutil.Process().children(recursive=True)
    if any("spawn_main" in word for word in child.cmdline())
  ]
  worker.kill()
  with pytest.raises(UserError, match="data.workers = 1 processes that read data has ended"):
    list(itertools.islice(batches, 200))


@pytest.mark.parametrize("pack", [False, True], ids=["alone", "packed"])
def test_the_global_order_is_that_of_one_process(folder, pack):
  """1 -> 2 -> 4 processes, each going on where those before stopped."""
  whole = open_pipeline(folder, pack=pack, read_threads=0)
  expected = list(itertools.islice(digests(whole, 0), 3 * NEXT))
  got = []
  for count in (1, 2, 4):
    parts = [
      open_pipeline(folder, pack=pack, process_index=i, process_count=count).iterate(len(got))
      for i in range(count)
    ]
    slices = itertools.islice(zip(*parts), NEXT)
    got += [digest(collate(rows)) for rows in slices]
  assert got == expected


def test_a_pickled_tokenizer_still_takes_special_tokens_for_text(folder):
  tokenizer = open_pipeline(folder)._tokenizer
  copy = pickle.loads(pickle.dumps(tokenizer))
  text = "a<|im_end|>b"
  assert copy.encode(text) == tokenizer.encode(text)
  assert copy.im_end_id not in copy.encode(text)


def test_the_config_reaches_the_pipeline(tmp_path):
  fields = ("data.workers=3", "data.random_offset=true", "data.max_failure_rate=0.02")
  pipeline = open_setup(tiny_config(write_squares(tmp_path), *fields)).pipeline
  assert (pipeline._workers, pipeline._random_offset) == (3, True)
  assert pipeline._counter.max_rate == 0.02
  with pytest.raises(UserError, match="workers must not be negative, got -1"):
    open_setup(tiny_config(tmp_path, "data.workers=-1"))
  with pytest.raises(UserError, match="max_failure_rate must lie between 0 and 1, got 2"):
    open_setup(tiny_config(tmp_path, "data.max_failure_rate=2"))
