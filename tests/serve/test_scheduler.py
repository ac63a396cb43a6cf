# SPDX-License-Identifier: Apache-2.0
"""The line before the slots: bounded, timed, and with nobody in it whom nobody waits for."""

import asyncio
import dataclasses
import json
import queue
import threading
import time

import numpy as np
import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.generate.slots import Progress
from slowfast_jax.serve.app import Service, make_app
from slowfast_jax.serve.decode import DecodedMedia
from slowfast_jax.serve.errors import ApiError
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import Medium
from slowfast_jax.serve.metrics import Metrics
from slowfast_jax.serve.scheduler import Ask, Scheduler
from tests.generate.tiny import TOKENIZER

REPLY = TOKENIZER.encode("The circle was red.")


@dataclasses.dataclass
class Session:
  """An encoded medium, as far as the scheduler looks at it."""

  num_fast: int = 3

  @property
  def fast(self):
    return self

  def block_until_ready(self):
    pass


class Engine:
  """Encodes when it is told that it may."""

  def __init__(self):
    self.tokenizer, self.export = TOKENIZER, self
    self.system = "Be brief."
    self.events = []

  def encode(self, images):
    self.events.append("encode")
    return Session()


class Sessions:
  """Keeps everything."""

  def __init__(self):
    self.known, self.bytes = {}, 0

  def get(self, key, make):
    if key not in self.known:
      self.known[key] = make()
    return self.known[key]


class Slots:
  """Says `REPLY` a token a step; each step waits for a permit, if there is a gate."""

  def __init__(self, events, count=2, gate=None):
    self.events, self.count, self.gate = events, count, gate
    self.told, self.requests, self.released = {}, [], []
    self.error = None

  @property
  def free(self):
    return self.count - len(self.told)

  def add(self, request):
    if request.seed == 13:
      raise UserError("An unlucky seed.")
    slot = next(i for i in range(self.count) if i not in self.told)
    self.told[slot] = 0
    self.requests.append(request)
    self.events.append("add")
    return slot

  def step(self):
    if self.gate is not None:
      self.gate.acquire(timeout=10)
    if self.error is not None:
      raise self.error
    self.events.append("step")
    found = []
    for slot, told in list(self.told.items()):
      self.told[slot] = told + 1
      finish = "length" if told + 1 == len(REPLY) else None
      found.append(Progress(slot, [REPLY[told]], finish))
      if finish:
        del self.told[slot]
    return found

  def release(self, slot):
    self.released.append(slot)
    self.told.pop(slot, None)


def make(gate=None, seconds=60.0, queue_length=3):
  engine = Engine()
  slots = Slots(engine.events, gate=gate)
  scheduler = Scheduler(
    engine,
    slots,
    Sessions(),
    Metrics(),
    text_length=64,
    token_limit=32,
    queue=queue_length,
    seconds=seconds,
  )
  return engine, slots, scheduler


def ask(text="Hi", **options):
  return Ask([{"from": "human", "value": text}], **options)


def medium(name):
  frames = DecodedMedia(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.float32), 1.0)
  return Medium(name, frames)


def video_ask(*names):
  return ask("<image>" * len(names) + "Hi", media=[medium(name) for name in names])


class Reader:
  """What one client hears."""

  def __init__(self):
    self.heard = queue.Queue()

  def __call__(self, item):
    self.heard.put(item)

  def last(self, seconds=10):
    """All text, and the last piece or the error."""
    text = ""
    while True:
      item = self.heard.get(timeout=seconds)
      if isinstance(item, ApiError):
        return text, item
      text += item.text
      if item.finish:
        return text, item


def test_every_client_gets_its_own_answer_and_counts():
  _, slots, scheduler = make(queue_length=9)
  readers = [Reader() for _ in range(7)]
  with scheduler:
    tickets = [scheduler.submit(ask(), reader) for reader in readers]
    for reader, ticket in zip(readers, tickets):
      text, piece = reader.last()
      assert text == "The circle was red."
      assert (piece.finish, piece.new_tokens) == ("length", len(REPLY))
      assert piece.prompt_tokens == len(ticket.ids)
  assert not slots.told


def test_a_full_line_refuses_and_says_when_to_come_again():
  gate = threading.Semaphore(0)
  _, slots, scheduler = make(gate)
  with scheduler:
    readers = [Reader() for _ in range(5)]
    for reader in readers[:2]:
      scheduler.submit(ask(), reader)
    while slots.free:
      time.sleep(0.01)
    for reader in readers[2:]:
      scheduler.submit(ask(), reader)
    with pytest.raises(ApiError, match="3 requests are waiting") as caught:
      scheduler.submit(ask(), Reader())
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers
    gate.release(10**6)
    assert all(reader.last()[0] for reader in readers)


