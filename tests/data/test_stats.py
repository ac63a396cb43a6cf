# SPDX-License-Identifier: Apache-2.0
"""Distributions and mixtures: the numbers are those of the data, and pictures show them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.data.chat import encode_chat
from slowfast_jax.data.mixture_stats import format_mixture, measure_mixture
from slowfast_jax.data.stats import Series, draw_histogram, format_stats, gather, write_pictures
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UserError
from tests.train.tiny_run import record, write_records

TOKENIZER = train_tokenizer(["You are a helpful assistant."] * 9, 300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Six videos of 1 to 6 frames and, in another folder, three texts."""
  folder = tmp_path_factory.mktemp("data")
  videos = [dataclasses.replace(record(i, num_frames=i + 1), duration=i + 0.5) for i in range(6)]
  write_records(folder / "videos", videos)
  turns = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]
  text = dataclasses.replace(
    record(0, num_frames=0), conversations=[turns * 2], metadata={"kind": "text"}
  )
  write_records(folder / "texts", [dataclasses.replace(text, id=str(i)) for i in range(3)])
  return folder


def test_the_numbers_of_records(data):
  stats = gather(data / "videos", TOKENIZER)
  found = stats.to_json()
  assert (found["records"], found["conversations"]) == (6, 6)
  assert found["frames"]["sum"] == sum(range(1, 7))
  assert (found["duration"]["min"], found["duration"]["max"]) == (0.5, 5.5)
  assert found["turns"]["mean"] == 2
  lengths = [len(encode_chat(TOKENIZER, record(i).conversations[0]).ids) - 1 for i in range(6)]
  assert found["tokens"]["sum"] == sum(lengths)
  shown = format_stats(stats)
  assert "6 records, 6 conversations" in shown
  assert "frames of a video: mean 3.5, median 3.5" in shown


def test_the_numbers_of_annotations(tmp_path):
  turns = [{"from": "human", "value": "<video>\na b"}, {"from": "gpt", "value": "c"}]
  entries = [{"id": str(i), "video": f"{i}.mp4", "conversations": turns * i} for i in (1, 2)]
  file = tmp_path / "train.json"
  file.write_text(json.dumps(entries))
  found = gather(file).to_json()
  assert set(found) == {"records", "conversations", "turns", "tokens"}
  assert (found["turns"]["max"], found["tokens"]["sum"]) == (4, 12)


def test_a_picture_for_each_distribution(data, tmp_path):
  files = write_pictures(gather(data / "videos"), tmp_path / "deep" / "pictures")
  assert [file.name for file in files] == ["frames.png", "duration.png", "turns.png", "tokens.png"]
  for file in files:
    with Image.open(file) as picture:
      assert picture.size == (900, 420)
      assert len(picture.convert("RGB").getcolors(10_000)) > 10
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="pictures cannot be written"):
    write_pictures(gather(data / "videos"), tmp_path / "file")


@pytest.mark.parametrize(
  "values", [[3.0], [0.0, 0.0], [1, 2, 1000], [0.1, 0.5, 1e6], [-1.5, 2.5], list(range(100))]
)
def test_bars_are_as_high_as_their_counts(values):
  picture = np.array(draw_histogram(Series("x", "x", values)))
  bar = (picture == (66, 110, 180)).all(axis=-1).sum(axis=0)
  assert bar.max() > 300, "the highest bin fills the picture"
  twice = np.array(draw_histogram(Series("x", "x", [1] * 10 + [9] * 5)))
  heights = (twice == (66, 110, 180)).all(axis=-1).sum(axis=0)
  assert sorted(set(heights[heights > 0]))[0] == pytest.approx(heights.max() / 2, abs=2)


def mixture(data, **weights):
  file = data / f"{'-'.join(weights) or 'plain'}.json"
  names = weights or {"videos": None, "texts": None}
  sources = [
    {"name": name, "path": name, **({"weight": w} if w else {"licence": "MIT"})}
    for name, w in names.items()
  ]
  file.write_text(json.dumps(sources))
  return file


def test_what_a_mixture_amounts_to(data):
  videos, texts = measure_mixture(mixture(data, videos=1, texts=3), TOKENIZER, samples=24)
  assert (videos.share, texts.share) == (0.25, 0.75)
  assert (videos.drawn, texts.drawn) == (6, 18)
  assert (videos.epochs, texts.epochs) == (1, 6)
  assert (videos.frames, texts.frames) == (21, 0)
  assert videos.tokens == gather(data / "videos", TOKENIZER).to_json()["tokens"]["sum"]
  assert texts.tokens == 6 * gather(data / "texts", TOKENIZER).to_json()["tokens"]["sum"]


def test_without_weights_every_sample_comes_once(data):
  shares = measure_mixture(mixture(data))
  assert [share.epochs for share in shares] == [1, 1]
  assert shares[1].tokens == 18
  shown = format_mixture(shares, "words").splitlines()
  assert shown[0].split() == [
    *("source", "share", "samples", "drawn", "epochs", "words", "frames", "licence"),
  ]
  assert shown[1].split()[:4] == ["videos", "66.7%", "6", "6"]
  assert shown[1].endswith("MIT")
  assert shown[3].split()[:4] == ["all", "100.0%", "9", "9"]
