# SPDX-License-Identifier: Apache-2.0
"""Questions of one's own: which lines are wrong and why, and how replies are read."""

import json

import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.eval import get_task
from slowfast_jax.eval.tasks import Prediction

DOC = {"video": "a.mp4", "question": "What?", "options": ["a cup", "a book"], "answer": "B"}


def write(folder, *docs):
  file = folder / "questions.jsonl"
  file.write_text("".join((d if isinstance(d, str) else json.dumps(d)) + "\n" for d in docs))
  return str(file)


def test_questions_keep_their_extras_and_get_an_id(tmp_path):
  extra = {**DOC, "id": 7, "kind": "object", "windows": [[1, 2]], "answer": "a cup"}
  task = get_task("jsonl")
  docs = task.docs(write(tmp_path, DOC, "", extra))
  assert docs == [{**DOC, "id": "1"}, {**extra, "id": "7", "answer": "A"}]
  assert task.prompt(docs[0]) == "What?\nA. a cup\nB. a book\nAnswer with the letter."
  assert (task.doc_id(docs[1]), task.video(docs[1])) == ("7", "a.mp4")


def test_the_prompt_set_text_asks_for_an_option(tmp_path):
  task = get_task("jsonl", prompt_set="text")
  (doc,) = task.docs(write(tmp_path, DOC))
  assert task.prompt_set == "text"
  assert task.prompt(doc) == "Choose from: a cup, a book.\nWhat?"
  # Letters remain the currency of scores, and a letter is still understood.
  assert [task.parse(doc, reply) for reply in ("a book", "A cup.", "B", "a dog")] == [*"BAB", ""]
  assert get_task("jsonl").prompt_set == "letter"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "not readable as JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({**DOC, "video": None}, '"video" must be text, got None'),
    ({**DOC, "question": " "}, "\"question\" must be text, got ' '"),
    ({**DOC, "options": "ab"}, "\"options\" must be a list of texts, got 'ab'"),
    ({**DOC, "options": ["a"]}, '"options" must be 2 to 26, got 1'),
    ({**DOC, "answer": "C"}, '"answer" must be one of the letters AB or one of the options'),
    ({**DOC, "answer": 1}, "got 1"),
    ({k: v for k, v in DOC.items() if k != "answer"}, "got None"),
    ({**DOC, "id": "1"}, "the id '1' is that of line 1 already"),
  ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
  file = write(tmp_path, DOC, "", line)
  with pytest.raises(UserError) as error:
    get_task("jsonl").docs(file)
  assert str(error.value).startswith(f"{file}:3: ")
  assert message in str(error.value)


def test_missing_and_empty_files_are_named(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    get_task("jsonl").docs(str(tmp_path / "none.jsonl"))
  with pytest.raises(UserError, match="there is no question in it"):
    get_task("jsonl").docs(write(tmp_path, ""))
  with pytest.raises(UserError, match="no task 'mmlu'.*jsonl"):
    get_task("mmlu")
  with pytest.raises(UserError, match="prompt sets.*'letter', 'text'.*'paper'"):
    get_task("jsonl", prompt_set="paper")


@pytest.mark.parametrize(
  ("reply", "answer"),
  [
    ("A", "A"),
    ("b", "B"),
    (" B.", "B"),
    ("(C)", "C"),
    ("C) a red cup", "C"),
    ("D: it is the book", "D"),
    ("B\nbecause it falls", "B"),
    ("**C**", "C"),
    ("a cup", "A"),
    ("A cup.", "A"),  # The article of the option's text, and not the letter: the same here.
    ("A book", "D"),
    ("A red cup!", "C"),
    ("It is a red cup", "C"),  # "a cup" is not in it.
    ("I saw a dark red cup", "B"),
    ("a book or a cup", ""),
    ("I think it is the book.", ""),
    ("a book it is", "D"),
    ("E", ""),
    ("E. a book", "D"),
    ("", ""),
    ("...", ""),
    ("A dog", ""),
    ("Because", ""),
  ],
)
def test_replies(reply, answer):
  doc = {**DOC, "options": ["a cup", "dark red cup", "a red cup", "a book"]}
  assert get_task("jsonl").parse(doc, reply) == answer


def test_letters_come_before_options_that_are_letters():
  assert get_task("jsonl").parse({**DOC, "options": ["B", "A"]}, "A") == "A"


def test_every_question_counts():
  docs = [{**DOC, "kind": kind} for kind in ("x", "x", "y", "y")]
  answers = ["B", "A", "", "B"]
  predictions = [Prediction(d, a, a) for d, a in zip(docs, answers)]
  predictions.append(Prediction({**DOC, "options": list("abcd")}, "", "", "no video"))
  assert get_task("jsonl").aggregate(predictions) == {
    "accuracy": 0.4,
    "accuracy_by_kind": {"x": 0.5, "y": 0.5},
    "chance": pytest.approx(0.45),
  }
