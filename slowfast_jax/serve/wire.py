# SPDX-License-Identifier: Apache-2.0
"""Answers in the form of OpenAI's chat completions, whole or as server-sent events."""

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from slowfast_jax.serve.errors import ApiError
from slowfast_jax.serve.scheduler import Piece

DONE = "data: [DONE]\n\n"


class Completion:
  """Writes one answer.

  Args:
    model: the name of the model.
    include_usage: whether a stream ends with its token counts.
  """

  def __init__(self, model: str, include_usage: bool = False):
    self._include_usage = include_usage
    self._head = {
      "id": f"chatcmpl-{secrets.token_hex(12)}",
      "created": int(time.time()),
      "model": model,
    }

  def whole(self, text: str, last: Piece) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish}
    return {
      **self._head,
      "object": "chat.completion",
      "choices": [choice],
      "usage": _usage(last),
    }

  def first(self) -> str:
    return self._chunk({"role": "assistant", "content": ""}, None)

  def events(self, piece: Piece) -> Iterator[str]:
    """The events of a piece; with the last one, the end of the stream."""
    if piece.text:
      yield self._chunk({"content": piece.text}, None)
    if piece.finish is not None:
      yield self._chunk({}, piece.finish)
      if self._include_usage:
        yield event({**self._chunk_head(), "choices": [], "usage": _usage(piece)})
      yield DONE

  def _chunk(self, delta: dict[str, Any], finish: str | None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    usage = {"usage": None} if self._include_usage else {}
    return event({**self._chunk_head(), "choices": [choice], **usage})

  def _chunk_head(self) -> dict[str, Any]:
    return {**self._head, "object": "chat.completion.chunk"}


def event(value: dict[str, Any]) -> str:
  """A server-sent event."""
  return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_event(error: ApiError) -> str:
  """What a stream ends with that has begun and then fails."""
  return event(error.body)


def _usage(last: Piece) -> dict[str, int]:
  prompt, new = last.prompt_tokens, last.new_tokens
  return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
