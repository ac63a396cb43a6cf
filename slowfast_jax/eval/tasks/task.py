# SPDX-License-Identifier: Apache-2.0
"""A benchmark as the runner sees it: questions, prompts, answers read from replies, scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# The fields of one question as its benchmark released them.
Doc = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the model made of one question.

  Attributes:
    doc: the question.
    reply: the model's words; "" where there is an error.
    answer: what the task read from the reply; "" where nothing parses.
    error: why the question could not be asked; "" if it could.
  """

  doc: Doc
  reply: str
  answer: str
  error: str = ""


class Task(Protocol):
  """A benchmark. Tasks hold no data: `docs` reads it from where the user has it.

  Replies are read twice: as the tool of the prompt set reads them, faults included, so that its
  numbers come out; and strictly, without guesses or letters out of other words.
  """

  name: str
  prompt_set: str
  groups: tuple[str, ...]  # Fields of a question that scores are also given by.

  def docs(self, questions: str, videos: str = "") -> list[Doc]:
    """Reads the questions, in order; `videos` is the folder of videos."""

  def doc_id(self, doc: Doc) -> str:
    """Identifies the question in this task, the same in every run."""

  def video(self, doc: Doc) -> str:
    """The video's path in the folder of videos."""

  def prompt(self, doc: Doc) -> str:
    """The question as it is put to the model."""

  def parse(self, doc: Doc, reply: str) -> str:
    """The answer read from a reply, or "" where nothing parses."""

  def parse_strict(self, doc: Doc, reply: str) -> str:
    """The answer that a reply clearly gives, or ""."""

  def is_parsed(self, doc: Doc, answer: str) -> bool:
    """Whether the answer is one that the question allows."""

  def gold(self, doc: Doc) -> str:
    """The right answer, or "" where the release keeps it secret."""

  def is_right(self, doc: Doc, answer: str) -> bool:
    """Whether the tool takes this answer for right; where it guesses for "", so does this."""

  def aggregate(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The task's metrics; questions with an error count as wrong."""

  def submission(self, predictions: Sequence[Prediction]) -> Any | None:
    """The JSON value that the benchmark's server takes; None where there is no server."""
