# SPDX-License-Identifier: Apache-2.0
"""Judging through an endpoint: what is sent, what is kept, and what happens when it fails."""

import http.server
import json
import threading

import pytest

from slowfast_jax.cli.main import main
from slowfast_jax.config import load_config
from slowfast_jax.errors import UserError
from slowfast_jax.eval import get_task, judge
from slowfast_jax.eval.runner import hash_questions, join, prediction_line, summarize
from tests.eval.runs import RUN
from tests.eval.tasks.docs import DOCS

REPLIES = ("Yes.", "sure", "no", "maybe")


class Endpoint:
  """An OpenAI-compatible server; `say(prompt)` gives a reply, or (status, body)."""

  def __init__(self):
    self.say = lambda prompt: '{"same": "yes", "score": 5}'
    self.requests = []
    endpoint = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint.requests.append((self.path, dict(self.headers), body))
        said = endpoint.say(body["messages"][-1]["content"])
        status, text = said if isinstance(said, tuple) else (200, completion(said))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

      def log_message(self, *args):
        pass

    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(text):
  return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def endpoint(monkeypatch):
  monkeypatch.setattr(judge, "PAUSE", 0.0)
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  endpoint = Endpoint()
  yield endpoint
  endpoint.server.shutdown()
  endpoint.server.server_close()


