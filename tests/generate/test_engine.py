# SPDX-License-Identifier: Apache-2.0
"""Cached decoding equals a full forward pass, and samples of a batch do not touch each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.errors import UserError
from slowfast_jax.generate import programs
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sampling import make_sampling
from slowfast_jax.models.cache import FlatCache
from slowfast_jax.sharding import make_mesh
from tests.generate.tiny import TOKENIZER, frames, full_logits, make_export

QUESTION, LONGER = "What was it?", "What colour was the circle, and where was the other one?"
NEW = 32
NEVER = (-1, -1)


def make_engine(export, *arguments, **options):
  """An engine that goes on to the last token: a random model stops anywhere."""
  engine = Engine(export, *arguments, **options)
  engine.stop_ids = NEVER
  return engine


@pytest.fixture(scope="module")
def engine():
  return make_engine(make_export())


def cached_logits(engine, prompts, sessions, replies, cross=True):
  """Scores of the token after each token of the replies, from the cache."""
  built, visual = engine.build(prompts, sessions)
  rows = len(built.lengths)
  state = engine.prefill(
    prompts=built,
    visual=visual,
    sampling=make_sampling(rows),
    stop_ids=np.array(NEVER),
    max_new_tokens=NEW,
    cache_length=built.tokens.shape[1] + NEW,
  )
  tokens = np.zeros((rows, NEW), np.int32)
  tokens[: len(replies)] = replies
  if not cross:
    visual = dataclasses.replace(visual, kv=None)
  state = dataclasses.replace(state, cache=FlatCache.of(state.cache, turned=len(state.lengths) > 1))
  step = engine.compiled(programs.decode_logits, apart=True)
  found = []
  for i in range(1, NEW):
    state = dataclasses.replace(state, tokens=jnp.asarray(tokens), counts=jnp.full(rows, i))
    logits, cache = step(state=state, visual=visual)
    state = dataclasses.replace(state, cache=cache)
    found.append(np.asarray(logits))
  return np.stack(found, axis=1)[: len(replies)]


@pytest.mark.parametrize("queries", ["text-only", "text-only-masksystem", "all"])
def test_cached_decoding_is_the_full_forward_pass(queries):
  export = make_export(queries)
  engine = make_engine(export)
  pixels = frames(8, 1)
  session = engine.encode(pixels)
  ids = engine.prompt_ids(QUESTION, session)
  (reply,) = engine.generate([ids], [session], NEW)
  assert len(set(reply)) > 2
  full = full_logits(export, [*ids, *reply], pixels)[-NEW - 1 :]
  np.testing.assert_array_equal(np.argmax(full[:-1], axis=-1), reply)
  cached = cached_logits(engine, [ids], [session], [reply])
  np.testing.assert_allclose(cached[0], full[1:-1], atol=1e-5, rtol=1e-5)


def test_without_cross_attention_new_tokens_read_nothing(engine):
  pixels = frames(8, 1)
  session = engine.encode(pixels)
  ids = engine.prompt_ids(QUESTION, session)
  (reply,) = engine.generate([ids], [session], NEW, decode_cross_attention=False)
  full = full_logits(engine.export, [*ids, *reply], pixels, silent_from=len(ids))[-NEW - 1 :]
  np.testing.assert_array_equal(np.argmax(full[:-1], axis=-1), reply)
  cached = cached_logits(engine, [ids], [session], [reply], cross=False)
  np.testing.assert_allclose(cached[0], full[1:-1], atol=1e-5, rtol=1e-5)
  assert engine.generate([ids], [session], NEW) != [reply]


def mixed(engine):
  """Two videos of different lengths, a still image, and two texts."""
  videos = [frames(8, 1), frames(5, 2), frames(1, 3), None, None]
  sessions = [None if v is None else engine.encode(v) for v in videos]
  questions = [LONGER, QUESTION, QUESTION, LONGER, "Where?"]
  prompts = [engine.prompt_ids(q, s) for q, s in zip(questions, sessions)]
  return prompts, sessions, videos


def test_samples_of_a_batch_equal_each_alone(engine):
  prompts, sessions, videos = mixed(engine)
  replies = engine.generate(prompts, sessions, NEW)
  together = cached_logits(engine, prompts, sessions, replies)
  for i, (ids, pixels) in enumerate(zip(prompts, videos)):
    full = full_logits(engine.export, [*ids, *replies[i]], pixels)[-NEW - 1 :]
    np.testing.assert_array_equal(np.argmax(full[:-1], axis=-1), replies[i])
    np.testing.assert_allclose(together[i], full[1:-1], atol=1e-5, rtol=1e-5, err_msg=f"sample {i}")


def test_the_slow_path_matters(engine):
  pixels = frames(8, 1)
  seen, hidden = engine.encode(pixels), engine.encode(pixels, zero_slow=True)
  np.testing.assert_array_equal(seen.fast, hidden.fast)
  ids = engine.prompt_ids(QUESTION, seen)
  assert engine.generate([ids], [seen], NEW) != engine.generate([ids], [hidden], NEW)


def test_a_model_without_hybrid_layers_answers():
  engine = make_engine(make_export(hybrid=False))
  session = engine.encode(frames(8, 1))
  assert session.kv is None
  hidden = engine.encode(frames(8, 1), zero_slow=True)
  ids = engine.prompt_ids(QUESTION, session)
  text = engine.prompt_ids(QUESTION, None)
  replies = [engine.generate([ids, text], [s, None], 4) for s in (session, hidden)]
  assert replies[0] == replies[1]
  assert [len(reply) for reply in replies[0]] == [4, 4]
  with pytest.raises(UserError, match="no hybrid layers"):
    engine.slow_attention(ids, session)


def test_normalised_frames_equal_pixels(engine):
  pixels = frames(5, 2)
  normalised = (pixels / 127.5 - 1).astype(np.float32)
  a, b = engine.encode(pixels), engine.encode(normalised)
  np.testing.assert_allclose(a.slow[:, :5], b.slow[:, :5], atol=1e-5)
  np.testing.assert_allclose(a.fast[:, : a.num_fast], b.fast[:, : b.num_fast], atol=1e-5)


def test_a_long_video_is_encoded_in_chunks(engine):
  """Each frame for itself, as if it stood in a short video."""
  pixels = frames(40, 3)
  long = engine.encode(pixels)
  parts = [engine.encode(part).slow for part in np.split(pixels, 5)]
  np.testing.assert_allclose(long.slow[:, :40], np.concatenate(parts, axis=1), atol=1e-5)


def test_other_questions_of_a_bucket_compile_nothing(engine):
  session = engine.encode(frames(8, 1))
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else 0
  )
  prompts = [engine.prompt_ids(q, session) for q in (QUESTION, LONGER)]
  assert len(prompts[0]) < len(prompts[1]) <= 64
  engine.generate(prompts[:1], [session], NEW)
  compiled.clear()
  engine.generate(prompts[1:], [engine.encode(frames(8, 9))], NEW - 3, temperature=1.0)
  list(engine.stream(LONGER, session, NEW - 5))
  assert not compiled
  list(engine.stream(LONGER * 4, session, NEW))
  assert compiled


def test_it_stops_at_the_stop_token(engine, monkeypatch):
  prompts, sessions, _ = mixed(engine)
  replies = engine.generate(prompts, sessions, NEW)
  stop = next(token for token in replies[0] if token != replies[0][0])
  monkeypatch.setattr(engine, "stop_ids", (stop, stop))
  cut = [r[: r.index(stop) + 1] if stop in r else r for r in replies]
  assert len(cut[0]) < NEW
  assert engine.generate(prompts, sessions, NEW) == cut
  assert "".join(engine.stream(LONGER, sessions[0], NEW)) == TOKENIZER.decode(cut[0])


def test_a_stream_is_the_answer_in_pieces(engine):
  session = engine.encode(frames(8, 1))
  pieces = list(engine.stream(QUESTION, session, NEW, temperature=1.0, seed=3))
  assert len(pieces) > 1
  assert ["".join(pieces)] == engine.answer([QUESTION], [session], NEW, temperature=1.0, seed=3)
  assert "".join(engine.stream(QUESTION, session, 1)) == engine.answer([QUESTION], [session], 1)[0]


def test_nothing_is_computed_past_stop_strings(engine, monkeypatch):
  sessions = [engine.encode(frames(8, 1)), None]
  whole = engine.answer([QUESTION, LONGER], sessions, NEW)
  stop = [text[2:4] for text in whole]
  assert all(len(text) > 12 and two.strip() for text, two in zip(whole, stop))
  calls, decode = [], engine._decode
  monkeypatch.setattr(engine, "_decode", lambda **args: calls.append(args) or decode(**args))
  cut = engine.answer([QUESTION, LONGER], sessions, NEW, stop=stop)
  assert cut == [min((text.split(s)[0] for s in stop), key=len) for text in whole]
  ended = [np.count_nonzero(call["limits"] == 0) for call in calls]
  assert len(calls) * 4 < NEW
  # A row that has ended stands still while the other goes on.
  assert ended == sorted(ended)


def test_samples_depend_on_prompt_and_seed_alone(engine):
  prompts, sessions, _ = mixed(engine)
  options = {"temperature": 1.0, "top_p": 0.95}
  together = engine.generate(prompts, sessions, NEW, seed=[5, 6, 7, 8, 9], **options)
  assert together == engine.generate(prompts, sessions, NEW, seed=[5, 6, 7, 8, 9], **options)
  alone = engine.generate(prompts[-1:], sessions[-1:], NEW, seed=9, **options)
  assert alone == together[-1:]
  assert alone != engine.generate(prompts[-1:], sessions[-1:], NEW, seed=5, **options)


@pytest.mark.parametrize("other", ["fsdp", "context"])
def test_a_mesh_changes_nothing(engine, other):
  prompts, sessions, videos = mixed(engine)
  replies = engine.generate(prompts, sessions, NEW)
  mesh = make_mesh({"data": 2, other: 2, "tensor": 2})
  wide = make_engine(make_export(), mesh, batch_size=6)
  sessions = [None if v is None else wide.encode(v) for v in videos]
  built, _ = wide.build(prompts, sessions, 6)
  assert len(built.lengths) == {"fsdp": 8, "context": 6}[other]
  assert len(built.tokens.sharding.device_set) == 8
  assert wide.generate(prompts, sessions, NEW) == replies


def test_what_does_not_fit_is_named(engine):
  session = engine.encode(frames(8, 1))
  with pytest.raises(UserError, match=r"Sample 0 has 1 placeholder.* and 0 video"):
    engine.generate([[1, IMAGE_TOKEN]], [None])
  with pytest.raises(UserError, match=r"Sample 0 has 0 placeholder.* and 1 video"):
    engine.generate([[1, 2]], [session])
  with pytest.raises(UserError, match="one session a prompt, got 2 and 1"):
    engine.generate([[1, 2]], [None, None])
  for number in (1, 3):
    with pytest.raises(UserError, match=f"one session a question, got {number} and 2"):
      engine.answer([QUESTION, LONGER], [None] * number)
  with pytest.raises(UserError, match="Sample 1 is empty"):
    engine.generate([[1], []], [None, None])
  with pytest.raises(UserError, match="max_new_tokens must be at least 1, got 0"):
    engine.generate([[1]], [None], 0)
  with pytest.raises(UserError, match=r"\[F, 16, 16, 3\].* got \[2, 8, 8, 3\]"):
    engine.encode(np.zeros((2, 8, 8, 3), np.uint8))
  assert engine.generate([], []) == []
