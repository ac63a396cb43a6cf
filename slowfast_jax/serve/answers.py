# SPDX-License-Identifier: Apache-2.0
"""From a checked request to its answer: the model's thread on one side, asyncio on the other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from anyio import to_thread

from slowfast_jax.data.chat import Turn
from slowfast_jax.serve.body import ChatBody, FilePart, Message, TextPart, VideoPart
from slowfast_jax.serve.errors import ApiError, bad_request
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import MediaReader, Medium
from slowfast_jax.serve.scheduler import Ask, Piece, Scheduler, Ticket

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}

_T = TypeVar("_T")


class Answer:
  """The pieces of one answer, for `async for`. Cancelled, it gives its slot back."""

  def __init__(self, scheduler: Scheduler):
    self._scheduler = scheduler
    self._loop = asyncio.get_running_loop()
    self._pieces: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
    self._ticket: Ticket | None = None

  async def start(self, ask: Ask) -> None:
    """
    Raises:
      ApiError: as of `Scheduler.submit`.
    """
    self._ticket = await to_thread.run_sync(self._scheduler.submit, ask, self._emit)

  def cancel(self) -> None:
    if self._ticket is not None:
      self._scheduler.cancel(self._ticket)

  async def __aiter__(self) -> AsyncIterator[Piece]:
    """
    Raises:
      ApiError: what went wrong.
    """
    while True:
      item = await self._pieces.get()
      if isinstance(item, ApiError):
        raise item
      yield item
      if item.finish is not None:
        return

  def _emit(self, item: Piece | ApiError) -> None:
    """Runs on the model's thread."""
    with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
      self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)


async def or_gone(work: Awaitable[_T], gone: Awaitable[Any]) -> _T | None:
  """The result of `work`, or None and `work` cancelled where `gone` comes first."""
  tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone)]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return await tasks[0] if tasks[0].done() else None
  finally:
    for task in tasks:
      task.cancel()


def make_ask(body: ChatBody, reader: MediaReader, limits: Limits) -> Ask:
  """Reads the media of a request. Takes long: not for the thread of the event loop.

  Raises:
    ApiError: a medium cannot be had, or there are too many.
  """
  limit = body.token_limit
  if limit is not None and limit > limits.new_tokens:
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    raise bad_request(f"{name}: at most {limits.new_tokens} are given, got {limit}.", name)
  count = sum(part.type != "text" for message in body.messages for part in message.content)
  if count > limits.media:
    raise bad_request(
      f"A request may have {limits.media} images and videos, got {count}.",
      "messages",
      "too_many_media",
    )
  turns: list[Turn] = []
  media: list[Medium] = []
  for i, message in enumerate(body.messages):
    texts = _texts(message, f"messages[{i}].content", reader, media)
    turns.append({"from": _ROLES[message.role], "value": "\n".join(texts)})
  return Ask(
    turns,
    media,
    limit,
    temperature=body.temperature or 0.0,
    top_p=1.0 if body.top_p is None else body.top_p,
    top_k=body.top_k or 0,
    seed=body.seed or 0,
    stop=body.stop or (),
  )


def _texts(message: Message, name: str, reader: MediaReader, media: list[Medium]) -> list[str]:
  """The message's parts as text, a marker where a medium stands, which joins `media`."""
  texts = []
  for i, part in enumerate(message.content):
    if isinstance(part, TextPart):
      texts.append(part.text)
      continue
    try:
      if isinstance(part, FilePart):
        field = f"{name}[{i}].file"
        if part.file.file_id is not None:
          media.append(reader.from_upload(part.file.file_id))
        else:
          media.append(reader.from_url(part.file.file_data or "", None))
      else:
        is_video = isinstance(part, VideoPart)
        field = f"{name}[{i}].{part.type}"
        url = part.video_url.url if isinstance(part, VideoPart) else part.image_url.url
        media.append(reader.from_url(url, "video" if is_video else "image"))
    except ApiError as error:
      raise error.at(field) from None
    texts.append("<image>")
  return texts
