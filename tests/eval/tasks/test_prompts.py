# SPDX-License-Identifier: Apache-2.0
"""The prompts of every benchmark, byte for byte, as the released tools put them."""

import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.eval import get_task
from slowfast_jax.eval.tasks import BENCHMARKS
from tests.eval.tasks.docs import DOCS

HEAD = "Select the best answer to the following multiple-choice question based on the video.\n"
TAIL = "\nAnswer with the option's letter from the given choices directly."
FOUR = "A. a book\nB. a cat\nC. a dog\nD. a car"
FIVE = f"{FOUR}\nE. a hat"
SUBTITLED = (
  "Select the best answer to the following multiple-choice question based on the video and the "
  "subtitles."
)
ONLY = " Respond with only the letter (A, B, C, or D) of the correct option."
NO_SUBTITLES = "This video's subtitles are listed below: \nNo subtitles available\n"
SHORT = "Does the man run? Answer the question using a single word or phrase."
YES_NO = "Is it eating?\nPlease answer yes or no:"
BEST = "\nPlease directly give the best option:"
MATCHING = f"Which caption fits?\nCaption A: It runs.\nCaption B: It eats.{BEST}"
DOING = "What is it doing?\nA. running\nB. eating\nC. sleeping"

PAPER = {
  "videomme": f"{HEAD}What is seen?\n{FOUR}{TAIL}",
  "videomme_w_subtitle": f"{NO_SUBTITLES}{SUBTITLED}\nWhat is seen?\n{FOUR}{TAIL}",
  "mlvu": f"{HEAD}What comes first?\n{FOUR}{TAIL}",
  "mvbench": f"{HEAD[:-1]}{ONLY}\nWhat is seen?\n{FOUR}{TAIL}",
  "egoschema": f"{HEAD}What is c doing?\nOptions:\n{FIVE}{TAIL}",
  "egoschema_subset": f"{HEAD}What is c doing?\nOptions:\n{FIVE}{TAIL}",
  "longvideobench": f"{HEAD}What is seen?\n{FOUR}{TAIL}\n",
  "perceptiontest": f"{HEAD}What is seen?\n{FOUR[:-9]}{TAIL}",
  "nextqa_mc": f"{HEAD}why did he laugh?\n{FIVE}{TAIL}",
  "activitynetqa": SHORT,
  "tempcompass_multi_choice": f"{HEAD}{DOING}{TAIL}",
  "tempcompass_yes_no": YES_NO,
  "tempcompass_caption_matching": MATCHING,
  "tempcompass_captioning": "Describe the video.",
}
UPSTREAM = {
  "videomme": f"{SUBTITLED}{ONLY}\nWhat is seen?\n{FOUR}\n{TAIL}",
  "videomme_w_subtitle": (
    f"{NO_SUBTITLES}{SUBTITLED}{ONLY}\nWhat is seen?\n{FOUR}\nThe best answer is:"
  ),
  "mlvu": (
    "What comes first\n(A) a book\n(B) a cat\n(C) a dog\n(D) a car\n"
    "\nOnly give the best option.\nBest option: ("
  ),
  "mvbench": (
    "Question:What is seen?\nOption:\n(A) a book\n(B) a cat\n(C) a dog\n(D) a car\n"
    "Only give the best option.\n"
  ),
  "egoschema": f"What is c doing?\n{FIVE}{TAIL}",
  "egoschema_subset": f"What is c doing?\n{FIVE}{TAIL}",
  "longvideobench": f"What is seen?\n{FOUR}{TAIL}\n",
  "perceptiontest": f"What is seen?\n{FOUR[:-9]}{TAIL}",
  "nextqa_mc": f"why did he laugh\n{FIVE}",
  "activitynetqa": SHORT,
  "tempcompass_multi_choice": f"{DOING}{BEST}",
  "tempcompass_yes_no": YES_NO,
  "tempcompass_caption_matching": MATCHING,
  "tempcompass_captioning": "Describe the video.",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts(name):
  assert get_task(name).prompt(DOCS[name]) == PAPER[name]
  assert get_task(name, prompt_set="paper").prompt(DOCS[name]) == PAPER[name]
  assert get_task(name, prompt_set="upstream").prompt(DOCS[name]) == UPSTREAM[name]


@pytest.mark.parametrize(
  ("name", "question", "asked"),
  [
    ("mlvu", "What is it?", "What is it?"),
    ("mlvu", "Say what it is.", "Say what it is."),
    ("nextqa_mc", "say why.", "say why."),
    ("nextqa_mc", "why?", "why??"),
  ],
)
def test_question_marks(name, question, asked):
  doc = dict(DOCS[name])
  doc["question"] = doc["question"].replace(doc["question"].split("\n")[0], question)
  assert get_task(name).prompt(doc).startswith(f"{HEAD}{asked}\n")


def test_options_without_a_marker_are_named():
  doc = {**DOCS["mlvu"], "question": "What?\n(A) a book\na cat"}
  with pytest.raises(UserError, match="order_1.mp4: expected an option like.*'a cat'"):
    get_task("mlvu").prompt(doc)


def test_subtitles_stand_before_the_question():
  doc = {**DOCS["videomme"], "subtitles": "Hello.\nBye."}
  task = get_task("videomme_w_subtitle")
  listed = "This video's subtitles are listed below: \nHello.\nBye.\nSelect the best"
  assert task.prompt(doc).startswith(listed)
  assert task.prompt({**doc, "subtitles": ""}).startswith(
    "This video's subtitles are listed below: \n\nSelect the best"
  )


def test_there_are_two_prompt_sets():
  with pytest.raises(UserError, match="Task mlvu has the prompt sets.*'paper', 'upstream'"):
    get_task("mlvu", prompt_set="letter")
