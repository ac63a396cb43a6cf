# SPDX-License-Identifier: Apache-2.0
"""Text comes in whole characters, and ends before a stop string of which nothing is shown."""

import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.generate.text import TextPieces
from tests.generate.tiny import TOKENIZER

TEXT = "The circle wasn't blue, é 🙂. ###END and more"


def pieces(ids, stop=()):
  """All pieces, as token after token comes, and whether it stopped."""
  text = TextPieces(TOKENIZER, stop)
  found = [text.update(ids[: i + 1], final=i + 1 == len(ids)) for i in range(len(ids))]
  return found, text.stopped


def test_pieces_join_to_the_text_and_no_character_is_torn():
  ids = TOKENIZER.encode(TEXT)
  found, stopped = pieces(ids)
  assert "".join(found) == TEXT
  assert not stopped
  assert not any("\ufffd" in piece for piece in found)
  assert max(len(piece) for piece in found) < len(TEXT) / 2


@pytest.mark.parametrize("stop", [["###END"], ["zzz", "END", "###E"], ["🙂. ###END"], ["##"]])
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(stop):
  ids = TOKENIZER.encode(TEXT)
  assert len(TOKENIZER.encode(stop[-1])) > 1  # It lies across tokens.
  found, stopped = pieces(ids, stop)
  assert stopped
  assert "".join(found) == TEXT[: min(TEXT.index(s) for s in stop if s in TEXT)]


def test_what_only_begins_like_a_stop_string_is_shown():
  ids = TOKENIZER.encode("a ## b ##")
  found, stopped = pieces(ids, ["###"])
  assert "".join(found) == "a ## b ##"
  assert not stopped


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop):
  with pytest.raises(UserError, match="stop must be a list of strings that are not empty"):
    TextPieces(TOKENIZER, stop)
