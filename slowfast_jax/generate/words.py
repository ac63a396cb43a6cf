# SPDX-License-Identifier: Apache-2.0
"""What each word of a reply was written from: one strip of time a word, dark where it read."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.generate.text import TextPieces

_WIDTH, _MARGIN, _LABEL, _ROW, _GAP, _HEAD = 1440, 48, 200, 26, 4, 40
# More would make a picture that nobody reads.
MOST_WORDS = 40
_PAPER, _INK, _QUIET = (255, 255, 255), (31, 35, 40), (110, 118, 129)
_EMPTY, _FULL = np.array([240, 244, 248.0]), np.array([9, 105, 218.0])


@dataclasses.dataclass(frozen=True)
class Word:
  """A word and the shares of the frames in what its tokens read."""

  text: str
  profile: Float[np.ndarray, " F"]


def words_of(
  tokenizer: Tokenizer, ids: Sequence[int], read: Float[np.ndarray, "tokens F"]
) -> list[Word]:
  """Tokens to words: a new one begins with every space. A word reads what its tokens do, averaged.

  Args:
    tokenizer: of the ids.
    ids: the reply.
    read: of each of its tokens, see `SlowAttention.read_by_reply`.
  """
  pieces = TextPieces(tokenizer)
  parts: list[tuple[str, list[np.ndarray]]] = []
  for i, profile in enumerate(read, 1):
    text = pieces.update(ids[:i], final=i == len(ids))
    if not parts or text[:1].isspace():
      parts.append(("", []))
    parts[-1] = (parts[-1][0] + text, [*parts[-1][1], profile])
  words = [Word(text.strip(), np.mean(profiles, axis=0)) for text, profiles in parts]
  return [word for word in words if word.text]


def draw_words(words: Sequence[Word], seconds: Float[np.ndarray, " F"]) -> Image.Image:
  """A picture as wide as a timeline; the frames stand in the order of time, one a cell.

  Args:
    words: of the reply; the first MOST_WORDS are drawn.
    seconds: when each frame is shown.
  """
  shown = words[:MOST_WORDS]
  height = _HEAD + len(shown) * (_ROW + _GAP) + 40
  image = Image.new("RGB", (_WIDTH, height), _PAPER)
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
  more = f" (the first {MOST_WORDS} of {len(words)})" if len(words) > MOST_WORDS else ""
  draw.text((_MARGIN, 8), "what each word read" + more, fill=_QUIET, font=font)
  left, right = _MARGIN + _LABEL, _WIDTH - _MARGIN
  edges = np.linspace(left, right, len(seconds) + 1)
  # One scale for all words: a word that read nothing in particular looks so.
  peak = max([float(word.profile.max()) for word in shown], default=1.0)
  for row, word in enumerate(shown):
    top = _HEAD + row * (_ROW + _GAP)
    draw.text((left - 12, top + 4), _shortened(word.text), fill=_INK, font=font, anchor="ra")
    for share, start, stop in zip(word.profile, edges[:-1], edges[1:]):
      colour = tuple((_EMPTY + (_FULL - _EMPTY) * float(share) / peak).astype(int).tolist())
      draw.rectangle((start, top, max(stop - 1, start + 1), top + _ROW), fill=colour)
  bottom = _HEAD + len(shown) * (_ROW + _GAP) + 6
  for i in sorted({0, len(seconds) // 2, len(seconds) - 1}):
    middle = (edges[i] + edges[i + 1]) / 2
    draw.text((middle, bottom), f"{seconds[i]:.1f} s", fill=_QUIET, font=font, anchor="ma")
  return image


def below(above: Image.Image, other: Image.Image) -> Image.Image:
  """Two pictures of one width as one."""
  joined = Image.new("RGB", (above.width, above.height + other.height), _PAPER)
  joined.paste(above, (0, 0))
  joined.paste(other, (0, above.height))
  return joined


def _shortened(text: str, most: int = 20) -> str:
  return text if len(text) <= most else text[: most - 1] + "…"
