# SPDX-License-Identifier: Apache-2.0
"""New token ids to pieces of text that can be shown as they come."""

from collections.abc import Sequence

from slowfast_jax.data.tokenizer import Tokenizer

# What a decoder shows for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"


class TextPieces:
  """Gives out the text of growing ids, each part once; a character waits for all of its bytes."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._shown = 0

  def update(self, ids: Sequence[int], final: bool = False) -> str:
    """What `ids`, all of them so far, add to the text that was given out before."""
    text = self._tokenizer.decode(ids)
    stop = len(text) if final else len(text.rstrip(_UNFINISHED))
    piece = text[self._shown : stop]
    self._shown = max(stop, self._shown)
    return piece
