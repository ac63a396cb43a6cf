# SPDX-License-Identifier: Apache-2.0
"""One thread owns the model; requests wait in line for its slots and get their text piece by piece.

Between two steps of decoding the thread encodes at most one video, so that what is being answered
never waits longer than that.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol

from absl import logging

from slowfast_jax.data.chat import Turn, encode_prompt
from slowfast_jax.errors import UserError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sessions import SessionStore, VideoSession
from slowfast_jax.generate.slots import Progress, Request
from slowfast_jax.generate.text import TextPieces
from slowfast_jax.serve.errors import ApiError, bad_request, overloaded
from slowfast_jax.serve.media import Medium
from slowfast_jax.serve.metrics import Metrics


class SlotsLike(Protocol):
  """What the scheduler needs of `generate.slots.Slots`."""

  @property
  def free(self) -> int: ...

  def add(self, request: Request) -> int: ...

  def step(self) -> list[Progress]: ...

  def release(self, slot: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Ask:
  """What a client wants to know.

  Attributes:
    turns: the conversation.
    media: its images and videos, in order.
    token_limit: tokens of the answer; None: as many as fit.
    temperature, top_p, top_k, seed: see `generate.slots.Request`.
    stop: strings that end the answer.
  """

  turns: Sequence[Turn]
  media: Sequence[Medium] = ()
  token_limit: int | None = None
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  seed: int = 0
  stop: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of an answer.

  Attributes:
    text: what is new.
    finish: why the answer has ended; None while it goes on.
    prompt_tokens: decoder positions of the prompt.
    new_tokens: of the answer so far.
  """

  text: str
  finish: Literal["stop", "length"] | None
  prompt_tokens: int
  new_tokens: int


Emit = Callable[[Piece | ApiError], None]


class Ticket:
  """A request on its way through the scheduler."""

  def __init__(self, ask: Ask, ids: Sequence[int], pieces: TextPieces, emit: Emit, deadline: float):
    self.ask, self.ids, self.pieces, self.emit = ask, ids, pieces, emit
    self.created, self.deadline = time.monotonic(), deadline
    self.sessions: list[VideoSession] = []
    self.new_ids: list[int] = []
    self.cancelled = False

  @property
  def prompt_tokens(self) -> int:
    return len(self.ids) - len(self.sessions) + sum(s.num_fast for s in self.sessions)


