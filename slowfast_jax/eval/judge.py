# SPDX-License-Identifier: Apache-2.0
"""A language model judges finished predictions, through any OpenAI-compatible endpoint.

A pass of its own, that needs no accelerator: verdicts are appended to judgements.jsonl, so that it
goes on where it was stopped, and their metrics are added to results.json.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_collections

from slowfast_jax.errors import UserError
from slowfast_jax.eval.report import write_report
from slowfast_jax.eval.results import (
  JUDGEMENTS,
  PREDICTIONS,
  RESULTS,
  RUN,
  PredictionsFile,
  parse_lines,
)
from slowfast_jax.eval.runner import Progress, hash_questions, join, read_questions, videos_folder
from slowfast_jax.eval.tasks import Prediction
from slowfast_jax.eval.tasks.judged import Judged, Verdict
from slowfast_jax.files import replace_json

FILES = (JUDGEMENTS, "judge.json")
MAX_TOKENS = 128
THREADS = 8
TRIES = 5
# Seconds; after each failure twice as many.
PAUSE = 1.0
TIMEOUT = 60.0
# Too many requests, or the server's own trouble: those may pass.
_PASSING = (408, 409, 429)


def judge(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  endpoint: str,
  model: str,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Has the replies judged that the task's rules leave open.

  Args:
    config: of the evaluation whose predictions WORKDIR holds.
    workdir: a finished evaluation.
    endpoint: the API's address, for example http://localhost:8000/v1. The key is taken from the
      environment variable OPENAI_API_KEY, if there is one.
    model: the judge's name there.
    progress: is told how many replies are judged.

  Returns:
    The content of results.json; the task's row has a new entry "judge".

  Raises:
    UserError: the task needs no judge, its evaluation is not finished, or the endpoint refuses.
  """
  task, docs = read_questions(config)
  if not isinstance(task, Judged):
    raise UserError(f"Task {task.name} needs no judge: its scores are in {RESULTS}.")
  folder = Path(workdir)
  found = join(task, docs, _finished(folder, hash_questions(task, docs), len(docs)))
  asked = {
    task.doc_id(p.doc): prompt
    for p in found
    if not p.error and (prompt := task.judge_prompt(p.doc, p.reply)) is not None
  }
  by_id = {task.doc_id(p.doc): p for p in found}
  run = {"task": task.name, "model": model, "questions": hash_questions(task, docs)}
  report = progress or (lambda done, total, errors: None)
  with PredictionsFile(folder, run, retry_errors=True, names=FILES) as file:
    report(len(file.done), len(asked), 0)
    todo = {name: prompt for name, prompt in asked.items() if name not in file.done}
    ask = _Client(endpoint, model).ask
    for name, text, error in _ask_all(ask, todo):
      file.append([_line(task, by_id[name], name, text, error)])
      report(len(file.done), len(asked), sum(bool(line["error"]) for line in file.done.values()))
    results = _add_results(task, folder, model, found, asked, file.done)
  write_report(task, docs, videos_folder(config), folder)
  return results


def _finished(folder: Path, questions: str, count: int) -> dict[str, dict[str, Any]]:
  """The lines of a finished evaluation of these questions."""
  path = folder / PREDICTIONS
  if not path.is_file() or not (folder / RESULTS).is_file():
    raise UserError(f"{folder}: there is no finished evaluation in it; evaluate first.")
  run = json.loads((folder / RUN).read_text(encoding="utf-8"))
  if run["questions"] != questions:
    raise UserError(f"{folder} answers other questions; give the config that it was made with.")
  lines = {line["id"]: line for line in parse_lines(path.read_bytes(), path)}
  if len(lines) < count:
    raise UserError(f"{path}: {len(lines)} of {count} questions are answered; evaluate first.")
  return lines


class _Client:
  """Asks one model of an endpoint."""

  def __init__(self, endpoint: str, model: str):
    if not endpoint.startswith(("http://", "https://")):
      raise UserError(f"The judge's address must be like http://host:8000/v1, got {endpoint!r}.")
    self._url = f"{endpoint.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
    self._model = model
    key = os.environ.get("OPENAI_API_KEY")
    self._headers = {"Content-Type": "application/json"}
    self._headers |= {"Authorization": f"Bearer {key}"} if key else {}

  def ask(self, prompt: str) -> str:
    """The model's reply.

    Raises:
      UserError: the endpoint does not answer, also after several tries, or refuses.
    """
    for attempt in range(TRIES):
      try:
        return self._ask(prompt)
      except urllib.error.HTTPError as error:
        problem = f"{error.code} {error.reason}: {error.read(500).decode(errors='replace')}"
        if error.code < 500 and error.code not in _PASSING:
          break
      except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
      if attempt + 1 < TRIES:
        time.sleep(PAUSE * 2**attempt)
    raise UserError(f"{self._url}: {problem}")

  def _ask(self, prompt: str) -> str:
    body = {
      "model": self._model,
      "messages": [{"role": "user", "content": prompt}],
      "temperature": 0,
      "max_tokens": MAX_TOKENS,
    }
    data = json.dumps(body).encode()
    request = urllib.request.Request(self._url, data, self._headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
      content = json.load(response)["choices"][0]["message"]["content"]
    if not isinstance(content, str):
      raise TypeError(f"expected text, got {content!r}")
    return content


def _ask_all(
  ask: Callable[[str], str], prompts: Mapping[str, str]
) -> Iterable[tuple[str, str, str]]:
  """(id, the judge's words, error) of each, in order; several are on their way at once.

  Raises:
    UserError: the first THREADS all fail, so that the rest would too.
  """

  def try_ask(prompt: str) -> tuple[str, str]:
    try:
      return ask(prompt), ""
    except UserError as error:
      return "", str(error)

  answered = False
  names = list(prompts)
  with ThreadPoolExecutor(THREADS) as pool:
    for start in range(0, len(names), THREADS):
      part = names[start : start + THREADS]
      replies = list(pool.map(try_ask, [prompts[name] for name in part]))
      answered = answered or any(not error for _, error in replies)
      if not answered:
        raise UserError(f"The judge answers nothing. {replies[0][1]}")
      yield from ((name, text, error) for name, (text, error) in zip(part, replies))


def _line(task: Judged, prediction: Prediction, name: str, text: str, error: str) -> dict[str, Any]:
  verdict = None if error else task.verdict(prediction.doc, text)
  right, score = (verdict.right, verdict.score) if verdict else (None, None)
  return {"id": name, "judge": text, "right": right, "score": score, "error": error}


def _add_results(
  task: Judged,
  folder: Path,
  model: str,
  found: list[Prediction],
  asked: Mapping[str, str],
  lines: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Puts what the judge said into results.json."""
  verdicts = {
    name: Verdict(line["right"], line["score"])
    for name, line in lines.items()
    if name in asked and line["right"] is not None
  }
  results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
  results[task.name]["judge"] = {
    "model": model,
    **task.judged_metrics(found, verdicts),
    "judged": len(verdicts),
    "failed": len(asked) - len(verdicts),
  }
  replace_json(folder / RESULTS, results)
  return results
