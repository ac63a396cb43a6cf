# SPDX-License-Identifier: Apache-2.0
"""The task "jsonl": multiple choice questions of one's own, one JSON object a line.

{"video": "a.mp4", "question": "What falls?", "options": ["a cup", "a book"], "answer": "A"}

`answer` is the letter or the option's text. `id` names the question (else its line does) and `kind`
the group that it is also scored in; whatever else a line has is kept.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks.choices import parse_choice
from slowfast_jax.eval.tasks.prompts import LETTERS, choose_from_prompt, multiple_choice_prompt
from slowfast_jax.eval.tasks.task import Doc, Prediction

# How the options are put, and so what a good reply looks like: a letter, or the option's text.
PROMPT_SETS = {"letter": multiple_choice_prompt, "text": choose_from_prompt}


class JsonlTask:
  """Questions from a file, scored by the share of right letters."""

  name = "jsonl"
  groups: tuple[str, ...] = ("kind",)

  def __init__(self, prompt_set: str = "letter"):
    if prompt_set not in PROMPT_SETS:
      raise UserError(f"Task jsonl has the prompt sets {tuple(PROMPT_SETS)}, got {prompt_set!r}.")
    self.prompt_set = prompt_set

  def docs(self, questions: str, videos: str = "") -> list[Doc]:
    """Reads and checks the whole file.

    Raises:
      UserError: it is missing, empty, or a line is no question; the message names the line.
    """
    path = Path(questions)
    if not path.is_file():
      raise UserError(f"{questions or '(none)'}: there is no such file of questions.")
    docs: list[Doc] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
      if not line.strip():
        continue
      doc = _parse_line(line, f"{path}:{number}", default_id=str(number))
      if doc["id"] in lines:
        first = lines[doc["id"]]
        raise UserError(f"{path}:{number}: the id {doc['id']!r} is that of line {first} already.")
      lines[doc["id"]] = number
      docs.append(doc)
    if not docs:
      raise UserError(f"{path}: there is no question in it.")
    return docs

  def doc_id(self, doc: Doc) -> str:
    return doc["id"]

  def video(self, doc: Doc) -> str:
    return doc["video"]

  def prompt(self, doc: Doc) -> str:
    return PROMPT_SETS[self.prompt_set](doc["question"], doc["options"])

  def parse(self, doc: Doc, reply: str) -> str:
    """The letter that a reply starts with, or that of the one option which it names."""
    return parse_choice(reply, doc["options"])

  def parse_strict(self, doc: Doc, reply: str) -> str:
    """The same: this task's own reader has no faults to reproduce."""
    return self.parse(doc, reply)

  def is_parsed(self, doc: Doc, answer: str) -> bool:
    return bool(answer)

  def gold(self, doc: Doc) -> str:
    return doc["answer"]

  def is_right(self, doc: Doc, answer: str) -> bool:
    return answer == doc["answer"]

  def submission(self, predictions: Sequence[Prediction]) -> None:
    """There is no server to send answers to."""

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Shares of right answers, 0 to 1, of all questions and by kind."""
    right = [p.answer == p.doc["answer"] for p in predictions]
    metrics: dict[str, Any] = {"accuracy": _mean(right)}
    kinds = sorted({str(p.doc["kind"]) for p in predictions if "kind" in p.doc})
    if kinds:
      metrics["accuracy_by_kind"] = {
        kind: _mean([r for r, p in zip(right, predictions) if str(p.doc.get("kind")) == kind])
        for kind in kinds
      }
    metrics["chance"] = sum(1 / len(p.doc["options"]) for p in predictions) / len(predictions)
    return metrics


def _mean(right: Sequence[bool]) -> float:
  return sum(right) / len(right)


def _parse_line(line: bytes, where: str, default_id: str) -> dict[str, Any]:
  try:
    doc = json.loads(line)
  except ValueError as error:
    raise UserError(f"{where}: not readable as JSON: {error}") from error
  if not isinstance(doc, dict):
    raise UserError(f"{where}: expected a JSON object, got {type(doc).__name__}.")
  for field in ("video", "question"):
    if not isinstance(doc.get(field), str) or not doc[field].strip():
      raise UserError(f'{where}: "{field}" must be text, got {doc.get(field)!r}.')
  options = doc.get("options")
  if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
    raise UserError(f'{where}: "options" must be a list of texts, got {options!r}.')
  if not 2 <= len(options) <= len(LETTERS):
    raise UserError(f'{where}: "options" must be 2 to {len(LETTERS)}, got {len(options)}.')
  identity = str(doc.get("id", default_id))
  return {**doc, "id": identity, "answer": _letter_of(doc, options, where)}


def _letter_of(doc: Mapping[str, Any], options: Sequence[str], where: str) -> str:
  answer, letters = doc.get("answer"), LETTERS[: len(options)]
  if isinstance(answer, str) and len(answer) == 1 and answer in letters:
    return answer
  if options.count(answer) == 1:
    return letters[options.index(answer)]
  raise UserError(
    f'{where}: "answer" must be one of the letters {letters} or one of the options, got {answer!r}.'
  )
