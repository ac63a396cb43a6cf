# SPDX-License-Identifier: Apache-2.0
"""Scores of toy sets that were computed by hand, as the released tools and strictly."""

import pytest

from slowfast_jax.eval import get_task
from slowfast_jax.eval.tasks import BENCHMARKS, Prediction
from slowfast_jax.eval.tasks.judged import Verdict
from tests.eval.tasks.docs import DOCS


def predict(task, *replies, **changes):
  """Predictions of these replies; changes are lists, a value for each."""
  found = []
  for i, reply in enumerate(replies):
    doc = {**DOCS[task.name], "doc_id": f"q{i}", **{k: v[i] for k, v in changes.items()}}
    error = "no video" if reply is None else ""
    answer = "" if error else task.parse(doc, reply)
    found.append(Prediction(doc, reply or "", answer, error))
  return found


def approx(value):
  return pytest.approx(value, rel=1e-12)


def test_videomme_counts_questions():
  task = get_task("videomme")
  durations, kinds = ["short", "short", "long", "long"], ["a", "b", "b", "b"]
  found = predict(
    task, "B", "Because", "A", "The correct option is (B)", duration=durations, task_type=kinds
  )
  assert task.aggregate(found) == {
    "videomme_percetion_score": 75.0,
    "by_duration": {"short": 100.0, "long": 50.0},
    "by_domain": {"Knowledge": 75.0},
    "by_sub_category": {"Humanity & History": 75.0},
    "by_task_type": {"a": 100.0, "b": approx(200 / 3)},
    "strict": {"videomme_percetion_score": 50.0, "unparsed": 1},
  }
  upstream = get_task("videomme", "upstream").aggregate(found)
  assert upstream["videomme_perception_score"] == 75.0


def test_mlvu_averages_questions_and_kinds():
  kinds = ["order", "order", "order", "ego"]
  replies = ("B", "The answer is B", "A", "B")
  task = get_task("mlvu")
  scores = task.aggregate(predict(task, *replies, task_type=kinds))
  assert scores == {
    "mlvu_percetion_score": 50.0,  # 2 of 4 questions.
    "by_task_type": {"order": approx(100 / 3), "ego": 100.0},
    "strict": {"mlvu_percetion_score": approx(250 / 3), "micro_average": 75.0, "unparsed": 0},
    "macro_average": approx(200 / 3),  # The mean of 1/3 and 1.
  }
  task = get_task("mlvu", "upstream")
  scores = task.aggregate(predict(task, *replies, task_type=kinds))
  assert scores["mlvu_percetion_score"] == approx(250 / 3)  # The mean of 2/3 and 1.
  assert scores["micro_average"] == 75.0


def test_mvbench_drops_empty_replies_and_weighs_tasks_by_size():
  task = get_task("mvbench")
  tasks = ["x"] * 4 + ["y"] * 2
  found = predict(task, "B.", "", " \n", "A", "B", None, sub_task=tasks)
  # x: 1 of the 2 that are not empty; y: 1 of 2, for an error is no empty reply.
  assert task.aggregate(found)["by_sub_task"] == {"x": 50.0, "y": 50.0}
  found = predict(task, "B.", "", "", "", "B", "A", sub_task=tasks)
  assert task.aggregate(found) == {
    "mvbench_accuracy": approx((4 * 100 + 2 * 50) / 6),
    "by_sub_task": {"x": 100.0, "y": 50.0},
    "strict": {"mvbench_accuracy": approx(100 / 3), "unparsed": 3},
  }
  found = predict(task, "", "", "B", sub_task=["x", "x", "y"])
  assert task.aggregate(found)["mvbench_accuracy"] == approx(100 / 3)  # No reply at all: 0.


def test_egoschema_is_a_fraction_and_has_a_submission():
  task = get_task("egoschema_subset")
  found = predict(task, "B", "A", "C. a dog", "E", video_idx=list("abcd"), answer=list("1124"))
  assert task.aggregate(found) == {"score": 0.75, "strict": {"score": 0.75, "unparsed": 0}}
  assert task.submission(found) == {"a": 1, "b": 0, "c": 2, "d": 4}
  whole = get_task("egoschema")
  assert whole.aggregate(found) == {}
  assert whole.submission(found) == task.submission(found)


@pytest.mark.parametrize("name", ["egoschema_subset", "longvideobench", "nextqa_mc"])
def test_guesses_are_random_but_repeatable_and_never_strict(name):
  task = get_task(name)
  ids = [f"q{i}" for i in range(400)]
  found = predict(task, *[""] * 400, doc_id=ids)
  metric, scores = task.metric, task.aggregate(found)
  chance = 1 / len(task.options(DOCS[name]))
  assert scores[metric] == pytest.approx(chance, abs=0.06)  # Three standard deviations.
  assert get_task(name).aggregate(found) == scores
  assert scores["strict"] == {metric: 0.0, "unparsed": 400}
  if name == "egoschema_subset":
    sent = task.submission(predict(task, *[""] * 400, doc_id=ids, video_idx=ids))
    assert set(sent.values()) == {0, 1, 2, 3, 4}
    assert sum(index == 1 for index in sent.values()) == 400 * scores[metric]


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if not getattr(get_task(n), "guesses", 0)])
def test_other_tasks_do_not_guess(name):
  task = get_task(name)
  assert not task.is_right(DOCS[name], "")


def test_longvideobench_rounds_and_groups():
  task = get_task("longvideobench")
  groups, kinds = [15, 15, 60], ["S2E", "T2O", "T2O"]
  found = predict(task, "B", "A", "B", duration_group=groups, question_category=kinds)
  assert task.aggregate(found) == {
    "lvb_acc": 0.66667,
    "by_duration_group": {"15": 0.5, "60": 1.0},
    "by_question_category": {"S2E": 1.0, "T2O": 0.5},
    "strict": {"lvb_acc": approx(2 / 3), "unparsed": 0},
  }