def test_who_has_gone_frees_its_slot_and_its_place():
  gate = threading.Semaphore(0)
  _, slots, scheduler = make(gate, queue_length=9)
  with scheduler:
    readers = [Reader() for _ in range(4)]
    tickets = [scheduler.submit(ask(), reader) for reader in readers]
    while slots.free:
      time.sleep(0.01)
    scheduler.cancel(tickets[0])
    scheduler.cancel(tickets[2])
    gate.release(10**6)
    assert readers[1].last()[0] == readers[3].last()[0] == "The circle was red."
  assert slots.released == [0]
  assert len(slots.requests) == 3
  assert all(not isinstance(item, ApiError) for item in readers[0].heard.queue)


def test_who_goes_before_a_stream_begins_frees_its_slot():
  gate = threading.Semaphore(2)
  _, slots, scheduler = make(gate)
  app = make_app(Service("tiny", scheduler, None, None, Metrics(), Limits()))
  messages = [{"role": "user", "content": "Hi"}]
  body = {"model": "tiny", "stream": True, "messages": messages}
  content = iter([json.dumps(body).encode()])

  async def receive():
    if part := next(content, None):
      return {"type": "http.request", "body": part, "more_body": False}
    await asyncio.Event().wait()

  async def send(message):
    raise OSError("the client has gone")

  scope = {
    "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
    "headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.4"},
  }  # fmt: skip
  with scheduler:
    asyncio.run(app(scope, receive, send))
    gate.release(10**6)
  assert slots.released == [0]


def test_time_runs_out_in_the_line_and_in_a_slot():
  gate = threading.Semaphore(0)
  _, slots, scheduler = make(gate, seconds=0.2)
  with scheduler:
    readers = [Reader() for _ in range(3)]
    for reader in readers:
      scheduler.submit(ask(), reader)
    time.sleep(0.3)
    gate.release(2)
    statuses = [reader.last()[1].status for reader in readers]
  assert statuses == [504, 504, 503]
  assert sorted(slots.released) == [0, 1]


def test_between_two_steps_one_video_is_encoded():
  gate = threading.Semaphore(0)
  engine, _, scheduler = make(gate, queue_length=9)
  with scheduler:
    first, second, third = Reader(), Reader(), Reader()
    scheduler.submit(ask(), first)
    while "add" not in engine.events:
      time.sleep(0.01)
    scheduler.submit(video_ask("a", "b", "a"), second)
    scheduler.submit(video_ask("b"), third)
    gate.release(10**6)
    assert all(reader.last()[0] for reader in (first, second, third))
  events = engine.events
  assert events.count("encode") == 2  # Three placeholders and two questions, two videos.
  one, two = (i for i, event in enumerate(events) if event == "encode")
  assert "step" in events[one:two]


def test_a_stop_string_ends_an_answer_and_its_slot():
  _, slots, scheduler = make()
  with scheduler:
    reader = Reader()
    scheduler.submit(ask(stop=["was"]), reader)
    text, piece = reader.last()
  assert (text, piece.finish) == ("The circle ", "stop")
  assert slots.released == [0]


def test_what_does_not_fit_is_refused_alone():
  _, _, scheduler = make(queue_length=9)
  with scheduler:
    long, unlucky, greedy, fine = (Reader() for _ in range(4))
    scheduler.submit(ask("word " * 50), long)
    scheduler.submit(ask(seed=13), unlucky)
    scheduler.submit(ask(token_limit=60), greedy)
    scheduler.submit(ask(), fine)
    assert long.last()[1].code == "context_length_exceeded"
    assert unlucky.last()[1].message == "An unlucky seed."
    error = greedy.last()[1]
    assert (error.status, error.code, error.param) == (
      400,
      "context_length_exceeded",
      "max_tokens",
    )
    assert fine.last()[0]
    with pytest.raises(ApiError, match="placeholder"):
      scheduler.submit(ask("<image> Hi"), Reader())


def test_a_model_that_fails_is_told_and_goes_on():
  _, slots, scheduler = make()
  with scheduler:
    slots.error = RuntimeError("out of memory")
    readers = [Reader(), Reader()]
    for reader in readers:
      scheduler.submit(ask(), reader)
    assert [reader.last()[1].status for reader in readers] == [500, 500]
    slots.error = None
    reader = Reader()
    scheduler.submit(ask(), reader)
    assert reader.last()[0] == "The circle was red."


def test_what_was_submitted_is_finished_before_it_stops():
  gate = threading.Semaphore(0)
  _, _, scheduler = make(gate, queue_length=9)
  readers = [Reader() for _ in range(6)]
  with scheduler:
    for reader in readers:
      scheduler.submit(ask(), reader)
    threading.Timer(0.1, lambda: gate.release(10**6)).start()
  assert [reader.last()[0] for reader in readers] == ["The circle was red."] * 6
  with pytest.raises(ApiError, match="stopping"):
    scheduler.submit(ask(), Reader())


def test_calls_run_on_the_models_thread():
  _, _, scheduler = make()
  with scheduler:
    assert scheduler.call(lambda: threading.current_thread().name).result(10) == "model"
    with pytest.raises(ZeroDivisionError):
      scheduler.call(lambda: 1 / 0).result(10)
