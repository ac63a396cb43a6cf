# SPDX-License-Identifier: Apache-2.0
"""Requests in slots come and go; none changes another's tokens, and nothing compiles anew."""

import jax
import pytest

from slowfast_jax.errors import UserError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.slots import Request, Slots
from tests.generate.tiny import frames, make_export

NEVER = (-1, -1)
ROOM = {"text_length": 160, "slow_length": 32}
# Two videos of different lengths, a still image, and two texts.
VIDEOS = [frames(8, 1), frames(5, 2), frames(1, 3), None, None]
QUESTIONS = [
  "What colour was the circle?",
  "What was it?",
  "Where?",
  "Who was it?",
  "Where was it?",
]


def make_engine():
  engine = Engine(make_export())
  engine.stop_ids = NEVER  # A random model stops anywhere.
  return engine


@pytest.fixture(scope="module")
def engine():
  return make_engine()


@pytest.fixture(scope="module")
def slots(engine):
  slots = Slots(engine, 3, **ROOM)
  slots.warm_up(longest_text=64)
  return slots


def make_requests(engine, sampled=False):
  sessions = [None if v is None else engine.encode(v) for v in VIDEOS]
  return [
    Request(engine.prompt_ids(question, session), session, 9 + 5 * i, 0.8 * sampled, 0.95, 50, i)
    for i, (question, session) in enumerate(zip(QUESTIONS, sessions))
  ]


def generate(engine, r):
  options = {"temperature": r.temperature, "top_p": r.top_p, "top_k": r.top_k, "seed": r.seed}
  return engine.generate([r.ids], [r.sessions], r.max_new_tokens, **options)[0]


def serve(slots, requests):
  """All requests, each added as soon as a slot is free; replies and why they ended."""
  waiting, running = list(enumerate(requests)), {}
  replies, finishes = [[] for _ in requests], {}
  while waiting or running:
    while waiting and slots.free:
      index, request = waiting.pop(0)
      running[slots.add(request)] = index
    for progress in slots.step():
      index = running[progress.slot]
      replies[index] += progress.ids
      if progress.finish is not None:
        finishes[index] = progress.finish
        del running[progress.slot]
  assert slots.step() == []
  return replies, [finishes[i] for i in range(len(requests))]


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_are_those_of_each_request_alone(engine, slots, sampled):
  requests = make_requests(engine, sampled)
  alone = [generate(engine, request) for request in requests]
  assert serve(slots, requests) == (alone, ["length"] * 5)
  # In other company, and in slots where others were before.
  assert serve(slots, requests[::-1]) == (alone[::-1], ["length"] * 5)


def test_twenty_questions_on_three_videos_compile_nothing(engine, slots):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else 0
  )
  # The videos are encoded here too.
  sessions = [engine.encode(frames(count, count)) for count in (8, 6, 3)]
  prompts = [engine.prompt_ids("a" * i, sessions[0]) for i in range(20)]
  assert len({len(ids) for ids in prompts}) == 20
  assert max(map(len, prompts)) <= 64
  serve(slots, [Request(ids, sessions[i % 3], 4 + i % 7) for i, ids in enumerate(prompts)])
  assert not compiled
  jax.jit(lambda x: x + 2)(1)
  assert compiled  # They are counted.


def test_a_reply_ends_at_a_stop_token(engine, slots, monkeypatch):
  request = make_requests(engine)[0]
  reply = generate(engine, request)
  stop = next(token for token in reply if token != reply[0])
  monkeypatch.setattr(engine, "stop_ids", (stop, stop))
  expected = reply[: reply.index(stop) + 1]
  assert serve(slots, [request]) == ([expected], ["stop"])
  monkeypatch.setattr(engine, "stop_ids", (reply[0], stop))
  assert serve(slots, [request]) == ([reply[:1]], ["stop"])


def test_a_step_that_fails_costs_the_requests_of_its_slots_alone(engine, slots, monkeypatch):
  request = make_requests(engine)[0]

  def fail(*, state, **_):
    for leaf in jax.tree.leaves(state):
      leaf.delete()  # As XLA does with what a program was given for good.
    raise RuntimeError("out of memory")

  with monkeypatch.context() as patch:
    patch.setattr(slots, "_decode", fail)
    failed = slots.add(request)
    with pytest.raises(RuntimeError, match="out of memory"):
      slots.step()
    slots.release(failed)
  assert serve(slots, [request]) == ([generate(engine, request)], ["length"])


def test_a_released_slot_is_free_and_leaves_nothing_behind(engine, slots):
  first, second, *_ = make_requests(engine)
  slot, other = slots.add(first), slots.add(second)
  slots.step()
  slots.release(slot)
  assert slots.free == 2
  assert {progress.slot for progress in slots.step()} == {other}
  assert slots.add(first) == slot
  slots.release(other)
  found = []
  while slots.free < 3:
    found += [token for progress in slots.step() for token in progress.ids]
  assert found == generate(engine, first)


def test_a_step_is_over_the_rows_that_are_in_use(engine, slots, monkeypatch):
  (*_, first, second), stepped = make_requests(engine), []
  decode = slots._decode
  monkeypatch.setattr(slots, "_decode", lambda **a: stepped.append(a["rows"]) or decode(**a))
  slots.add(first)
  slots.step()
  other = slots.add(second)
  slots.step()
  slots.release(other)
  while slots.free < 3:
    slots.step()
  assert stepped[:2] == [1, 3]
  assert set(stepped[2:]) == {1}


def test_what_does_not_fit_is_named(engine, slots):
  session = engine.encode(frames(8, 1))
  with pytest.raises(UserError, match="its reply up to 200, and there is room for 160"):
    slots.add(Request([1, 2], None, 200))
  with pytest.raises(UserError, match="64 slow tokens and there is room for 32"):
    slots.add(Request([1, -200, -200], [session, session], 2))
  with pytest.raises(UserError, match="max_new_tokens must be at least 1, got 0"):
    slots.add(Request([1, 2], None, 0))
  with pytest.raises(UserError, match="top_p"):
    slots.add(Request([1, 2], None, 1, 1.0, 2.0))
  with pytest.raises(UserError, match="1 placeholder"):
    slots.add(Request([1, -200], None, 2))
  with pytest.raises(UserError, match="count must be at least 1, got 0"):
    Slots(engine, 0, **ROOM)
  assert slots.free == 3
  for _ in range(3):
    slots.add(Request([1, 2], None, 4))
  with pytest.raises(UserError, match="All 3 slots are in use"):
    slots.add(Request([1, 2], None, 4))
  for slot in range(3):
    slots.release(slot)
