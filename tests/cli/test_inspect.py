# SPDX-License-Identifier: Apache-2.0
"""`slowfast inspect`: facts and contact sheet of records, configs, and paths that are neither."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.cli.main import main
from slowfast_jax.data.chat import encode_chat
from slowfast_jax.data.inspect import folder_facts, format_facts, histogram
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.sheet import Chat, contact_sheet, token_texts
from slowfast_jax.data.tokenizer import train_tokenizer
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import make_export
from tests.train.tiny_run import record as square


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  """Three videos, five conversations, an image and a text that tries to be markup."""
  folder = tmp_path_factory.mktemp("inspect")
  hostile = "<script>alert(1)</script>"
  entries = [
    {"id": f"{hostile}", "conversations": [{"from": "human", "value": f"{hostile} & so on"}]},
    {"id": "picture", "image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]},
  ]
  Image.new("RGB", (40, 20)).save(folder / "a.png")
  for i in range(3):
    write_video(folder / f"{i}.mp4", VideoSpec(num_frames=25 * (i + 1), rotation=90 * (i == 2)))
    for j in range(i + 1):
      turns = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": f"word {j}"}]
      entries.append({"id": f"{i}-{j}", "video": f"{i}.mp4", "conversations": turns})
  (folder / "all.json").write_text(json.dumps(entries))
  config = PrepareConfig(num_frames=12, size=32, workers=1)
  prepare(folder, folder / "all.json", folder / "records", config)
  return folder / "records"


def test_facts_of_records(records, capsys):
  assert main(["inspect", str(records)]) == 0
  shown = capsys.readouterr().out
  assert f"{records}: 5 records, 8 conversations" in shown
  assert "MB in 1 shards" in shown
  assert "kinds: 3 video, 1 text, 1 image" in shown
  assert "stored frames: 4 of 32x32" in shown
  assert "source sizes: 2 of 96x64, 1 of 40x20, 1 of 64x96" in shown
  assert re.search(r"frames a video\n +12 +█+ 3\n", shown)
  assert re.search(r"conversations a record\n +1 +█+ 3\n +2 +█+ 1\n +3 +█+ 1\n", shown)
  assert re.search(r"duration in seconds\n +1 +█+ 1\n +2 +█+ 1\n +3 +█+ 1\n", shown)


def test_a_large_folder_is_read_in_part(records):
  facts = folder_facts(RecordSource(records), sample_size=2)
  assert [record.kind for record in facts.sample] == ["text", "video"]
  assert "From here on: 2 records, spread evenly." in format_facts(facts)


def test_the_contact_sheet_stands_alone_and_escapes(records, tmp_path, capsys):
  file = tmp_path / "sheet.html"
  assert main(["inspect", str(records), "--html", str(file)]) == 0
  assert f"wrote {file}" in capsys.readouterr().out
  page = file.read_text()
  pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
  assert len(pictures) == 3 * 8 + 1
  assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (32, 32)
  assert "<script" not in page
  assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in page
  assert "http" not in page
  for words in ("word 2", "0.00 s", "64x96, 3.0 s, 25 fps", "12 frames"):
    assert words in page


def test_the_contact_sheet_takes_some_records(records):
  page = contact_sheet(RecordSource(records), num_records=2, frames_per_record=3)
  assert page.count("<section>") == 2
  assert page.count("<figure>") == 3


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(["You are a helpful assistant. system user word what is it"] * 5, 300)


@pytest.mark.parametrize("targets", ["assistant", "reference"])
def test_the_marked_text_is_what_carries_loss(tokenizer, targets):
  turns = [
    {"from": "human", "value": "<video>\nWo? <|im_end|>"},
    {"from": "gpt", "value": "Überall 🎬"},
    {"from": "human", "value": "Ja?\n\n"},
    {"from": "gpt", "value": "Ja."},
  ]
  chat = encode_chat(tokenizer, turns, targets=targets)
  texts = list(token_texts(tokenizer, chat.ids, chat.loss_mask))
  assert [text for text, _ in texts].count(None) == 1
  whole = "".join(text or "" for text, _ in texts)
  assert whole.startswith("<|im_start|>system\nYou are")
  assert "user\n\nWo? <|im_end|><|im_end|>\n<|im_start|>assistant\nÜberall 🎬<|im_end|>" in whole
  learned = "".join(text for text, learned in texts if learned)
  if targets == "assistant":
    assert learned == "Überall 🎬<|im_end|>Ja.<|im_end|>"
  else:
    assert learned.startswith("<|im_start|>\n<|im_end|>\n<|im_start|>")


def test_the_contact_sheet_marks_the_tokens_that_carry_loss(records, tokenizer, tmp_path, capsys):
  tokenizer.save(tmp_path / "tokenizer")
  file = tmp_path / "sheet.html"
  words = ["inspect", str(records), f"--tokenizer={tmp_path / 'tokenizer'}"]
  assert main([*words, f"--html={file}"]) == 0
  page = file.read_text()
  assert "<script" not in page
  assert "Training leaves this out: 0 placeholder(s)" in page, "its video is not asked about"
  assert main(words) == 2
  assert "--tokenizer: is for the page of --html" in capsys.readouterr().err


def test_a_video_stands_where_its_tokens_go(tokenizer):
  class Source(list):
    path, index, shards, num_bytes = "here", [0], [0], 1

  page = contact_sheet(Source([square(2)]), chat=Chat(tokenizer))
  body = page[page.index("<section>") :]
  assert '<span class="media">video, 4 frames</span>' in body
  marked = re.findall(r'<span class="loss">([^<]*)</span>', body)
  assert "".join(marked) == "blue&lt;|im_end|&gt;"
  count = int(re.search(r"\d+ tokens, (\d+) carry loss", body)[1])
  assert count == len(marked)


@pytest.mark.parametrize(
  ("values", "labels", "counts"),
  [
    ([3, 3, 3], ["3"], [3]),
    ([1, 2, 2, 4], ["1", "2", "3", "4"], [1, 2, 0, 1]),
    (list(range(16)), [f"{i} to {i + 1}" for i in range(0, 16, 2)], [2] * 8),
    ([0.5, 4.5], [f"{i / 2 + 0.5:.1f} to {i / 2 + 1:.1f}" for i in range(8)], [1] + [0] * 6 + [1]),
    ([0.25, 0.25], ["0.25 everywhere"], None),
  ],
)
def test_histogram(values, labels, counts):
  lines = histogram(values)
  assert [re.split(r" {2,}|█", line.strip())[0] for line in lines] == labels
  if counts:
    assert [int(line.split()[-1]) for line in lines] == counts


def test_a_config(tmp_path, capsys):
  file = tmp_path / "small.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config():\n"
    "  return ml_collections.ConfigDict({'train': {'steps': 7}, 'seed': 1})\n"
  )
  assert main(["inspect", str(file)]) == 0
  assert capsys.readouterr().out == "seed: 1\ntrain:\n  steps: 7\n"
  assert main(["inspect", str(file), "--html", "x.html"]) == 2
  assert "there is no page for a config file" in capsys.readouterr().err


def test_a_training_config_shows_its_model(capsys):
  assert main(["inspect", "configs/demo.py:fast_only"]) == 0
  shown = capsys.readouterr().out
  assert "batch_size: 16" in shown
  assert "hybrid layers  none: it sees fast tokens alone" in shown
  assert main(["inspect", "configs/demo.py"]) == 0
  shown = capsys.readouterr().out
  assert "preset         demo" in shown
  assert "hybrid layers  0, 1; gate dynamic-tanh-warmup; queries text-only" in shown
  assert "32 frames (uniform), made square as siglip" in shown


def test_a_checkpoint(tmp_path, capsys):
  save_export(tmp_path / "model", make_export())
  assert main(["inspect", str(tmp_path / "model")]) == 0
  shown = capsys.readouterr().out
  assert shown.startswith(f"{tmp_path / 'model'}\n")
  assert "stored as      float32" in shown
  assert main(["inspect", str(tmp_path / "model"), "--html", "x.html"]) == 2
  (tmp_path / "model/config.json").write_text("{")
  capsys.readouterr()
  assert main(["inspect", str(tmp_path / "model")]) == 1
  assert "not readable as JSON" in capsys.readouterr().err


def test_other_paths_are_named(tmp_path, capsys):
  expected = "expected a records folder or a checkpoint folder or a config file (.py)"
  (tmp_path / "empty").mkdir()
  (tmp_path / "film.mp4").write_bytes(b"123")
  for path, what in {
    tmp_path: "a folder with empty, film.mp4",
    tmp_path / "empty": "an empty folder",
    tmp_path / "film.mp4": "a file of 3 bytes",
    tmp_path / "none": "there is no such file or folder",
  }.items():
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"slowfast inspect: {path}: {what}; expected " in error
    assert expected in error


def test_records_that_are_not_finished(tmp_path, capsys):
  (tmp_path / ".prepare").mkdir()
  (tmp_path / "slowfast-train.array_record-00000-of-00002").touch()
  assert main(["inspect", str(tmp_path)]) == 1
  assert "run the same `slowfast prepare` command again" in capsys.readouterr().err
