# SPDX-License-Identifier: Apache-2.0
"""Who answers in lmms-eval: a checkpoint, or the predictions that `slowfast eval` wrote before."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from slowfast_jax.checkpoints.open import load_checkpoint
from slowfast_jax.data.preprocess import preprocess
from slowfast_jax.errors import UserError
from slowfast_jax.eval.hosts import local_mesh
from slowfast_jax.eval.pictures import read_picture_folder
from slowfast_jax.eval.results import parse_lines
from slowfast_jax.generate.engine import Engine, VideoSession
from slowfast_jax.generate.video import read_media

MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Request:
  """A question.

  Attributes:
    prompt: its text.
    media: paths of videos, pictures or folders of pictures, or pictures themselves, in order.
    settings: of the generation, lmms-eval's names.
  """

  prompt: str
  media: tuple[Any, ...]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Answers(Protocol):
  """Gives replies."""

  def answer(self, requests: Sequence[Request]) -> list[str]:
    """The replies, in order."""

  def loss(self, request: Request, continuation: str) -> tuple[float, bool]:
    """What a continuation costs in nats, and whether it is the likeliest one."""


class FromCheckpoint:
  """Answers of a checkpoint. Questions of one video share its encoding, whatever their order.

  Args:
    checkpoint: as `slowfast eval` takes it.
    batch_size: questions at once.
    dtype: of the computation.
    decode_cross_attention: new tokens read slow tokens; False as in the paper's scores.
  """

  def __init__(self, checkpoint: str, batch_size: int, dtype: str, decode_cross_attention: bool):
    mesh = local_mesh({"data": -1})
    self._batch_size, self._decode_cross_attention = batch_size, decode_cross_attention
    self._engine = Engine(
      load_checkpoint(checkpoint, mesh), mesh, dtype=dtype, batch_size=batch_size
    )

  def answer(self, requests: Sequence[Request]) -> list[str]:
    replies = [""] * len(requests)
    failed = 0
    # A batch has one set of settings, and videos follow one another.
    order = sorted(
      range(len(requests)),
      key=lambda i: (repr(_sampling(requests[i].settings)), _key(requests[i].media)),
    )
    waiting: list[tuple[int, tuple[VideoSession, ...]]] = []
    for i, sessions in self._encoded(requests, order):
      if isinstance(sessions, str):
        logging.error("%s", sessions)
        failed += 1
        continue
      settings = _sampling(requests[i].settings)
      full = len(waiting) == self._batch_size
      if waiting and (full or _sampling(requests[waiting[0][0]].settings) != settings):
        self._flush(requests, waiting, replies)
      waiting.append((i, sessions))
    if waiting:
      self._flush(requests, waiting, replies)
    if failed:
      logging.error("%d of %d questions have media that cannot be read.", failed, len(requests))
    return replies

  def loss(self, request: Request, continuation: str) -> tuple[float, bool]:
    sessions = tuple(self._encode(medium) for medium in request.media)
    prompt = self._engine.prompt_ids(request.prompt, sessions)
    ids = self._engine.tokenizer.encode(continuation)
    (logits,) = self._engine.logits([[*prompt, *ids]], [sessions])
    rows = jax.nn.log_softmax(jnp.asarray(logits[-len(ids) - 1 : -1]))
    likely = np.asarray(rows.argmax(axis=-1)).tolist()
    return -float(rows[np.arange(len(ids)), np.array(ids)].sum()), likely == ids

  def _encoded(
    self, requests: Sequence[Request], order: Sequence[int]
  ) -> Iterator[tuple[int, tuple[VideoSession, ...] | str]]:
    """Every request with its encoded media, or the reason why there are none."""
    last, sessions = None, ()  # type: tuple[str, ...] | None, tuple[VideoSession, ...] | str
    for i in order:
      media = requests[i].media
      if _key(media) != last:
        last = _key(media)
        try:
          sessions = tuple(self._encode(medium) for medium in media)
        except UserError as error:
          sessions = str(error)
      yield i, sessions

  def _encode(self, medium: Any) -> VideoSession:
    export = self._engine.export
    if isinstance(medium, Image.Image):
      vision = export.model.vision
      pixels = np.array(medium.convert("RGB"))
      square = preprocess(pixels, vision.image_size, "pad", mean=vision.pixel_mean)
      return self._engine.encode(square[None])
    if not isinstance(medium, str | os.PathLike):
      raise UserError(f"Expected the path of a video or a picture, got {type(medium).__name__}.")
    path = Path(medium)
    frames = read_picture_folder(path, export) if path.is_dir() else read_media(path, export)
    return self._engine.encode(frames.images)

  def _flush(
    self,
    requests: Sequence[Request],
    waiting: list[tuple[int, tuple[VideoSession, ...]]],
    replies: list[str],
  ) -> None:
    """Answers what waits, and empties it."""
    batch = [requests[i] for i, _ in waiting]
    texts = self._engine.answer(
      [request.prompt for request in batch],
      [sessions or None for _, sessions in waiting],
      **_sampling(batch[0].settings),
      decode_cross_attention=self._decode_cross_attention,
    )
    for (i, _), request, text in zip(waiting, batch, texts):
      replies[i] = _until(text, request.settings.get("until") or ())
    waiting.clear()


class FromPredictions:
  """Replies out of a predictions.jsonl: what was generated on a pod is scored anywhere.

  Raises:
    UserError: the file is none of `slowfast eval`.
  """

  def __init__(self, file: str):
    self._path = path = Path(file)
    if not path.is_file():
      raise UserError(f"predictions = {file!r}: there is no such file.")
    self._lines: dict[str, list[dict[str, Any]]] = {}
    for line in parse_lines(path.read_bytes(), path):
      if "prompt" not in line:
        raise UserError(f"{path}: question {line['id']!r} has no prompt; evaluate it anew.")
      self._lines.setdefault(line["prompt"].strip(), []).append(line)

  def answer(self, requests: Sequence[Request]) -> list[str]:
    return [
      _until(self._reply(request), request.settings.get("until") or ()) for request in requests
    ]

  def loss(self, request: Request, continuation: str) -> tuple[float, bool]:
    raise UserError("Predictions are replies: tasks that weigh options need a checkpoint.")

  def _reply(self, request: Request) -> str:
    """That of the same prompt on the same video, of which only the path's end is known."""
    found = self._lines.get(request.prompt.strip(), [])
    if len(request.media) == 1 and isinstance(request.media[0], str):
      path = "/" + _stem(request.media[0])
      found = [line for line in found if path.endswith("/" + _stem(line["video"]))]
    replies = {line["reply"] for line in found}
    if len(replies) != 1:
      raise UserError(
        f"{self._path}: {len(replies)} replies to {request.prompt[:200]!r} on {request.media}; "
        "expected one. Was it made with the same prompts and the same questions?"
      )
    return replies.pop()


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
  """lmms-eval's settings in the engine's words; greedy unless they ask for samples."""
  sampled = settings.get("do_sample") and settings.get("temperature")
  return {
    "max_new_tokens": int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
    "temperature": float(settings["temperature"]) if sampled else 0.0,
    "top_p": float(settings.get("top_p") or 1.0) if sampled else 1.0,
  }


def _until(text: str, stops: str | Sequence[str]) -> str:
  for stop in (stops,) if isinstance(stops, str) else stops:
    text = text.split(stop)[0]
  return text


def _key(media: Sequence[Any]) -> tuple[str, ...]:
  return tuple(str(id(m)) if isinstance(m, Image.Image) else str(m) for m in media)


def _stem(path: str) -> str:
  """Without its suffix, which a release need not have got right."""
  return str(Path(path).with_suffix(""))
