# SPDX-License-Identifier: Apache-2.0
"""What the released tools read from replies, as their own functions were seen to do."""

import pytest

from slowfast_jax.eval import get_task
from slowfast_jax.eval.tasks import BENCHMARKS
from slowfast_jax.eval.tasks.extract import ranked_letter
from tests.eval.tasks.docs import DOCS

TASKS = ("videomme", "mlvu", "mvbench", "egoschema", "longvideobench", "perceptiontest")
# "" also stands for the tools' random guesses, and for what makes MLVU's fail.
TABLE = {
  "A": "AAAAAA",
  "B.": "BBBBBB",
  "(C)": "CCCCCC",
  "D. A book": "DDDDAD",
  "The answer is B": "BTBBBB",
  "b": ["", "b", "B", "", "", ""],
  "Because it rains": ["B", "B", "", "", "", ""],
  "": [""] * 6,
  "I think (A) but (C) is right": "AAAACA",
  "A B": "AAAABA",
  "None": ["", "N", "", "", "", ""],
}


@pytest.mark.parametrize("reply", TABLE)
def test_released_readers(reply):
  for task, answer in zip(TASKS, TABLE[reply], strict=True):
    for padded in (reply, f" {reply}\n"):
      assert get_task(task).parse(DOCS[task], padded) == answer, task
  doc = DOCS["nextqa_mc"]
  assert get_task("nextqa_mc").parse(doc, reply) == TABLE[reply][TASKS.index("longvideobench")]


@pytest.mark.parametrize(
  ("task", "reply", "answer"),
  [
    ("videomme", "The best answer is C", "C"),
    ("videomme", "The best option is D", "D"),
    ("videomme", "Best answer: C", "B"),  # The phrase never matches, so that its own B is read.
    ("mlvu", ")", ""),
    ("mlvu", "it is (D)", "D"),
    ("mvbench", "e.g. B", "E"),
    ("mvbench", "i.e. B", "B"),
    ("mvbench", "b. a cat", "B"),
    ("mvbench", "a cat", "A"),
    ("mvbench", "F", ""),
    ("egoschema", "I see that c holds b. a cat there", "B"),
    ("egoschema", "I see that c holds a cat there", ""),
    ("egoschema", "B then (A)", "B"),
    ("longvideobench", "I see a cat and then a dog", "C"),
    ("longvideobench", "a cat", ""),
    ("longvideobench", "A.B.x", "A"),
    ("perceptiontest", "It is C", "C"),
    ("perceptiontest", "DAB", ""),
  ],
)
def test_more_of_the_released_readers(task, reply, answer):
  assert get_task(task).parse(DOCS[task], reply) == answer


@pytest.mark.parametrize(
  ("task", "reply", "answer", "right"),
  [
    ("tempcompass_multi_choice", "B. eating", "B", True),
    ("tempcompass_multi_choice", "A", "A", False),
    ("tempcompass_multi_choice", "B) sleeping", "B", True),
    ("tempcompass_multi_choice", "Because", "", False),
    ("tempcompass_multi_choice", "eating", "", False),
    ("tempcompass_yes_no", "Yes, it is.", "yes", True),
    ("tempcompass_yes_no", "Nothing eats.", "no", False),
    ("tempcompass_yes_no", "It eats.", "", False),
    ("tempcompass_caption_matching", "Caption B: It eats.", "B", True),
    ("tempcompass_caption_matching", "It eats.", "B", True),
    ("tempcompass_caption_matching", "(B) It eats.", "B", True),
    ("tempcompass_caption_matching", "Caption B.", "B", True),
    ("tempcompass_caption_matching", "A", "A", False),
    ("tempcompass_caption_matching", "The second", "", False),
    ("tempcompass_captioning", "A bear is eating fish.", "B", True),
    ("tempcompass_captioning", "It is eating while running.", "", False),
    ("activitynetqa", " Yes.", "Yes.", True),
    ("activitynetqa", "no", "no", False),
  ],
)
def test_rules_of_the_judged_tasks(task, reply, answer, right):
  task, doc = get_task(task), DOCS[task]
  assert task.parse(doc, reply) == answer
  assert task.is_right(doc, answer) == right


@pytest.mark.parametrize(
  ("reply", "answer"),
  [
    ("The answer is B", "B"),
    ("D. A book", "D"),
    ("b", ""),
    ("Because", "B"),
    ("I think (A) but (C) is right", "C"),
    ("I choose (A). Not B", "B"),
    ("(A) or (B)", "B"),
    ("A: x, B: y", "A"),
    ("x A: y B: z", "B"),
    ("xA yB", "B"),
    ("", ""),
    ("My choice is C, not x", "C"),
    ("答案是C x", "C"),
  ],
)
def test_todays_shared_reader(reply, answer):
  assert ranked_letter(reply, "ABCD") == answer


def test_todays_readers():
  for name in ("videomme", "videomme_w_subtitle", "mlvu"):
    assert get_task(name, "upstream").parse(DOCS[name], "The answer is B") == "B"
  lvb = get_task("longvideobench", "upstream")
  assert lvb.parse(DOCS["longvideobench"], "D. A book") == "D"
  assert lvb.parse(DOCS["longvideobench"], "Best answer: D") == "D"


def test_today_generation_stops_at_an_empty_line():
  doc = DOCS["perceptiontest"]
  assert get_task("perceptiontest", "upstream").parse(doc, "\nNone\n\nB") == ""
  assert get_task("perceptiontest", "paper").parse(doc, "\nNone\n\nB") == "B"


LETTERED = [name for name in BENCHMARKS if not name.startswith(("tempcompass", "activitynetqa"))]


@pytest.mark.parametrize("name", LETTERED)
@pytest.mark.parametrize(
  ("reply", "answer"),
  [
    ("B", "B"),
    ("b.", "B"),
    ("(C)", "C"),
    ("C. A book", "C"),
    ("The answer is B", "B"),
    ("The correct option is (C).", "C"),
    ("Option B is right.", "B"),
    ("a cat", "B"),
    ("It is a dog", "C"),
    ("it must be (B), I think", "B"),
    ("Because it rains", ""),
    ("I think (A) but (C) is right", ""),
    ("A B", ""),
    ("None", ""),
    ("The answer is A man", ""),
    ("", ""),
  ],
)
def test_the_strict_reader_neither_guesses_nor_reads_other_words(name, reply, answer):
  assert get_task(name).parse_strict(DOCS[name], reply) == answer


@pytest.mark.parametrize(
  ("task", "reply", "answer"),
  [
    ("tempcompass_multi_choice", "The answer is B.", "B"),
    ("tempcompass_multi_choice", "eating", "B"),
    ("tempcompass_yes_no", "**Yes**", "yes"),
    ("tempcompass_yes_no", "Nothing eats.", ""),
    ("tempcompass_caption_matching", "Caption B: it does eat", "B"),
    ("tempcompass_caption_matching", "I choose: it eats", "B"),
    ("tempcompass_caption_matching", "Neither", ""),
  ],
)
def test_the_strict_reader_of_tempcompass(task, reply, answer):
  assert get_task(task).parse_strict(DOCS[task], reply) == answer
