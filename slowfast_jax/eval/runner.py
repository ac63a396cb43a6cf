# SPDX-License-Identifier: Apache-2.0
"""Runs a task on a checkpoint: read videos ahead, ask in batches, write every answer down.

All questions of a video share its encoding, and batches mix videos. Several processes divide the
videos among them. A video that cannot be read is an error of its questions, which count as wrong
and are counted apart.
"""

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from slowfast_jax.checkpoints.export import Export
from slowfast_jax.checkpoints.open import load_checkpoint, open_checkpoint
from slowfast_jax.errors import UserError
from slowfast_jax.eval.hosts import local_mesh, wait_for_all
from slowfast_jax.eval.pictures import read_picture_folder
from slowfast_jax.eval.report import write_report
from slowfast_jax.eval.results import (
  RESULTS,
  SUBMISSION,
  PredictionParts,
  PredictionsFile,
  merge_parts,
  read_all,
)
from slowfast_jax.eval.tasks import Doc, Prediction, Task, get_task
from slowfast_jax.eval.tasks.media import find_video
from slowfast_jax.files import replace_json
from slowfast_jax.generate.engine import Engine, VideoSession
from slowfast_jax.generate.video import ModelFrames, read_video

# (done, total, errors), the first call with what was done before.
Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class _Question:
  """A question that is still to be asked."""

  id: str
  doc: Doc
  video: str