@pytest.fixture
def finished(tmp_path):
  """A finished evaluation of four questions, the last without a video."""

  def write(name, replies=REPLIES):
    task = get_task(name)
    field = "question_id" if name == "activitynetqa" else "video_id"
    rows = [{**DOCS[name], field: f"q{i}"} for i in range(4)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    docs = task.docs(str(tmp_path))
    errors = ["", "", "", "no video"]
    parts = zip(docs, replies, errors)
    lines = [prediction_line(task, doc, "" if e else reply, e) for doc, reply, e in parts]
    run = tmp_path / "run"
    run.mkdir()
    (run / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    asked = {"questions": hash_questions(task, docs), **RUN}
    (run / "run.json").write_text(json.dumps(asked))
    row = summarize(task, join(task, docs, {line["id"]: line for line in lines}))
    (run / "results.json").write_text(json.dumps({name: row}))
    config = load_config(f"configs/eval_paper.py:{name}", [f"--config.questions={tmp_path}"])
    return config, run

  return write


def verdicts(run):
  lines = map(json.loads, (run / "judgements.jsonl").read_text().splitlines())
  return {line["id"]: (line["right"], line["score"]) for line in lines if not line["error"]}


def test_replies_are_judged(finished, endpoint, monkeypatch):
  config, run = finished("activitynetqa")
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  said = {"Yes.": '{"same": "yes", "score": 5}', "sure": '{"same": "no", "score": 2}', "no": "?"}
  endpoint.say = lambda prompt: said[prompt.split("Given answer: ")[1].split("\n")[0]]
  told = []
  row = judge.judge(config, run, endpoint.url, "m", lambda *n: told.append(n))["activitynetqa"]
  assert row["judge"] == {"model": "m", "accuracy": 25.0, "score": 1.75, "judged": 2, "failed": 1}
  assert row["exact_match_proxy"] == 25.0
  assert json.loads((run / "results.json").read_text())["activitynetqa"] == row
  assert verdicts(run) == {"q0": (True, 5), "q1": (False, 2), "q2": (None, None)}
  assert told[0] == (0, 3, 0)
  assert told[-1] == (3, 3, 0)
  assert "judge accuracy" in (run / "report.html").read_text()
  path, headers, body = endpoint.requests[0]
  assert path == "/v1/chat/completions"
  assert headers["Authorization"] == "Bearer secret"
  assert (body["model"], body["temperature"]) == ("m", 0)
  for words in ("Question: does the MAN run\n", "Right answer: yes\n"):
    assert words in body["messages"][0]["content"]


def test_judging_goes_on_where_it_was_stopped(finished, endpoint):
  config, run = finished("activitynetqa")
  endpoint.say = lambda prompt: (400, "no") if "sure" in prompt else '{"same":"yes","score":4}'
  first = judge.judge(config, run, endpoint.url, "m")["activitynetqa"]["judge"]
  assert (first["judged"], first["failed"], len(endpoint.requests)) == (2, 1, 3)
  endpoint.say = lambda prompt: '{"same": "yes", "score": 3}'
  again = judge.judge(config, run, endpoint.url, "m")["activitynetqa"]["judge"]
  assert len(endpoint.requests) == 4  # Only what had failed.
  assert (again["accuracy"], again["score"]) == (75.0, 11 / 4)
  assert (again["judged"], again["failed"]) == (3, 0)
  assert judge.judge(config, run, endpoint.url, "m")["activitynetqa"]["judge"] == again
  assert len(endpoint.requests) == 4
  with pytest.raises(UserError, match="model was 'm' and is 'other'"):
    judge.judge(config, run, endpoint.url, "other")


def test_passing_trouble_is_tried_again(finished, endpoint):
  config, run = finished("activitynetqa")
  trouble = [(503, "busy"), (429, "slow down"), (200, "{"), (200, '{"choices": []}')]
  lock = threading.Lock()

  def say(prompt):
    with lock:
      return trouble.pop() if trouble else '{"same": "yes", "score": 5}'

  endpoint.say = say
  row = judge.judge(config, run, endpoint.url, "m")["activitynetqa"]["judge"]
  assert (row["judged"], row["failed"]) == (3, 0)
  assert len(endpoint.requests) == 7


def test_an_endpoint_that_answers_nothing_ends_it(finished, endpoint):
  config, run = finished("activitynetqa")
  endpoint.say = lambda prompt: (401, "who are you")
  with pytest.raises(UserError, match="answers nothing.*401.*who are you"):
    judge.judge(config, run, endpoint.url, "m")
  assert len(endpoint.requests) == 3  # Refused: not tried again.
  assert "judge" not in json.loads((run / "results.json").read_text())["activitynetqa"]
  with pytest.raises(UserError, match="must be like http://host:8000/v1, got 'host'"):
    judge.judge(config, run, "host", "m")


def test_rules_come_before_the_judge(finished, endpoint):
  name = "tempcompass_multi_choice"
  config, run = finished(name, ("B", "A", "eating", "x"))
  endpoint.say = lambda prompt: "Correct"
  row = judge.judge(config, run, endpoint.url, "m")[name]
  assert len(endpoint.requests) == 1
  assert row["avg_accuracy"] == 25.0
  assert row["judge"]["avg_accuracy"] == row["judge"]["action_accuracy"] == 50.0


def test_captions_are_judged_without_the_video(finished, endpoint, capsys):
  name = "tempcompass_captioning"
  _, run = finished(name, ("It eats.", "It runs.", "x", "x"))
  endpoint.say = lambda prompt: "B" if "eats" in prompt else "None"
  command = [
    *("eval", f"--config=configs/eval_paper.py:{name}", f"--config.questions={run.parent}"),
    *(f"--workdir={run}", f"--judge={endpoint.url}/chat/completions", "--judge_model=m"),
  ]
  assert main(command) == 0
  shown = capsys.readouterr().out
  assert "Judging: 3/3 replies" in shown
  assert ["judge", "avg_accuracy", "25.000"] in [line.split() for line in shown.splitlines()]


def test_only_finished_evaluations_are_judged(finished, endpoint, tmp_path):
  config, run = finished("activitynetqa")
  other = load_config(
    "configs/eval_paper.py:activitynetqa", [f"--config.questions={tmp_path / 'less.json'}"]
  )
  (tmp_path / "less.json").write_text(json.dumps([DOCS["activitynetqa"]]))
  with pytest.raises(UserError, match="answers other questions"):
    judge.judge(other, run, endpoint.url, "m")
  file = run / "predictions.jsonl"
  file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
  with pytest.raises(UserError, match="2 of 4 questions are answered; evaluate first"):
    judge.judge(config, run, endpoint.url, "m")
  with pytest.raises(UserError, match="no finished evaluation"):
    judge.judge(config, tmp_path / "none", endpoint.url, "m")
  assert not endpoint.requests
