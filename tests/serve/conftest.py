# SPDX-License-Identifier: Apache-2.0
"""One server in a process of its own, with a tiny random model, for all tests of a worker."""

import dataclasses
from pathlib import Path

import openai
import pytest

from benchmarks.serve_process import ServerProcess, serving
from slowfast_jax.checkpoints.store import load_export, save_export
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.video import read_media
from slowfast_jax.sharding import make_mesh
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

# Room for the tiny tokenizer's prompts, of about a token a letter; few lengths to compile.
FLAGS = ("--context=256", "--slots=4", "--max-body-mb=4", "--max-new-tokens=96")


@dataclasses.dataclass(frozen=True)
class Files:
  """Where the files of the tests are.

  Attributes:
    folder: of everything.
    export: the checkpoint.
    clips: the folder that the server may read, with a.mp4, b.mp4 and c.png.
  """

  folder: Path

  @property
  def export(self) -> Path:
    return self.folder / "export"

  @property
  def clips(self) -> Path:
    return self.folder / "clips"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
  files = Files(tmp_path_factory.mktemp("serve"))
  files.clips.mkdir()
  save_export(files.export, make_export())
  write_video(files.clips / "a.mp4", VideoSpec(num_frames=16))
  write_video(files.clips / "b.mp4", VideoSpec(num_frames=5))
  from benchmarks.serve_hostile import small_png

  (files.clips / "c.png").write_bytes(small_png())
  return files


@pytest.fixture(scope="session")
def server(files):
  flags = (*FLAGS, f"--allow-folder={files.clips}")
  with serving(files.export, *flags, log=files.folder / "server.log") as process:
    yield process


@pytest.fixture
def client(server: ServerProcess):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
    yield client


@pytest.fixture(scope="session")
def expected(files):
  """The engine's own answer to turns about files of the folder of clips."""
  mesh = make_mesh({"tensor": -1})
  engine = Engine(load_export(files.export, mesh), mesh)
  sessions = {}

  def answer(question, *names, **options):
    for name in names:
      if name not in sessions:
        sessions[name] = engine.encode(read_media(files.clips / name, engine.export).images)
    return engine.answer([question], [[sessions[name] for name in names]], 12, **options)[0]

  return answer
