# SPDX-License-Identifier: Apache-2.0
"""From files of many kinds to training batches: every good sample once an epoch, the rest told."""

import time

import pytest

from tests.data import whole_way

NUM_VIDEOS, SHARDS = 30, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return whole_way.make_files(
    tmp_path_factory.mktemp("files"), NUM_VIDEOS, num_broken=len(whole_way.BROKEN)
  )


@pytest.fixture(scope="module")
def records(files, tmp_path_factory):
  """Prepared in one go, and the seconds that it took."""
  output = tmp_path_factory.mktemp("out") / "records"
  began = time.monotonic()
  assert whole_way.start_preparing(files, output, SHARDS).wait() == 0
  return output, time.monotonic() - began


def test_every_broken_file_is_listed_with_its_reason(files, records):
  whole_way.check_errors(files, records[0])


def test_validation_agrees_with_what_was_prepared(files, records):
  whole_way.check_validation(files, records[0])


def test_a_run_that_is_killed_ends_with_the_same_bytes(files, records, tmp_path):
  whole, seconds = records
  whole_way.prepare_with_kills(files, tmp_path / "records", SHARDS, delays=[0.7 * seconds])
  assert whole_way.content(tmp_path / "records") == whole_way.content(whole)


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_holds_every_good_sample_once(files, records, pack):
  rows = whole_way.check_epoch(files, records[0], pack)
  assert rows < len(files.answers) / 2 if pack else rows == len(files.answers)