def test_d_a_book_is_a_fault_of_the_paper_only():
  task = get_task("longvideobench")
  found = predict(task, "D. A book", correct_choice=[3])
  scores = task.aggregate(found)
  assert (scores["lvb_acc"], scores["strict"]["lvb_acc"]) == (0.0, 1.0)


def test_perceptiontest_counts_questions():
  task = get_task("perceptiontest")
  found = predict(task, "B", "b", None, area=["semantics", "semantics", "physics"])
  assert task.aggregate(found) == {
    "accuracy": approx(1 / 3),
    "by_area": {"semantics": 0.5, "physics": 0.0},
    "by_reasoning": {"descriptive": approx(1 / 3)},
    "strict": {"accuracy": approx(2 / 3), "unparsed": 0},
  }


def test_nextqa_counts_questions():
  task = get_task("nextqa_mc")
  found = predict(task, "B", "A", "B. a cat", None, answer=[1, 1, 1, 0])
  scores = {"exact_match": 0.5, "strict": {"exact_match": 0.5, "unparsed": 0}}
  assert task.aggregate(found) == scores


def test_errors_are_wrong_even_where_the_tool_would_guess():
  task = get_task("nextqa_mc")
  assert task.aggregate(predict(task, *[None] * 50))["exact_match"] == 0.0


def test_activitynetqa_without_a_judge():
  task = get_task("activitynetqa")
  found = predict(task, "Yes.", "Yes, he runs", "the no", "no", type=["3", "3", "4", "4"])
  assert task.aggregate(found) == {
    "exact_match_proxy": 25.0,
    "by_type": {"3": 50.0, "4": 0.0},
    "contains_proxy": 50.0,
  }


def test_activitynetqa_with_a_judge():
  task = get_task("activitynetqa")
  found = predict(task, "Yes.", "sure", "no", None)
  verdicts = {"q0": Verdict(True, 5), "q1": Verdict(True, 4), "q2": Verdict(False, 0)}
  assert task.judged_metrics(found, verdicts) == {"accuracy": 50.0, "score": 9 / 4}


def test_tempcompass_parts_count_unmatched_replies_as_wrong():
  task = get_task("tempcompass_multi_choice")
  dims = ["action", "action", "speed", "speed"]
  found = predict(task, "B", "eating", "A", "B) sleeping", dim=dims)
  assert task.aggregate(found) == {
    "avg_accuracy": 50.0,
    "action_accuracy": 50.0,
    "speed_accuracy": 50.0,
    "strict": {"avg_accuracy": 75.0, "unparsed": 0},
  }
  # The judge decides the one without a letter.
  judged = task.judged_metrics(found, {"q1": Verdict(True)})
  assert judged == {"avg_accuracy": 75.0, "action_accuracy": 100.0, "speed_accuracy": 50.0}
  assert task.judged_metrics(found, {})["avg_accuracy"] == 50.0


def test_tempcompass_captioning_has_a_proxy_and_a_judge():
  task = get_task("tempcompass_captioning")
  found = predict(task, "It is eating.", "It sleeps.", "running", dim=["a", "a", "b"])
  assert task.aggregate(found) == {
    "named_option_proxy": approx(100 / 3),
    "by_dim": {"a": 50.0, "b": 0.0},
  }
  verdicts = {f"q{i}": Verdict(i != 1) for i in range(3)}
  assert task.judged_metrics(found, verdicts) == {
    "avg_accuracy": approx(200 / 3),
    "a_accuracy": 50.0,
    "b_accuracy": 100.0,
  }


@pytest.mark.parametrize(
  ("name", "text", "verdict"),
  [
    ("activitynetqa", '{"same": "yes", "score": 4}', Verdict(True, 4)),
    ("activitynetqa", 'Sure: {"same": "No", "score": "1"}.', Verdict(False, 1)),
    ("activitynetqa", "yes", None),
    ("activitynetqa", '{"same": "yes"}', None),
    ("tempcompass_multi_choice", "Correct", Verdict(True)),
    ("tempcompass_multi_choice", "incorrect.", Verdict(False)),
    ("tempcompass_multi_choice", "Correct or incorrect?", None),
    ("tempcompass_multi_choice", "?", None),
    ("tempcompass_captioning", "B", Verdict(True)),
    ("tempcompass_captioning", "A. running", Verdict(False)),
    ("tempcompass_captioning", "None", Verdict(False)),
    ("tempcompass_captioning", " ", None),
  ],
)
def test_verdicts(name, text, verdict):
  assert get_task(name).verdict(DOCS[name], text) == verdict


def test_judges_are_asked_only_what_rules_leave_open():
  for name in ("tempcompass_multi_choice", "tempcompass_yes_no", "tempcompass_caption_matching"):
    task = get_task(name)
    assert task.judge_prompt(DOCS[name], "A" if name[-1] != "o" else "yes") is None
    asked = task.judge_prompt(DOCS[name], " something else ")
    assert f"Question: {DOCS[name]['question']}\n" in asked
    assert f"Right answer: {DOCS[name]['answer']}\nGiven answer: something else\n" in asked
  asked = get_task("tempcompass_captioning").judge_prompt(
    DOCS["tempcompass_captioning"], "It eats."
  )
  assert "Description: It eats.\nQuestion: What is it doing?\nA. running\nB. eating" in asked
  assert "eating" not in asked.replace("B. eating", "")  # The right answer is not given away.
