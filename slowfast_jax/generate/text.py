# SPDX-License-Identifier: Apache-2.0
"""New token ids to pieces of text that can be shown as they come."""

from collections.abc import Sequence

from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError

# What a decoder shows for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"


class TextPieces:
  """Gives out the text of growing ids, each part once; a character waits for all of its bytes.

  Args:
    tokenizer: of the ids.
    stop: strings that end the text. Neither they nor a part of them is given out, however they
      are cut into tokens.

  Attributes:
    stopped: whether the text has come to a stop string.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    if isinstance(stop, str) or not all(stop):
      raise UserError(f"stop must be a list of strings that are not empty, got {stop!r}.")
    self.stopped = False
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._shown = 0

  def update(self, ids: Sequence[int], final: bool = False) -> str:
    """What `ids`, all of them so far, add to the text that was given out before."""
    if self.stopped:
      return ""
    text = self._tokenizer.decode(ids)
    text = text if final else text.rstrip(_UNFINISHED)
    # What was given out has no beginning of a stop string at its end.
    found = [at for at in (text.find(stop, self._shown) for stop in self._stop) if at >= 0]
    self.stopped = bool(found)
    end = min(found) if found else len(text) if final else len(text) - self._begun(text)
    piece = text[self._shown : end]
    self._shown = max(end, self._shown)
    return piece

  def _begun(self, text: str) -> int:
    """Characters at the end that may become a stop string."""
    lengths = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)
