# SPDX-License-Identifier: Apache-2.0
"""Which option a reply chooses, read with care: no guesses, and no letters out of other words."""

import re
from collections.abc import Sequence

from slowfast_jax.eval.tasks.prompts import LETTERS

# "Option B is right" chooses B, "the answer is A dog" not A.
_SAID = r"(?i:answer|option|choice)(?i: is)?:? *\(?([{}])\b(?! (?!is\b)[a-z])"
_MARK = re.compile(r"^\W*([A-Z])[.):]\s*", re.IGNORECASE)


def strict_choice(reply: str, options: Sequence[str]) -> str:
  """The letter of the option that a reply chooses, or "" where that is not clear.

  In this order: what `parse_choice` reads, "the answer is B", the one letter in brackets.
  """
  letters = LETTERS[: len(options)]
  if found := parse_choice(reply, options):
    return found
  said = set(re.findall(_SAID.format(letters), reply))
  said = said or set(re.findall(rf"\(([{letters}])\)", reply))
  return said.pop() if len(said) == 1 else ""


def unlettered(option: str) -> str:
  """The text of "A. text", "(A) text" or "A) text"."""
  return _MARK.sub("", option, count=1)


def parse_choice(reply: str, options: Sequence[str]) -> str:
  """The letter of the option that a reply chooses, or "" where that is not clear.

  In this order: the reply is a letter, is an option's text, starts with a letter and a mark, or
  names just one option.
  """
  reply = reply.strip()
  letters = LETTERS[: len(options)]
  words = [_words(option) for option in options]
  # "A cup" may begin with an article: a letter stands alone or has a mark behind it.
  start = re.match(r"\W*([A-Za-z])(?:[).:,*]|\s*$|\s*\n)", reply)
  letter = start[1].upper() if start and start[1].upper() in letters else ""
  if letter and len(_words(reply)) == 1:
    return letter
  if _words(reply) and words.count(_words(reply)) == 1:
    return letters[words.index(_words(reply))]
  return letter or _only_named(_words(reply), words, letters)


def _only_named(reply: str, options: Sequence[str], letters: str) -> str:
  named = [o for o in options if o and f" {o} " in f" {reply} "]
  # "red" is also in a reply that names "dark red".
  named = [o for o in named if not any(o != other and o in other for other in named)]
  return letters[options.index(named[0])] if len(named) == 1 else ""


def _words(text: str) -> str:
  return " ".join(re.findall(r"\w+", text.lower()))
