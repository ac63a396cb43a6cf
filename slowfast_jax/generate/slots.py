# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go while the rows of one batch decode together.

A prompt is prefilled alone, in a bucket of lengths, and copied into a free row (slot) of the batch.
Every step then takes a few new tokens of all slots at once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.errors import UserError
from slowfast_jax.generate import programs
from slowfast_jax.generate.engine import STREAM_STEPS, Engine
from slowfast_jax.generate.programs import Decoding, Visual
from slowfast_jax.generate.prompts import LEAST_TEXT, bucket
from slowfast_jax.generate.sampling import make_sampling
from slowfast_jax.generate.sessions import RowMedia, Sessions, as_tuple, fit, join
from slowfast_jax.models.cache import FlatCache, KVCache
from slowfast_jax.models.hybrid import SlowKV, SlowLayers


@dataclasses.dataclass(frozen=True)
class Request:
  """What one slot is asked.

  Attributes:
    ids: the prompt's token ids, see `Engine.prompt_ids`.
    sessions: its video, or several in the order of their placeholders; None: text alone.
    max_new_tokens, temperature, top_p, top_k, seed: as in `Engine.generate`.
  """

  ids: Sequence[int]
  sessions: Sessions
  max_new_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a step brought one slot.

  Attributes:
    slot: the number that `Slots.add` gave.
    ids: new token ids since the last step, the stop token included.
    finish: why the reply has ended; None while it goes on. An ended reply's slot is free again.
  """

  slot: int
  ids: list[int]
  finish: Literal["stop", "length"] | None


class Slots:
  """A batch whose rows are asked each for itself.

  A request's tokens are those of `Engine.generate`. Not thread-safe: one thread calls it.

  Args:
    engine: the model.
    count: rows of the batch.
    text_length: decoder positions of a row: those of its text, of its fast tokens and of its reply.
    slow_length: slow tokens that a row can read.

  Raises:
    UserError: a size below 1.
  """

  def __init__(self, engine: Engine, count: int, *, text_length: int, slow_length: int):
    for name, size in (("count", count), ("text_length", text_length)):
      if size < 1:
        raise UserError(f"{name} must be at least 1, got {size}.")
    self._engine, self._count = engine, count
    self._text_length, self._slow_length = text_length, slow_length
    self._used: dict[int, int] = {}  # Slot -> new tokens that were told.
    self._limits = np.zeros(count, np.int32)
    self._sampling = make_sampling(count)
    # The same layout before and after every call, or each would compile another program. As lists:
    # where an array lives is no array, which is what the types of a state ask for.
    tree: Any
    leaves, tree = jax.tree.flatten(self._empty())
    shardings = [leaf.sharding for leaf in leaves]
    self._place = lambda leaves: tree.unflatten(jax.device_put(leaves, shardings))
    self._state, self._visual = self._place(leaves)
    self._lost = False  # Whether a program has failed, which had the arrays for good.
    state_tree: Any = jax.tree.structure(self._state)

    def decode(model, **arguments):
      return jax.tree.leaves(programs.decode_rows(model, **arguments))

    def insert(**arguments):
      return jax.tree.leaves(programs.insert(**arguments))

    decoded = engine.compiled(
      decode,
      static=("rows",),
      donate=("state",),
      out_shardings=shardings[: state_tree.num_leaves],
      apart=True,
    )
    inserted = jax.jit(insert, donate_argnames=("state", "visual"), out_shardings=shardings)
    self._decode = lambda **arguments: state_tree.unflatten(decoded(**arguments))
    self._insert = lambda **arguments: tree.unflatten(inserted(**arguments))
    # A step is over the first 1, 4, 16 ... rows, whichever hold all that are in use; on a mesh over
    # all, since each device has some.
    self._sizes = [count]
    if engine.num_devices == 1:
      self._sizes = [*(4**i for i in range(count.bit_length()) if 4**i < count), count]
    # Media are padded to few sizes, so that those of other lengths compile nothing.
    sizes = {engine.media_size(n) for n in (1, engine.export.video.num_frames)}
    self._fast_bounds = sorted(fast for fast, _ in sizes)

  @property
  def free(self) -> int:
    """Slots that are not in use."""
    return self._count - len(self._used)

  def check(self, request: Request) -> None:
    """
    Raises:
      UserError: the request does not fit into a slot, or one of its values is out of range.
    """
    if request.max_new_tokens < 1:
      raise UserError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}.")
    make_sampling(1, request.temperature, request.top_p, request.top_k, request.seed)
    length = self._engine.check_length(request.ids, request.sessions)
    if length + request.max_new_tokens > self._text_length:
      raise UserError(
        f"The prompt takes {length} positions and its reply up to {request.max_new_tokens}, and "
        f"there is room for {self._text_length}; ask for a shorter reply, write a shorter "
        "question or take fewer frames."
      )
    num_slow = sum(session.num_slow for session in as_tuple(request.sessions))
    if num_slow > self._slow_length:
      raise UserError(
        f"The videos and images have {num_slow} slow tokens and there is room for "
        f"{self._slow_length}; take fewer frames."
      )

  def add(self, request: Request) -> int:
    """Prefills a request into a free slot and returns the slot's number.

    Raises:
      UserError: no slot is free, or as `check`.
    """
    self.check(request)
    slot = next((i for i in range(self._count) if i not in self._used), None)
    if slot is None:
      raise UserError(f"All {self._count} slots are in use; wait until one is free.")
    sampling = make_sampling(1, request.temperature, request.top_p, request.top_k, request.seed)
    if self._lost and not self._used:
      self._renew()
    with self._donating():
      self._fill(slot, request, sampling)
    self._limits[slot] = request.max_new_tokens
    for name in ("temperature", "top_p", "top_k", "seed"):
      getattr(self._sampling, name)[slot] = getattr(sampling, name)[0]
    self._used[slot] = 0
    return slot

  def step(self) -> list[Progress]:
    """Takes a few new tokens of every slot in use, and tells each slot's.

    Raises:
      Exception: what every slot held is lost; once all are released, others can be added.
    """
    if not self._used:
      return []
    with self._donating():
      self._advance(STREAM_STEPS, next(n for n in self._sizes if n > max(self._used)))
      state = self._state
      tokens, counts, stopped = jax.device_get((state.tokens, state.counts, state.stopped))
    found = []
    for slot, told in list(self._used.items()):
      count = int(counts[slot])
      finish: Literal["stop", "length"] | None = None
      if stopped[slot]:
        finish = "stop"
      elif count >= self._limits[slot]:
        finish = "length"
      found.append(Progress(slot, tokens[slot, told:count].tolist(), finish))
      self._used[slot] = count
      if finish is not None:
        self.release(slot)
    return found

  def release(self, slot: int) -> None:
    """Frees a slot whose reply nobody waits for."""
    self._used.pop(slot, None)
    self._limits[slot] = 0
    self._sampling.temperature[slot] = 0.0

  @contextlib.contextmanager
  def _donating(self) -> Iterator[None]:
    """Remembers that what runs inside has failed: its arrays are deleted, or hold the failure."""
    try:
      yield
    except Exception:
      self._lost = True
      raise

  def _renew(self) -> None:
    """Slots as new, of which none is in use."""
    for leaf in jax.tree.leaves((self._state, self._visual)):
      leaf.delete()  # First: there may be no room for both.
    self._state, self._visual = self._place(jax.tree.leaves(self._empty()))
    self._lost = False

  def warm_up(
    self,
    longest_text: int | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
  ) -> None:
    """Compiles all that requests can need: those without a video, with an image, with a video.

    Args:
      longest_text: of the prompts, in tokens; None: as long as a slot has room for. Several videos
        a prompt, or more frames than the model's, compile when they first come.
      progress: is told how many programs are compiled, and of how many.
    """
    if self._used:
      raise RuntimeError("Slots must be warmed up before they are used.")
    prompts = self._prompts(longest_text)
    total = len(prompts) + len(self._sizes)
    for done, prompt in enumerate(prompts):
      progress(done, total)
      self._fill(0, prompt, make_sampling(1))
    for done, rows in enumerate(self._sizes, len(prompts)):
      progress(done, total)
      self._advance(1, rows)
    progress(total, total)

  def _prompts(self, longest_text: int | None) -> list[Request]:
    """A prompt for each program that prefills."""
    engine, num_frames = self._engine, self._engine.export.video.num_frames
    size = engine.export.model.vision.image_size
    # One video of each size that videos are padded to.
    counts = {engine.padded_frames(n): n for n in range(1, num_frames + 1)}
    sessions = [engine.encode(np.zeros((n, size, size, 3), np.uint8)) for n in counts.values()]
    found: dict[tuple[int, int], Request] = {}
    for session in [None, *sessions]:
      media = as_tuple(session)
      if sum(s.num_slow for s in media) > self._slow_length:
        continue
      padded = self._media(join(media))
      room = self._text_length - sum(s.num_fast for s in media) - 1
      longest = min(room, longest_text or room)
      for length in sorted({bucket(n, LEAST_TEXT) for n in range(1, longest + 1)}):
        shape = (0 if padded is None else padded.fast.shape[1], length)
        ids = [0] * min(length, longest) + [IMAGE_TOKEN] * len(media)
        found.setdefault(shape, Request(ids, session, 1))
    return list(found.values())

  def _empty(self) -> tuple[Decoding, Visual]:
    """Slots that nothing stands in."""
    engine, cfg = self._engine, self._engine.export.model.decoder
    count, heads = self._count, (cfg.num_kv_heads, cfg.head_dim)

    def zeros(shape, *axes, dtype=engine.dtype):
      # Each its own buffer: they are donated.
      return engine.place(jnp.zeros(shape, dtype), *axes)

    def cache():
      shape = (cfg.num_layers, count, self._text_length, *heads)
      return zeros(shape, None, "batch", None, "heads")

    def slow():
      shape = (len(engine.export.model.hybrid_layers), count, self._slow_length, *heads)
      return zeros(shape, None, "batch", "slow", "heads")

    stacked = KVCache(cache(), cache())
    state = Decoding(
      FlatCache.of(stacked, turned=count > 1) if engine.by_layer else stacked,
      zeros((count, self._text_length), "batch", dtype=jnp.int32),
      zeros((count,), "batch", dtype=jnp.int32) + 1,
      zeros((count,), "batch", dtype=jnp.int32) + 1,
      zeros((count,), "batch", dtype=jnp.bool_),
    )
    kv: SlowKV | SlowLayers | None = None
    if engine.export.model.hybrid_layers:
      whole = SlowKV(slow(), slow())
      kv = SlowLayers.of(whole, turned=count > 1) if engine.by_layer else whole
    fast = zeros((count, 1, cfg.width), "batch")
    return state, Visual(fast, kv, zeros((count,), "batch", dtype=jnp.int32))

  def _fill(self, slot: int, request: Request, sampling) -> None:
    """Prefill, and the copy into the slot."""
    media = self._media(join(as_tuple(request.sessions)))
    prompts, visual = self._engine.build_rows([request.ids], [media], 1)
    rows = len(prompts.real)
    row = self._engine.prefill(
      prompts=prompts,
      visual=visual,
      sampling=jax.tree.map(lambda x: np.pad(x, (0, rows - 1)), sampling),
      stop_ids=np.array(self._engine.stop_ids, np.int32),
      max_new_tokens=self._text_length,
      cache_length=self._text_length,
    )
    self._state, self._visual = self._insert(
      state=self._state, visual=self._visual, row=row, media=visual, slot=np.int32(slot)
    )

  def _media(self, media: RowMedia | None) -> RowMedia | None:
    """Padded to one of few sizes."""
    if media is None:
      return None
    length = media.fast.shape[1]
    bound = next((n for n in self._fast_bounds if n >= length), length)
    kv = jax.tree.map(lambda array: fit(array, 2, self._slow_length), media.kv)
    return dataclasses.replace(media, fast=fit(media.fast, 1, bound), kv=kv)

  def _advance(self, steps: int, rows: int) -> None:
    self._state = self._decode(
      state=self._state,
      visual=self._visual,
      sampling=self._sampling,
      limits=self._limits.copy(),
      steps=np.int32(steps),
      rows=rows,
      stop_ids=np.array(self._engine.stop_ids, np.int32),
    )
