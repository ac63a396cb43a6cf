# SPDX-License-Identifier: Apache-2.0
"""How questions are put to the model, in training and in evaluation alike."""

import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase


def multiple_choice_prompt(question: str, options: Sequence[str]) -> str:
  """A question with lettered options, to be answered with the letter alone.

  Raises:
    ValueError: fewer than two options, or more than the alphabet has letters.
  """
  _check(options)
  lettered = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
  return "\n".join([question, *lettered, "Answer with the letter."])


def choose_from_prompt(question: str, options: Sequence[str]) -> str:
  """Options, then the question, to be answered with one of the options itself.

  Raises:
    ValueError: fewer than two options, or more than the alphabet has letters.
  """
  _check(options)
  return f"Choose from: {', '.join(options)}.\n{question}"


def _check(options: Sequence[str]) -> None:
  if not 2 <= len(options) <= len(LETTERS):
    raise ValueError(
      f"A multiple choice question needs 2 to {len(LETTERS)} options, got {len(options)}."
    )
