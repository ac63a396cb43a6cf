# SPDX-License-Identifier: Apache-2.0
"""`slowfast chat`: one question or a conversation, streamed; the picture; exit codes."""

import io

import pytest
from PIL import Image

from slowfast_jax.checkpoints.store import load_export, save_export
from slowfast_jax.cli import chat as verb
from slowfast_jax.cli.main import VERBS, main
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.video import read_video
from slowfast_jax.sharding import make_mesh
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  write_video(folder / "a.mp4", VideoSpec(num_frames=8))
  save_export(folder / "export", make_export())
  return folder


def arguments(folder, *more):
  checkpoint = f"--checkpoint={folder / 'export'}"
  return ["chat", str(folder / "a.mp4"), *more, checkpoint, "--max-new-tokens=6"]


@pytest.fixture(scope="module")
def asked(folder):
  """The engine's own answers to a list of turns."""
  mesh = make_mesh({"tensor": -1})
  engine = Engine(load_export(folder / "export", mesh), mesh)
  session = engine.encode(read_video(folder / "a.mp4", engine.export).images)
  return lambda turns: engine.answer([turns], [session], 6)[0]


def human(text):
  return {"from": "human", "value": text}


def test_it_answers(folder, asked, capsys):
  assert main(arguments(folder, "What was it?")) == 0
  assert capsys.readouterr().out == asked([human("What was it?")]) + "\n"


def test_sampling_follows_the_seed(folder, capsys):
  shown = []
  for seed in (1, 1, 2):
    assert (
      main(arguments(folder, "What?", "--temperature=2", "--top-p=0.99", f"--seed={seed}")) == 0
    )
    shown.append(capsys.readouterr().out)
  assert shown[0] == shown[1] != shown[2]


def test_a_conversation_keeps_its_history(folder, asked, capsys, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.StringIO("What was it?\nWhere?\n\nNot asked\n"))
  assert main(arguments(folder)) == 0
  first = asked([human("What was it?")])
  turns = [human("What was it?"), {"from": "gpt", "value": first}, human("Where?")]
  assert capsys.readouterr().out == f"{first}\n{asked(turns)}\n"


def test_it_plots_what_was_read(folder, tmp_path, capsys):
  file = tmp_path / "moments.png"
  assert main(arguments(folder, "What was it?", f"--attention={file}")) == 0
  with Image.open(file) as picture:
    assert picture.format == "PNG"
    assert picture.width == 1440


def test_errors_have_no_traceback(folder, tmp_path, capsys):
  missing = ["chat", "none.mp4", "What?", f"--checkpoint={folder / 'export'}"]
  assert main(missing) == 1
  assert capsys.readouterr().err.startswith("slowfast chat: none.mp4: there is no such file")
  assert main([*arguments(folder, "What?")[:-2], f"--checkpoint={tmp_path}"]) == 1
  assert "not an export" in capsys.readouterr().err
  assert main(arguments(folder, " ")) == 2
  assert main(arguments(folder, "What?", "--attention=a.jpg")) == 2
  assert main(arguments(folder, "What?", f"--attention={tmp_path}/none/a.png")) == 2
  assert "there is no such folder" in capsys.readouterr().err


def test_its_help_is_that_of_the_list():
  assert VERBS["chat"] == verb.HELP
