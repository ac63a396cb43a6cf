# SPDX-License-Identifier: Apache-2.0
"""Buckets, right padding, and text that is given out whole characters at a time."""

import numpy as np
import pytest

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.generate.prompts import LEAST_TEXT, bucket, build_prompts
from slowfast_jax.generate.text import TextPieces


def test_buckets_waste_at_most_a_third():
  assert [bucket(n) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
  assert bucket(3, 16) == 16
  sizes = [bucket(n) for n in range(2, 5000)]
  assert all(n <= size <= n * 3 / 2 for n, size in zip(range(2, 5000), sizes))
  assert len(set(sizes)) < 30


@pytest.mark.parametrize(
  ("query_set", "queries"),
  [("text-only", [0, 4, 5]), ("text-only-masksystem", [4, 5]), ("all", [0, 1, 2, 3, 4, 5])],
)
def test_rows_are_padded_on_the_right(query_set, queries):
  built = build_prompts(
    [[7, IMAGE_TOKEN, 8, 9], [5]],
    [[3], []],
    fast_bound=4,
    rows=3,
    query_set=query_set,
    vocab_size=10,
  )
  assert built.tokens.shape == (3, LEAST_TEXT + 4)
  assert built.tokens[0, :7].tolist() == [7, 0, 0, 0, 8, 9, 0]
  assert built.kind[0, :7].tolist() == [1, 3, 3, 3, 1, 1, 0]
  assert built.lengths.tolist() == [6, 1, 1]
  assert built.real.tolist() == [True, True, False]
  assert [q for q in built.text_index[0].tolist() if q >= 0] == queries
  assert (np.asarray(built.text_index[1:]) == -1).all()


def test_a_character_waits_for_its_bytes():
  tokenizer = train_tokenizer(["abc"], 259)
  text = "Zoë: 猫 🐈!"
  ids, pieces = tokenizer.encode(text), TextPieces(tokenizer)
  shown = [pieces.update(ids[: i + 1]) for i in range(len(ids))]
  assert "".join(shown) == text
  assert "\ufffd" not in "".join(shown)
  broken = TextPieces(tokenizer)
  cut = tokenizer.encode("猫")[:2]
  assert broken.update(cut) == ""
  assert broken.update(cut, final=True) == tokenizer.decode(cut)
