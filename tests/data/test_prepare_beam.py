# SPDX-License-Identifier: Apache-2.0
"""Shards that other machines make; `check_beam.py` does it with Beam itself."""

import pickle
import sys

import pytest

from slowfast_jax.cli.main import main
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_beam import make_shard
from slowfast_jax.data.prepare_config import PrepareConfig, PrepareError
from tests.data.test_prepare import annotate, entry, errors, shards
from tests.data.video_files import VideoSpec, write_video

CONFIG = PrepareConfig(num_frames=4, size=32, shards=2, workers=1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Three good clips and a broken one."""
  folder = tmp_path_factory.mktemp("clips")
  for i in range(3):
    write_video(folder / f"{i}.mp4", VideoSpec(num_frames=6 + i))
  (folder / "bad.mp4").write_bytes(b"no video")
  return folder, annotate(folder, [entry(n) for n in ("0.mp4", "bad.mp4", "1.mp4", "2.mp4")])


def elsewhere(folder, pending, config, tell):
  """What Beam does, in this process and the wrong way round."""
  for shard, items in reversed(pending.items()):
    folder.items_file(shard).parent.mkdir(exist_ok=True)
    folder.items_file(shard).write_bytes(pickle.dumps(items))
    assert make_shard(str(folder.path), folder.num_shards, config, shard) == shard
    for error in folder.finished(shard).errors:
      tell(error)


def test_shards_made_apart_have_the_same_bytes(clips, tmp_path):
  prepare(*clips, tmp_path / "local", CONFIG)
  prepare(*clips, tmp_path / "apart", CONFIG, make_shards=elsewhere)
  assert shards(tmp_path / "apart") == shards(tmp_path / "local")
  assert errors(tmp_path / "apart") == errors(tmp_path / "local")
  assert not (tmp_path / "apart/.prepare/scratch").exists()


def test_without_beam_it_says_what_to_install(clips, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  folder, file = clips
  words = [f"--videos={folder}", f"--annotations={file}", f"--output={tmp_path / 'out'}"]
  assert main(["prepare", *words, "--runner=beam"]) == 1
  assert 'pip install ".[beam]" in the checkout' in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  assert main(["prepare", *words, "--beam-options=--runner=DirectRunner"]) == 2
  assert "--beam-options: is for --runner beam" in capsys.readouterr().err


def test_a_shard_that_is_not_there_afterwards_is_an_error(clips, tmp_path):
  def nothing(folder, pending, config, tell):
    pass

  with pytest.raises(PrepareError, match="0 of 2 shards"):
    prepare(*clips, tmp_path / "out", CONFIG, make_shards=nothing)
