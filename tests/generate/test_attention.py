# SPDX-License-Identifier: Apache-2.0
"""The attention that is shown is the attention that was used, and its picture can be drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slowfast_jax.generate.attention import SlowAttention
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.programs import embed_prompts, query_of
from slowfast_jax.generate.timeline import Timeline, draw_timeline
from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.slowfast import graphdef_of
from tests.generate.tiny import frames, make_export

QUESTION = "What was it?"
REPLY = [5, 6, 7]


@pytest.fixture(scope="module")
def engine():
  return Engine(make_export())


@pytest.fixture(scope="module")
def session(engine):
  return engine.encode(frames(5, 2))


def test_it_is_what_a_hand_computation_gives(engine, session):
  """Queries and outputs caught in the hooks, and the softmax of each row in plain NumPy."""
  ids = engine.prompt_ids(QUESTION, session)
  seen = engine.slow_attention(ids, session, REPLY)
  prompts, visual = engine.build([[*ids, *REPLY]], [session])
  model = nnx.merge(graphdef_of(engine.export.model), engine.params)
  n, T = int(prompts.lengths[0]), prompts.tokens.shape[1]

  @jax.jit
  def caught_in_the_hooks():
    caught = []

    def catch(read):
      return lambda q, o: caught.append((q, o)) or read(q, o)

    query = query_of(prompts.text_index, visual)
    readers = {depth: catch(read) for depth, read in model.readers(visual.kv, query).items()}
    x = embed_prompts(model, prompts, visual)
    mask = Causal((jnp.arange(T) < n).astype(jnp.int32)[None])
    model.decoder(x, jnp.arange(T)[None], mask, readers=readers)
    return caught

  positions = np.flatnonzero((np.asarray(prompts.kind[0]) == 1) & (np.arange(T) < n))
  assert seen.weights.shape == (2, 4, len(positions), 5)
  assert seen.layers == (0, 2)
  for a, (q, o) in enumerate(jax.device_get(caught_in_the_hooks())):
    q = q[0].astype(np.float64)
    keys = np.asarray(visual.kv.k[a, 0, : 5 * 4], np.float64)
    for head in range(4):
      logits = q[positions, head] @ keys[:, head // 2].T / np.sqrt(8)
      weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      by_frame = weights.reshape(len(positions), 5, 4).sum(-1)
      np.testing.assert_allclose(seen.weights[a, head], by_frame, atol=1e-5)
    gate = model.adapters.gate
    g = np.einsum("XNH,NH->X", o[0][positions], gate.kernel[a, ..., 0]) + gate.bias[a]
    alpha = np.tanh(float(model.adapters.warm_up[a, 0]))
    np.testing.assert_allclose(seen.gates[a], np.abs(np.tanh(g) * alpha), atol=1e-5)


def test_it_sums_to_one(engine, session):
  seen = engine.slow_attention(engine.prompt_ids(QUESTION, session), session)
  np.testing.assert_allclose(seen.weights.sum(-1), 1, atol=1e-5)
  assert seen.profile().sum() == pytest.approx(1)
  assert (seen.gates > 0).all()


def test_it_knows_question_and_reply(engine, session):
  tokenizer = engine.tokenizer
  seen = engine.slow_attention(engine.prompt_ids(QUESTION, session), session, REPLY)
  assert tokenizer.decode(seen.tokens[seen.question]) == f"\n{QUESTION}\nassistant\n"
  assert seen.tokens[seen.reply].tolist() == REPLY
  turns = [
    {"from": "human", "value": QUESTION},
    {"from": "gpt", "value": "A circle."},
    {"from": "human", "value": "Where?"},
  ]
  later = engine.slow_attention(engine.prompt_ids(turns, session), session)
  assert tokenizer.decode(later.tokens[later.question]) == "user\nWhere?\nassistant\n"
  assert not later.reply.any()


def test_a_reply_does_not_change_what_the_question_read(engine, session):
  ids = engine.prompt_ids(QUESTION, session)
  without, with_reply = (engine.slow_attention(ids, session, r) for r in ((), REPLY))
  np.testing.assert_allclose(without.profile(), with_reply.profile(), atol=1e-6)


def test_the_profile_is_the_relevance_by_frame():
  # One layer, one head; the last frame speaks against the answer more than for it.
  relevance = np.array([[[[4, 0, 0], [-1, 1, 2], [0, 0, -3]]]], np.float32)
  all_of_them = np.ones(3, bool)
  seen = SlowAttention(
    np.full_like(relevance, 1 / 3),
    np.ones((1, 3), np.float32),
    np.arange(3),
    all_of_them,
    ~all_of_them,
    layers=(0,),
    relevance=relevance,
  )
  np.testing.assert_allclose(seen.profile(), [0.75, 0.25, 0], atol=1e-6)
  nothing = dataclasses.replace(seen, relevance=0 * relevance)
  np.testing.assert_allclose(nothing.profile(), [1 / 3] * 3, atol=1e-6)


def test_relevance_sums_to_what_the_slow_path_adds(engine, session):
  """Completeness of integrated gradients: log p with the slow path, less log p without it."""
  ids = engine.prompt_ids(QUESTION, session)
  seen = engine.slow_attention(ids, session)
  prompts, visual = engine.build([ids], [session])
  last, graphdef = int(prompts.lengths[0]) - 1, graphdef_of(engine.export.model)

  @jax.jit
  def log_probs(visual):
    model = nnx.merge(graphdef, engine.params)
    readers = model.readers(visual.kv, query_of(prompts.text_index, visual))
    x = embed_prompts(model, prompts, visual)
    T = x.shape[1]
    mask = Causal((jnp.arange(T) <= last).astype(jnp.int32)[None])
    hidden, _ = model.decoder(x, jnp.arange(T)[None], mask, readers=readers)
    return jax.nn.log_softmax(model.decoder.logits(hidden[0, last]))

  silent = dataclasses.replace(visual.kv, v=jnp.zeros_like(visual.kv.v))
  full = log_probs(visual)
  answer = int(jnp.argmax(full))
  added = float(full[answer] - log_probs(dataclasses.replace(visual, kv=silent))[answer])
  assert abs(added) > 1e-3
  assert seen.relevance.sum() == pytest.approx(added, rel=0.02)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_picture_marks_peak_and_events(count):
  times = np.linspace(0, 9, count).astype(np.float32)
  profile = np.full(count, 1 / count, np.float32)
  timeline = Timeline(frames(count, 0), times, 10.0, profile, QUESTION, "", ((4.0, 5.0),))
  picture = draw_timeline(timeline)
  assert picture.mode == "RGB"
  assert picture.width == 1440
  events = draw_timeline(dataclasses.replace(timeline, windows=()))
  assert picture.size == events.size
  changed = np.flatnonzero((np.asarray(picture) != np.asarray(events)).any((0, 2)))
  middle = [48 + 1344 * t / 10 for t in (4, 5)]
  assert np.isin(np.arange(round(middle[0]) + 2, round(middle[1]) - 2), changed).all()


def test_a_long_question_does_not_fill_the_picture():
  timeline = Timeline(
    frames(4, 0),
    np.arange(4, dtype=np.float32),
    4.0,
    np.full(4, 0.25, np.float32),
    "word " * 900,
    "",
  )
  assert draw_timeline(timeline).height < 800
