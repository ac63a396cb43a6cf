# SPDX-License-Identifier: Apache-2.0
"""The pages of evaluations show what went wrong, and nothing in them can run or load."""

import base64
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from slowfast_jax.cli.main import main
from slowfast_jax.eval import get_task
from slowfast_jax.eval.report import LISTED, WRONG, write_report
from tests.data.video_files import read_number
from tests.eval.runs import write_run
from tests.eval.tasks.docs import DOCS
from tests.eval.tasks.releases import write_release

EVIL = '<script src="http://x/y.js">alert(1)</script> & "more"'


def questions(task, count, **changes):
  rows = [
    {**DOCS[task.name], "question_id": f"q{i}", "videoID": "a", "duration": "short", **changes}
    for i in range(count)
  ]
  return [{**row, "doc_id": row["question_id"]} for row in rows]


def text_of(page):
  return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@pytest.fixture(scope="module")
def release(tmp_path_factory):
  return write_release(tmp_path_factory.mktemp("release") / "copy", "videomme")


@pytest.fixture(scope="module")
def page(release, tmp_path_factory):
  """Six questions: two right, one of them only by the tool's rules; two wrong, on two videos."""
  task = get_task("videomme")
  docs = questions(task, 6)
  for doc in docs[3:]:
    doc["duration"] = "long"
  docs[2]["videoID"], docs[3]["videoID"] = "gone", "b"
  replies = ["B", "Because it rains", EVIL, "A", "none", OSError("no <b>video</b>")]
  folder = write_run(tmp_path_factory.mktemp("run") / "run", task, docs, replies)
  write_report(task, docs, release, folder)
  return (folder / "report.html").read_text()


def test_scores_stand_beside_strict_and_published_ones(page):
  shown = text_of(page)
  assert "here strict paper, 64 frames paper, 96 frames" in shown
  assert "videomme_percetion_score 33.333 16.667 60.200 60.300" in shown


def test_accuracy_is_given_by_duration_and_by_category(page):
  shown = text_of(page)
  assert "By duration short 66.7% of 3 long 0.0% of 3" in shown
  assert "By task type Counting Problem 33.3% of 6" in shown
  assert 'width: 66.7%"></i></div><div class="track"><i style="width: 33.3%' in page


def test_a_wrong_answer_has_the_frames_that_the_model_saw(page):
  card = page[page.index("<h3>q3 ") :]
  card = card[: card.index("</section>")]
  images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', card)
  seen = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
  assert [read_number(np.asarray(image)) for image in seen] == [0, 2, 4, 6, 8, 11]
  assert all(len(image) < 6000 for image in images)
  assert "Right: B . Read: A . Reply: “A”" in text_of(card)


def test_what_names_no_answer_and_what_failed_is_listed(page):
  shown = text_of(page)
  assert "Replies that name no answer question reply q2" in shown
  assert "q4 none" in shown
  assert "could not be asked question video why q5 data/a.mp4 no <b>video</b>" in shown


def test_a_video_that_is_gone_costs_no_page(page):
  card = page[page.index("<h3>q2 ") :]
  assert "gone.mp4: there is no such file" in card[: card.index("</section>")]


def test_nothing_in_a_page_can_run_or_load(page):
  assert "<script" not in page
  assert EVIL in text_of(page)
  assert not re.findall(r'(?:src|href)="(?!data:)', page)
  assert "default-src 'none'" in page


def test_what_a_page_leaves_out_is_counted(release, tmp_path):
  task = get_task("videomme")
  docs = questions(task, 200)
  replies = ["A"] * 100 + ["none"] * 99 + [OSError("gone")]
  folder = write_run(tmp_path / "run", task, docs, replies)
  write_report(task, docs, release, folder)
  page = (folder / "report.html").read_text()
  assert page.count("<figure>") == WRONG * 6
  assert f"{WRONG} of 199 are shown" in page
  assert f"{LISTED} of 99 are shown" in page
  assert len(page) < 2e6


def test_answers_that_only_a_server_knows_are_not_called_wrong(tmp_path):
  task = get_task("egoschema")
  docs = [{**DOCS["egoschema"], "doc_id": "a"}]
  folder = write_run(tmp_path / "run", task, docs, ["A"])
  write_report(task, docs, tmp_path, folder)
  page = (folder / "report.html").read_text()
  assert "Wrong answers" not in page
  assert "submission.json" in page


def test_a_comparison_shows_every_question_that_flipped(tmp_path, capsys):
  task = get_task("videomme")
  docs = questions(task, 5)
  for i, doc in enumerate(docs):
    doc["question"] = f"What is {i}?"
  first = write_run(tmp_path / "a", task, docs, ["A", "B", "B", EVIL, "B"])
  second = write_run(tmp_path / "b", task, docs, ["B", "B", "A", "B", "B."])
  file = tmp_path / "pages/flipped.html"
  assert main(["eval", "--compare", str(first), str(second), "--html", str(file)]) == 0
  assert str(file) in capsys.readouterr().out
  page = file.read_text()
  shown = text_of(page)
  gained, lost = shown.split("Right in B only: 2")[1].split("Right in A only: 1")
  assert "What is 0?" in gained
  assert "What is 3?" in gained
  assert EVIL in gained
  assert "What is 2?" in lost
  assert "What is 1?" not in shown
  assert "1 more questions have other words" in shown
  assert "by the tool's rules 60.00%" in shown
  assert "<script" not in page
