# SPDX-License-Identifier: Apache-2.0
"""Which letter a public tool reads from a reply, faults included: "" where it reads none.

Published scores were made by these readers, so they are reproduced as they are, not improved;
`choices.strict_choice` is the corrected one. Where a tool guesses at random, the reader here says
"" and the task guesses. Replies come without the space around them, as the tools strip it.
"""

import re
from collections.abc import Mapping, Sequence

from slowfast_jax.eval.tasks.prompts import LETTERS

# Two pairs of these were meant to be four phrases; a missing comma joined each pair.
_PHRASES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
  "The best option isThe correct option is",
  "Best answer:Best option:",
)
_MENDED_PHRASES = (
  *_PHRASES[:4],
  "The best option is",
  "The correct option is",
  "Best answer:",
  "Best option:",
)
# In several languages; what stands behind one of them is most likely the answer.
_ANSWER_PHRASES = (
  *(
    f"{start}{noun} is"
    for start in ("", "the ")
    for noun in (
      *("answer", "correct answer", "best answer"),
      *("correct option", "best option", "choice", "correct choice"),
    )
  ),
  *("i choose", "i select", "i pick", "my answer is", "my choice is"),
  *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# What the released reader of MVBench takes out, before it looks for a letter.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32  # A flag that was passed as a count: later periods stay.


def first_capital(reply: str) -> str:
  """VideoMME: the first capital A to D, also of a word ("Because" is B)."""
  return _first(_without(reply, _PHRASES), "[ABCD]")


def before_bracket(reply: str) -> str:
  """MLVU: the character before the first ")", else the first one ("The answer is B" is T)."""
  head, bracket, _ = reply.partition(")")
  return head[-1:] if bracket else reply[:1]


def lone_letter(reply: str) -> str:
  """MVBench: "B. words", else the first A to E that stands alone, of either case."""
  lettered = re.match(r"([A-E])\.\s*(.+)$", reply, re.IGNORECASE)
  if lettered:
    return lettered[1].upper()
  text = _without_marks(re.sub(r"[\n\t]", " ", reply).strip())
  return _first(text.strip("'").strip('"').lower(), r"\b[a-e]\b").upper()


def earliest_choice(reply: str, options: Sequence[str]) -> str:
  """EgoSchema: "(A)", "A " or "A." wherever they stand, else an option's text; the earliest."""
  text = _trimmed(reply)
  letters = LETTERS[: len(options)]
  patterns = [form.format(letter) for form in ("({})", "{} ", "{}.") for letter in letters]
  found = {pattern: text.rfind(pattern) for pattern in patterns if pattern in text}
  if found:
    return min(found, key=found.__getitem__).strip("(). ")
  named = _named(text, options)
  return min(named, key=named.__getitem__) if named else ""


def latest_choice(reply: str, options: Sequence[str]) -> str:
  """LongVideoBench and NextQA: the first of "(A)", "A ", "A." that is there; the latest letter.

  "D. A book" has an "A " and no "D ", and so is A.
  """
  text = _trimmed(reply)
  letters = LETTERS[: len(options)]
  # How each form is found, and how its last place is: "A." is looked for as " A ", so at none.
  for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
    found = {
      letter: text.rfind(place.format(letter)) for letter in letters if form.format(letter) in text
    }
    if found:
      return max(found, key=found.__getitem__)
  named = _named(text, options)
  return max(named, key=named.__getitem__) if named else ""


def word_letter(reply: str) -> str:
  """PerceptionTest: the first capital A to D that stands alone."""
  return _first(reply, r"\b[A-D]\b")


def mended_capital(reply: str) -> str:
  """LongVideoBench today: the first capital A to E, also of a word."""
  return _first(_without(reply, _MENDED_PHRASES), "[ABCDE]")


def ranked_letter(reply: str, letters: str) -> str:
  """VideoMME and MLVU today: the letter in the most telling place; of equals, the latest."""
  text = reply
  for mark in ",.!?;:'\"":
    text = text.strip(mark)
  stripped = text.strip()
  text = f" {text} "
  found: list[tuple[int, int, int]] = []  # How telling, where, and which letter came first.
  for order, letter in enumerate(letters):
    found += [(rank, place, -order) for rank, place in _places(text, stripped, letter)]
  if not found:
    found = [(0, text.rfind(letter), -i) for i, letter in enumerate(letters) if letter in text]
  return letters[-max(found)[2]] if found else ""


def _places(text: str, stripped: str, letter: str) -> list[tuple[int, int]]:
  """Where a letter stands, with the rank of that place."""
  forms = {f"({letter})": 6, f"{letter}.": 5, f"{letter}:": 4, f"{letter})": 3, f"{letter} ": 2}
  found = [(rank, text.rfind(form)) for form, rank in forms.items() if form in text]
  for phrase in _ANSWER_PHRASES:
    start = text.lower().find(phrase)
    place = text.find(letter, start + len(phrase)) if start >= 0 else -1
    found += [(7, place)] if place >= 0 else []
  if stripped.startswith(letter) and not stripped[1:2].isalpha():
    found.append((10, 0))
  if stripped.endswith(letter) and not stripped[-2:-1].isalpha():
    found.append((9, len(text) - 1))
  return found


def _first(text: str, pattern: str) -> str:
  found = re.search(pattern, text)
  return found[0] if found else ""


def _without(text: str, phrases: Sequence[str]) -> str:
  for phrase in phrases:
    text = text.replace(phrase, "")
  return text


def _trimmed(reply: str) -> str:
  for mark in ",.!?;:'":
    reply = reply.strip(mark)
  return f" {reply} "


def _named(text: str, options: Sequence[str]) -> Mapping[str, int]:
  """Letters of the options that a reply of more than five words contains, and where."""
  if len(text.split()) <= 5:
    return {}
  places = {letter: text.lower().rfind(o.lower()) for letter, o in zip(LETTERS, options)}
  return {letter: place for letter, place in places.items() if place >= 0}


def _without_marks(text: str) -> str:
  """Takes marks out; one that nowhere touches a space becomes a space, unless there is "1,2"."""
  joins = re.search(r"\d,\d", text) is not None
  cleaned = text
  for mark in _MARKS:
    touches = f"{mark} " in text or f" {mark}" in text
    cleaned = cleaned.replace(mark, "" if touches or joins else " ")
  return re.sub(r"\.(?!\d)", "", cleaned, count=_MOST_PERIODS)
