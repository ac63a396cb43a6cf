# SPDX-License-Identifier: Apache-2.0
"""A server on eight devices gives the answers of one device, whoever asks at the same time."""

import contextlib

import numpy as np

import slowfast_jax as sf
from slowfast_jax.generate.sessions import SessionStore
from slowfast_jax.generate.slots import Slots
from slowfast_jax.serve.decode import DecodedMedia
from slowfast_jax.serve.media import Medium
from slowfast_jax.serve.metrics import Metrics
from slowfast_jax.serve.scheduler import Ask, Scheduler
from slowfast_jax.sharding import make_mesh
from tests.generate.tiny import frames
from tests.serve.test_scheduler import Reader

NEVER = (-1, -1)  # A random model stops anywhere.
LENGTH, NEW = 160, 8
# Two videos, one asked twice, and texts: more than there are slots.
PIXELS = [frames(8, 1), frames(5, 2)]
ASKED = [("What was it?", 0), ("Where?", None), ("Who was it?", 1), ("Which?", 0), ("Why?", None)]


def ask(i, question, video):
  media = () if video is None else (medium(video),)
  return Ask([{"from": "human", "value": question}], media, NEW, temperature=0.8 * (i % 2), seed=i)


def medium(video):
  pixels = PIXELS[video]
  return Medium(f"video-{video}", DecodedMedia(pixels, np.arange(len(pixels)) / 2.0, 4.0))


@contextlib.contextmanager
def scheduling(engine):
  """The server's own parts behind the HTTP interface, with four slots."""
  slots = Slots(engine, 4, text_length=LENGTH, slow_length=32)
  options = {"text_length": LENGTH, "token_limit": NEW, "queue": 9, "seconds": 300.0}
  with Scheduler(engine, slots, SessionStore(engine, 10**7), Metrics(), **options) as scheduler:
    yield scheduler


def test_eight_devices_answer_as_one(files):
  alone = sf.load(files.export).engine
  alone.stop_ids = NEVER
  sessions = [alone.encode(pixels) for pixels in PIXELS]
  expected = [
    alone.answer(
      [question],
      [None if video is None else sessions[video]],
      NEW,
      temperature=0.8 * (i % 2),
      seed=i,
    )[0]
    for i, (question, video) in enumerate(ASKED)
  ]
  assert len(set(expected)) == len(ASKED)
  wide = sf.load(files.export, mesh=make_mesh({"data": 2, "context": 2, "tensor": 2})).engine
  wide.stop_ids = NEVER
  with scheduling(wide) as scheduler:
    readers = [Reader() for _ in ASKED]
    for i, reader in enumerate(readers):
      scheduler.submit(ask(i, *ASKED[i]), reader)
    found = [reader.last(seconds=120)[0] for reader in readers]
  assert found == expected