def evaluate(
  config: ml_collections.ConfigDict,
  checkpoint: str | os.PathLike,
  workdir: str | os.PathLike,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Asks every question that WORKDIR has no answer to, and scores them all.

  Args:
    config: see configs/eval_jsonl.py.
    checkpoint: an export.
    workdir: gets predictions.jsonl, results.json, report.html and, where the benchmark has a
      server, submission.json; the same call again resumes. Several processes share one.
    progress: is told how many questions are done; of several processes, how many of this one's.

  Returns:
    The content of results.json: `{task: {"accuracy": ..., "n": ..., "errors": ...}}`.

  Raises:
    UserError: the questions, the checkpoint or the folder cannot be used, or no video can be read.
  """
  task, docs = read_questions(config)
  if not videos_folder(config).is_dir():
    raise UserError(f"videos = {str(videos_folder(config))!r}: there is no such folder.")
  folder = Path(workdir)
  questions = [_Question(task.doc_id(doc), doc, task.video(doc)) for doc in docs]
  run = _describe(config, task, docs, checkpoint)
  report = progress or (lambda done, total, errors: None)
  # Batches mix videos, but their order is that of the videos.
  order = [question.id for group in _by_video(questions, ()).values() for question in group]
  with _open_predictions(folder, run, config.retry_errors) as predictions:
    wait_for_all(folder, "read")  # Now all know what is to be done, and nobody has begun.
    todo = _by_video(questions, predictions.done)
    mine = dict(list(todo.items())[jax.process_index() :: jax.process_count()])
    total = len(predictions.done) + sum(map(len, mine.values()))
    _tell(report, predictions, total)
    if todo:  # Also where nothing is left for this process: opening a model, all may have to meet.
      asker = _Asker(config, checkpoint, task, predictions)
      asker.ask(mine, lambda: _tell(report, predictions, total))
  wait_for_all(folder, "answered")
  if jax.process_index() == 0:
    merge_parts(folder, order)
  wait_for_all(folder, "merged")
  found = join(task, docs, read_all(folder))
  results = {task.name: summarize(task, found)}
  if jax.process_index() == 0:
    if (submission := task.submission(found)) is not None:
      replace_json(folder / SUBMISSION, submission)
    replace_json(folder / RESULTS, results)
    write_report(task, docs, videos_folder(config), folder)
  return results


def read_questions(config: ml_collections.ConfigDict) -> tuple[Task, list[Doc]]:
  """The task of an evaluation and its questions."""
  task = get_task(config.task, config.prompt_set or None)
  return task, task.docs(config.questions, str(videos_folder(config)))


def hash_questions(task: Task, docs: Sequence[Doc]) -> str:
  """Tells apart what is asked, to the byte."""
  content = [[task.doc_id(doc), task.video(doc), task.prompt(doc)] for doc in docs]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def join(
  task: Task, docs: Sequence[Doc], lines: Mapping[str, Mapping[str, Any]]
) -> list[Prediction]:
  """What became of every question."""
  found = ((doc, lines[task.doc_id(doc)]) for doc in docs)
  return [Prediction(doc, line["reply"], line["answer"], line["error"]) for doc, line in found]


def summarize(task: Task, found: Sequence[Prediction]) -> dict[str, Any]:
  """The task's metrics and what has to stand beside them."""
  errors = [prediction for prediction in found if prediction.error]
  if len(errors) == len(found):
    raise UserError(f"None of the {len(found)} questions could be asked: {errors[0].error}")
  unparsed = sum(not p.error and not task.is_parsed(p.doc, p.answer) for p in found)
  counts = {"n": len(found), "unparsed": unparsed, "errors": len(errors)}
  return {**task.aggregate(found), **counts, "prompt_set": task.prompt_set}


class _Asker:
  """Asks questions, and appends the answers batch by batch."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    checkpoint: str | os.PathLike,
    task: Task,
    predictions: PredictionsFile | PredictionParts,
  ):
    mesh = local_mesh(config.mesh.to_dict())
    self._config, self._task, self._predictions = config, task, predictions
    self._export = load_checkpoint(checkpoint, mesh)
    self._engine = Engine(
      self._export, mesh, dtype=config.dtype, batch_size=min(config.batch_size, 256)
    )

  def ask(self, by_video: Mapping[str, list[_Question]], tell: Callable[[], None]) -> None:
    waiting: list[tuple[_Question, VideoSession]] = []
    for video, frames in self._frames(list(by_video)):
      if isinstance(frames, str):
        logging.warning("%s", frames)
        self._predictions.append(
          prediction_line(self._task, q.doc, error=frames) for q in by_video[video]
        )
        tell()
        continue
      if frames.lost:
        logging.warning("%s: %d damaged frames are left out", video, frames.lost)
      session = self._engine.encode(frames.images, zero_slow=self._config.zero_slow)
      waiting += [(question, session) for question in by_video[video]]
      while len(waiting) >= self._config.batch_size:
        self._answer(waiting[: self._config.batch_size])
        del waiting[: self._config.batch_size]
        tell()
    if waiting:
      self._answer(waiting)
      tell()

  def _frames(self, videos: Sequence[str]) -> Iterator[tuple[str, ModelFrames | str]]:
    """Every video with its frames, or the reason why there are none; read ahead in threads."""
    config = self._config
    with ThreadPoolExecutor(config.read_threads) as pool:
      ahead: deque[tuple[str, Future]] = deque()
      try:
        for video in videos:
          ahead.append((video, pool.submit(_read, videos_folder(config) / video, self._export)))
          # One more than threads, so that none of them ever waits for the device.
          if len(ahead) > config.read_threads:
            name, future = ahead.popleft()
            yield name, future.result()
        for name, future in ahead:
          yield name, future.result()
      finally:
        for _, future in ahead:
          future.cancel()

  def _answer(self, batch: Sequence[tuple[_Question, VideoSession]]) -> None:
    replies = self._engine.answer(
      [self._task.prompt(question.doc) for question, _ in batch],
      [session for _, session in batch],
      self._config.max_new_tokens,
      decode_cross_attention=self._config.decode_cross_attention,
    )
    self._predictions.append(
      prediction_line(self._task, question.doc, reply)
      for (question, _), reply in zip(batch, replies)
    )


def _open_predictions(
  folder: Path, run: Mapping[str, Any], retry_errors: bool
) -> PredictionsFile | PredictionParts:
  if jax.process_count() == 1:
    return PredictionsFile(folder, run, retry_errors)
  return PredictionParts(folder, run, retry_errors, first=jax.process_index() == 0)


def _by_video(questions: Sequence[_Question], done: Container[str]) -> dict[str, list[_Question]]:
  """What is still to be asked, video by video; their order does not depend on what is done."""
  groups: dict[str, list[_Question]] = {}
  for question in questions:
    groups.setdefault(question.video, []).append(question)
  left = {video: [q for q in group if q.id not in done] for video, group in groups.items()}
  return {video: group for video, group in left.items() if group}


def videos_folder(config: ml_collections.ConfigDict) -> Path:
  """Releases have their videos in the folder of their questions."""
  return Path(config.videos or config.questions)


def _read(path: Path, export: Export) -> ModelFrames | str:
  found = find_video(path)
  try:
    return (read_picture_folder if found.is_dir() else read_video)(found, export)
  except UserError as error:
    return str(error)
  except Exception as error:  # One strange file must not end an evaluation of hours.
    return f"{path}: {type(error).__name__}: {error}"


def prediction_line(task: Task, doc: Doc, reply: str = "", error: str = "") -> dict[str, Any]:
  """A line of predictions.jsonl: how the reply is read, and whether that is right, both ways."""
  answer, strict = ("", "") if error else (task.parse(doc, reply), task.parse_strict(doc, reply))
  return {
    "id": task.doc_id(doc),
    "video": task.video(doc),
    "prompt": task.prompt(doc),
    "reply": reply,
    "answer": answer,
    "strict": strict,
    "gold": task.gold(doc),
    "right": not error and task.is_right(doc, answer),
    "strict_right": bool(strict) and task.is_right(doc, strict),
    "error": error,
  }


def _tell(report: Progress, predictions: PredictionsFile | PredictionParts, total: int) -> None:
  errors = sum(bool(line["error"]) for line in predictions.done.values())
  report(len(predictions.done), total, errors)


def _describe(
  config: ml_collections.ConfigDict,
  task: Task,
  docs: Sequence[Doc],
  checkpoint: str | os.PathLike,
) -> dict[str, Any]:
  """All that an answer depends on."""
  names = ("max_new_tokens", "zero_slow", "decode_cross_attention", "dtype")
  fingerprint = _fingerprint(Path(checkpoint))
  frames = dataclasses.asdict(open_checkpoint(checkpoint).export.video)
  return {
    "task": task.name,
    "prompt_set": task.prompt_set,
    "questions": hash_questions(task, docs),
    "checkpoint": fingerprint,
    "frames": frames,
    **{name: config[name] for name in names},
  }


def _fingerprint(checkpoint: Path) -> str:
  """Tells exports apart without reading them: Orbax names its data files anew in every save."""
  if not checkpoint.is_dir():
    raise UserError(f"--checkpoint {checkpoint}: there is no such folder.")
  files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
  sizes = [(str(path.relative_to(checkpoint)), path.stat().st_size) for path in files]
  return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
