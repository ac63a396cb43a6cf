# SPDX-License-Identifier: Apache-2.0
"""`slowfast chat`: one question or a conversation, streamed; the picture; exit codes."""

import dataclasses
import io

import jax
import pytest
from PIL import Image

from slowfast_jax.checkpoints.store import load_export, save_export
from slowfast_jax.cli import chat as verb
from slowfast_jax.cli.main import VERBS, main
from slowfast_jax.data.video import read_frames
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.video import read_video
from slowfast_jax.sharding import make_mesh
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export

pytestmark = pytest.mark.usefixtures("one_device")


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
  mesh = make_mesh({"tensor": -1}, jax.devices()[:1])
  engine = Engine(load_export(folder / "export", mesh), mesh)
  whole = read_video(folder / "a.mp4", engine.export).images

  def ask(turns, images=whole):
    return engine.answer([turns], [engine.encode(images)], 6)[0]

  return ask


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


def test_it_plots_what_each_word_read(folder, tmp_path, capsys):
  heights = []
  for kind in ("answer", "words"):
    file = tmp_path / f"{kind}.png"
    options = (f"--attention={file}", f"--attention-of={kind}", "--temperature=2", "--seed=4")
    assert main(arguments(folder, "What was it?", *options)) == 0
    with Image.open(file) as picture:
      heights.append(picture.height)
  assert capsys.readouterr().out.split()  # A reply without words has no strips.
  assert heights[0] < heights[1]


def test_a_part_of_the_video_and_other_frames_are_what_is_asked(folder, asked, capsys):
  assert main(arguments(folder, "What?", "--start=0.08", "--end=0.28", "--frames=4")) == 0
  part = read_frames(folder / "a.mp4", 4, start=0.08, end=0.28)
  assert part.indices.min() == 2
  assert part.indices.max() == 6
  export = load_export(folder / "export")
  video = dataclasses.replace(export.video, num_frames=4)
  images = read_video(folder / "a.mp4", export, video, 0.08, 0.28).images
  assert len(images) == 4
  assert capsys.readouterr().out == asked([human("What?")], images) + "\n"


def test_an_answer_ends_before_a_stop_string(folder, asked, capsys):
  whole = asked([human("What was it?")])
  stop = whole[len(whole) // 2 :][:2]
  assert main(arguments(folder, "What was it?", f"--stop={stop}")) == 0
  assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--start=3", "--end=2"], "--start 3 must lie before --end 2"),
    (["--frames=0"], "--frames must be positive, got 0"),
    (["--target-fps=-1"], "--target-fps must be positive, got -1"),
    (["--max-new-tokens=0"], "--max-new-tokens must be positive"),
    (["--attention-of=words"], "give both"),
  ],
)
def test_wrong_options_are_named(folder, options, message, capsys):
  assert main([*arguments(folder, "What?"), *options]) == 2
  assert message in capsys.readouterr().err


def test_a_picture_has_no_time(folder, capsys):
  command = ["chat", "a.png", "What?", f"--checkpoint={folder / 'export'}", "--start=1"]
  assert main(command) == 2
  assert "a.png is a picture, which has no time" in capsys.readouterr().err


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
