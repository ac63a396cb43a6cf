# SPDX-License-Identifier: Apache-2.0
"""Beam's own runner writes what the local runner writes. Run by `make test-beam`.

Not one of the tests that `make test` runs: Beam allows older releases of other packages only, so it
has an environment of its own.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from slowfast_jax.cli.main import main
from slowfast_jax.data.records import RecordSource, decode_frames
from tests.data.test_prepare import annotate, entry, errors, shards
from tests.data.video_files import VideoSpec, write_video

PROCESSES = "--direct_running_mode=multi_processing --direct_num_workers=2"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """The command of a folder of twelve clips, two of them broken, and a text."""
  folder = tmp_path_factory.mktemp("clips")
  entries = [{"id": "text", "conversations": entry("")["conversations"]}]
  for i in range(12):
    write_video(folder / f"{i}.mp4", VideoSpec(num_frames=6 + i))
    entries += [entry(f"{i}.mp4", j) for j in range(1 + i % 2)]
  for name in ("3.mp4", "7.mp4"):
    (folder / name).write_bytes(b"no video")
  file = annotate(folder, entries)
  return ["prepare", f"--videos={folder}", f"--annotations={file}", "--frames=4", "--size=32"]


@pytest.fixture(scope="module")
def local(words, tmp_path_factory):
  output = tmp_path_factory.mktemp("local") / "records"
  assert main([*words, f"--output={output}", "--shards=4"]) == 0
  return output


@pytest.mark.parametrize("options", ["", PROCESSES], ids=["one process", "two processes"])
def test_beam_writes_the_same_records(words, local, tmp_path, options):
  output = tmp_path / "records"
  command = [*words, f"--output={output}", "--shards=4", "--runner=beam"]
  assert main([*command, f"--beam-options={options}"] if options else command) == 0
  ours, expected = RecordSource(output), RecordSource(local)
  assert [r.id for r in ours] == [r.id for r in expected]
  for record, other in zip(ours, expected):
    assert record.conversations == other.conversations
    np.testing.assert_array_equal(decode_frames(record), decode_frames(other))
  assert shards(output) == shards(local)
  assert errors(output) == errors(local)
  assert len(errors(output)) == 2
  reports = [json.loads((folder / "report.json").read_text()) for folder in (output, local)]
  for name in ("records", "conversations", "frames", "errors", "settings"):
    assert reports[0][name] == reports[1][name]


def test_what_beam_began_the_local_runner_finishes(words, local, tmp_path):
  output = tmp_path / "records"
  command = [*words, f"--output={output}", "--shards=4"]
  beam = subprocess.Popen(
    [sys.executable, "-m", "slowfast_jax.cli.main", *command, "--runner=beam"],
    start_new_session=True,
  )
  while not list(output.glob("*.array_record-*")):
    time.sleep(0.02)
  os.killpg(beam.pid, signal.SIGKILL)
  beam.wait()
  assert not (output / "dataset_info.json").exists()
  assert main(command) == 0
  assert shards(output) == shards(local)
  assert 1 <= json.loads((output / "report.json").read_text())["resumed_shards"] < 4


def test_a_pipeline_that_fails_is_told(words, tmp_path, capsys):
  command = [*words, f"--output={tmp_path / 'records'}", "--runner=beam"]
  assert main([*command, "--beam-options=--runner=NoSuchRunner"]) == 1
  assert "the Beam pipeline failed" in capsys.readouterr().err


def test_too_many_errors_end_the_run(words, tmp_path):
  assert main([*words, f"--output={tmp_path / 'records'}", "--runner=beam", "--on-error=fail"]) == 1