class Scheduler:
  """Runs requests on the slots of an engine.

  Args:
    engine: the model.
    slots: its slots; nobody else may use them.
    sessions: encoded videos.
    metrics: what to count in.
    text_length: decoder positions of a slot.
    token_limit: the most new tokens of an answer.
    queue: requests that may wait.
    seconds: that a request may take.

  Attributes:
    sessions_bytes: of the encoded videos that are kept.
  """

  def __init__(
    self,
    engine: Engine,
    slots: SlotsLike,
    sessions: SessionStore,
    metrics: Metrics,
    *,
    text_length: int,
    token_limit: int,
    queue: int,
    seconds: float,
  ):
    self._engine, self._slots, self._sessions = engine, slots, sessions
    self._metrics, self._text_length = metrics, text_length
    self._token_limit, self._queue, self._seconds = token_limit, queue, seconds
    self._changed = threading.Condition()
    self._waiting: collections.deque[Ticket] = collections.deque()
    self._running: dict[int, Ticket] = {}
    self._calls: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
    self._encoded = self.sessions_bytes = 0
    self._stopping = False
    self._thread = threading.Thread(target=self._run, name="model", daemon=True)

  def __enter__(self) -> "Scheduler":
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    """Finishes what was submitted, then stops."""
    with self._changed:
      self._stopping = True
      self._changed.notify()
    self._thread.join()

  @property
  def alive(self) -> bool:
    return self._thread.is_alive() and not self._stopping

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def running(self) -> int:
    return len(self._running)

  @property
  def idle(self) -> bool:
    return not (self._waiting or self._running or self._calls)

  def submit(self, ask: Ask, emit: Emit) -> Ticket:
    """Puts a request in line. `emit` gets its pieces, the last with `finish`, or an error.

    Raises:
      ApiError: the line is full, or the request cannot be one for this model.
    """
    try:
      engine = self._engine
      ids = encode_prompt(engine.tokenizer, ask.turns, engine.export.system, len(ask.media))
    except UserError as error:
      raise bad_request(str(error), "messages") from error
    pieces = TextPieces(self._engine.tokenizer, ask.stop)
    ticket = Ticket(ask, ids, pieces, emit, time.monotonic() + self._seconds)
    with self._changed:
      self.check_room()
      self._waiting.append(ticket)
      self._changed.notify()
    return ticket

  def check_room(self) -> None:
    """
    Raises:
      ApiError: 503, the line is full or the server stops.
    """
    if self._stopping:
      raise overloaded("The server is stopping.", "stopping")
    if len(self._waiting) >= self._queue:
      raise overloaded(f"{self._queue} requests are waiting already.", "queue_full")

  def cancel(self, ticket: Ticket) -> None:
    """The client has gone: nothing more is computed for it."""
    with self._changed:
      ticket.cancelled = True
      self._changed.notify()

  def call(self, function: Callable[[], Any]) -> Future:
    """Runs a function on the model's thread, between two steps."""
    future: Future = Future()
    with self._changed:
      self._calls.append((future, function))
      self._changed.notify()
    return future

  def session(self, medium: Medium) -> VideoSession:
    """The encoded medium. For the model's thread alone: see `call`."""
    session = self._sessions.get(medium.key, lambda: self._encode(medium))
    self.sessions_bytes = self._sessions.bytes
    return session

  def forget(self, keys: Sequence[str]) -> None:
    """Forgets encoded media. For the model's thread alone: see `call`."""
    for key in keys:
      self._sessions.evict(key)
    self.sessions_bytes = self._sessions.bytes

  def _run(self) -> None:
    while self._wait():
      self._drop()
      self._admit()
      self._step()
      self._call()

  def _wait(self) -> bool:
    """Sleeps until there is work; False when there will be none."""
    with self._changed:
      self._changed.wait_for(lambda: self._stopping or not self.idle)
      return not (self._stopping and self.idle)

  def _drop(self) -> None:
    """Forgets those whose client or time has gone."""
    now = time.monotonic()
    with self._changed:
      gone = [t for t in self._waiting if t.cancelled or now > t.deadline]
      for ticket in gone:
        self._waiting.remove(ticket)
    for ticket in gone:
      self._fail(ticket, overloaded("The request waited for too long.", "queue_timeout"))
    for slot, ticket in list(self._running.items()):
      if ticket.cancelled or now > ticket.deadline:
        self._release(slot)
        message = f"The answer took longer than {self._seconds:g} seconds."
        self._fail(ticket, ApiError(504, message, "timeout"))

  def _admit(self) -> None:
    """Fills free slots, until one video was encoded."""
    encoded = False
    while self._slots.free and self._waiting and not encoded:
      ticket = self._waiting[0]  # Only this thread takes any out.
      try:
        encoded = self._prepare(ticket)
        if len(ticket.sessions) < len(ticket.ask.media):
          return  # Its turn goes on after a step of the others.
        self._running[self._slots.add(self._request(ticket))] = ticket
        self._metrics.tokens.labels("prompt").inc(ticket.prompt_tokens)
      except Exception as error:
        self._fail(ticket, self._explained(error))
      with self._changed:
        self._waiting.popleft()

  def _prepare(self, ticket: Ticket) -> bool:
    """Finds the ticket's media, up to one that is encoded now; returns whether one was."""
    before = self._encoded
    while len(ticket.sessions) < len(ticket.ask.media) and self._encoded == before:
      ticket.sessions.append(self.session(ticket.ask.media[len(ticket.sessions)]))
    return self._encoded > before

  def _encode(self, medium: Medium) -> VideoSession:
    self._encoded += 1
    with self._metrics.encode.time():
      session = self._engine.encode(medium.frames.images)
      session.fast.block_until_ready()
    return session

  def _request(self, ticket: Ticket) -> Request:
    ask, room = ticket.ask, self._text_length - ticket.prompt_tokens
    if room < 1 or (ask.token_limit or 0) > room:
      raise bad_request(
        f"The messages take {ticket.prompt_tokens} tokens, images and videos included, and the "
        f"answer may take {ask.token_limit or 1}; there is room for {self._text_length}. Send "
        "shorter messages or ask for a shorter answer.",
        "messages" if room < 1 else "max_tokens",
        "context_length_exceeded",
      )
    limit = min(room, self._token_limit) if ask.token_limit is None else ask.token_limit
    return Request(
      ticket.ids,
      ticket.sessions or None,
      limit,
      temperature=ask.temperature,
      top_p=ask.top_p,
      top_k=ask.top_k,
      seed=ask.seed,
    )

  def _step(self) -> None:
    if not self._running:
      return
    try:
      for part in self._slots.step():
        self._advance(part)
    except Exception as error:
      for slot, ticket in list(self._running.items()):
        self._release(slot)
        self._fail(ticket, self._explained(error))

  def _advance(self, part: Progress) -> None:
    ticket = self._running[part.slot]
    if part.ids and not ticket.new_ids:
      self._metrics.first_token.observe(time.monotonic() - ticket.created)
    ticket.new_ids += part.ids
    self._metrics.tokens.labels("answer").inc(len(part.ids))
    text = ticket.pieces.update(ticket.new_ids, final=part.finish is not None)
    finish = "stop" if ticket.pieces.stopped else part.finish
    if finish is not None:
      del self._running[part.slot]
      if part.finish is None:
        self._slots.release(part.slot)
    if text or finish:
      ticket.emit(Piece(text, finish, ticket.prompt_tokens, len(ticket.new_ids)))

  def _release(self, slot: int) -> None:
    del self._running[slot]
    self._slots.release(slot)

  def _fail(self, ticket: Ticket, error: ApiError) -> None:
    if not ticket.cancelled:
      ticket.emit(error)

  def _explained(self, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
      return error
    if isinstance(error, UserError):
      return bad_request(str(error), "messages")
    logging.exception("The model failed: %s", error)
    return ApiError(500, "The model failed; the server's log says why.", "internal_error")

  def _call(self) -> None:
    with self._changed:
      calls, self._calls = list(self._calls), collections.deque()
    for future, function in calls:
      try:
        future.set_result(function())
      except Exception as error:
        future.set_exception(error)
