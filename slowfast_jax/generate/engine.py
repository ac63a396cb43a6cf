# SPDX-License-Identifier: Apache-2.0
"""Answers: a video is encoded once and asked many times, prompts of all sorts in one batch.

Programs are compiled for buckets of shapes, so another question rarely compiles anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, UInt8

from slowfast_jax.checkpoints.store import Export
from slowfast_jax.data.chat import Turn, encode_prompt
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError
from slowfast_jax.generate import programs
from slowfast_jax.generate.attention import SlowAttention, attend, describe
from slowfast_jax.generate.programs import Decoding, Visual
from slowfast_jax.generate.prompts import Prompts, bucket, build_prompts
from slowfast_jax.generate.sampling import Sampling, make_sampling
from slowfast_jax.generate.sessions import (
  RowMedia,
  Sessions,
  VideoSession,
  as_tuple,
  join,
  stack_rows,
)
from slowfast_jax.generate.text import TextPieces
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.models.hybrid import SlowKV
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.shapes import FAST
from slowfast_jax.sharding import sharding_of, state_shardings

# New tokens that `stream` waits for: few enough to look alive, enough to keep the device busy.
STREAM_STEPS = 4
# Positions whose scores are computed at once; a large vocabulary takes 600 kB for each.
SCORED_POSITIONS = 512
# Frames that each device encodes at once: enough to fill it, and a large ConvNeXt needs 4 GB.
ENCODED_FRAMES = 16


@dataclasses.dataclass
class _Run:
  """A generation under way."""

  state: Decoding
  visual: Visual
  sampling: Sampling
  count: int
  ended: np.ndarray  # Rows that take no more tokens.


class Engine:
  """A model that answers.

  Without a tokenizer it takes and gives token ids; only text needs one.

  Args:
    export: the model and all that is needed to ask it.
    mesh: where it runs; None: where the export's parameters are.
    dtype: of the computation.
    batch_size: smaller batches are padded to it, so that they compile nothing anew.
  """

  def __init__(
    self,
    export: Export,
    mesh: Mesh | None = None,
    *,
    dtype: str = "float32",
    batch_size: int = 1,
  ):
    self.export = export
    self.stop_ids = _stop_ids(export)
    self.max_length = export.max_length
    self._mesh, self._batch_size = mesh, batch_size
    self.dtype = jnp.dtype(dtype)
    params = export.params
    self.params = params if mesh is None else jax.device_put(params, state_shardings(params, mesh))
    self._graphdef = graphdef_of(export.model)
    self._encode = self.compiled(programs.encode_video, static=("dtype", "frame_chunk"))
    self._forward = self.compiled(programs.forward)
    self._scores = self.compiled(programs.scores, static=("count",))
    self.prefill = self.compiled(
      programs.prefill, static=("max_new_tokens", "cache_length"), apart=True
    )
    self._decode = self.compiled(programs.decode, donate=("state",), apart=True)
    self._attend = self.compiled(attend, static=("tokens_per_frame",))

  @property
  def tokenizer(self) -> Tokenizer:
    """
    Raises:
      UserError: the checkpoint has none.
    """
    if self.export.tokenizer is None:
      raise UserError(
        "The checkpoint has no tokenizer, so it takes and gives token ids only; copy the files of "
        "its tokenizer (tokenizer.json, tokenizer_config.json) into its folder."
      )
    return self.export.tokenizer

  @property
  def num_devices(self) -> int:
    """Over which it is spread."""
    return 1 if self._mesh is None else self._mesh.size

  @functools.cached_property
  def by_layer(self) -> bool:
    """Whether it answers with the decoder's layers apart, see `models.apart`: on one processor."""
    places = {device for x in jax.tree.leaves(self.params) for device in x.devices()}
    return len(places) == 1 and places.pop().platform == "cpu"

  @functools.cached_property
  def _params_apart(self) -> Any:
    return programs.with_layers_apart(self.params) if self.by_layer else self.params

  def compiled(
    self,
    program: Callable,
    static: tuple[str, ...] = (),
    donate: tuple[str, ...] = (),
    out_shardings: Any = None,
    apart: bool = False,
  ) -> Callable:
    """A program (model, ...) as a function of its keywords, compiled for each bucket it meets.

    Args:
      program, static, donate, out_shardings: as of `programs.jit_program`.
      apart: the model may have its layers apart; a loop over them would copy each.
    """
    jitted = programs.jit_program(self._graphdef, program, static, donate, out_shardings)
    bound = functools.partial(jitted, self._params_apart if apart else self.params)
    if self._mesh is None:
      return bound

    def on_mesh(**arguments):
      with jax.set_mesh(self._mesh):
        return bound(**arguments)

    return on_mesh

  def encode(
    self,
    frames: UInt8[np.ndarray, "F h w C"] | Float[np.ndarray, "F h w C"],
    *,
    zero_slow: bool = False,
  ) -> VideoSession:
    """Encodes a video once, for any number of questions.

    Args:
      frames: uint8 pixels, or floating point ones that are normalised already. One frame is a
        still image.
      zero_slow: hide the slow tokens from the decoder, to see what they are good for.

    Raises:
      UserError: the frames do not have the shape that the model takes.
    """
    size = self.export.model.vision.image_size
    if frames.ndim != 4 or not len(frames) or frames.shape[1:] != (size, size, 3):
      raise UserError(
        f"Frames must have shape [F, {size}, {size}, 3] with at least one frame, "
        f"got {list(frames.shape)}."
      )
    count = len(frames)
    padded, map_QF = self.padded_frames(count), self._pooling(count)
    pooling = np.zeros((len(self._pooling(padded)), padded), np.float32)
    pooling[: len(map_QF), :count] = map_QF
    frames = np.concatenate([frames, np.zeros((padded - count, *frames.shape[1:]), frames.dtype)])
    slow, fast, kv = self._encode(
      frames=self.place(frames, "frames"),
      pooling=pooling,
      zero_slow=np.bool_(zero_slow),
      dtype=self.dtype,
      frame_chunk=ENCODED_FRAMES * self.num_devices,
    )
    slow, fast = self.place(slow, None, "slow"), self.place(fast)
    kv = jax.tree.map(lambda x: self.place(x, None, None, "slow", "heads"), kv)
    return VideoSession(slow, fast, kv, count, fast.shape[1] // len(pooling) * len(map_QF))

  def padded_frames(self, count: int) -> int:
    """To how many frames a video of so many is padded."""
    return count if count == self.export.video.num_frames else bucket(count)

  def _pooling(self, count: int) -> Float32[np.ndarray, "Q F"]:
    c = self.export.model.compressor
    return pooling_matrix(count, c.sampling_stride, c.temporal_stride, c.min_fast_frames)

  def media_size(self, num_frames: int) -> tuple[int, int]:
    """Fast and slow tokens of so many frames, padding included. Nothing is computed."""
    padded, size = self.padded_frames(num_frames), self.export.model.vision.image_size
    tokens = programs.jit_program(
      self._graphdef, programs.visual_tokens, static=("dtype", "frame_chunk")
    )
    slow, fast = jax.eval_shape(
      functools.partial(tokens, dtype=self.dtype, frame_chunk=ENCODED_FRAMES),
      self.params,
      frames=jax.ShapeDtypeStruct((padded, size, size, 3), np.uint8),
      pooling=jax.ShapeDtypeStruct(self._pooling(padded).shape, np.float32),
    )
    return fast.shape[1], slow.shape[1] * slow.shape[2]

  def prompt_ids(self, question: str | Sequence[Turn], sessions: Sessions) -> list[int]:
    """Token ids of a question, or of a conversation that ends with one."""
    return encode_prompt(self.tokenizer, question, self.export.system, len(as_tuple(sessions)))

  def logits(
    self, prompts: Sequence[Sequence[int]], sessions: Sequence[Sessions]
  ) -> list[Float32[np.ndarray, "n V"]]:
    """Scores of the vocabulary at every position of every merged prompt.

    Args:
      prompts, sessions: as in `generate`.
    """
    if not prompts:
      return []
    built, visual = self.build(prompts, sessions)
    hidden = self._forward(prompts=built, visual=visual)
    return [self._scores_of(hidden, i, int(built.lengths[i])) for i in range(len(prompts))]

  def _scores_of(
    self, hidden: Float[Array, "B T D"], row: int, length: int
  ) -> Float32[np.ndarray, "n V"]:
    """Scores of a row, part by part, so that the device never holds those of all positions."""
    count = min(SCORED_POSITIONS, hidden.shape[1])
    found = np.empty((length, self.export.model.decoder.vocab_size), np.float32)
    for start in range(0, length, count):
      # The last part may reach back: parts have one size.
      first = min(start, hidden.shape[1] - count)
      part = self._scores(hidden=hidden, row=np.int32(row), start=np.int32(first), count=count)
      stop = min(first + count, length)
      found[first:stop] = np.asarray(part)[: stop - first]
    return found

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[Sessions],
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    decode_cross_attention: bool = True,
  ) -> list[list[int]]:
    """New token ids of every prompt, its stop token included where it came to one.

    Args:
      prompts: token ids, IMAGE_TOKEN (-200) where a video or image goes. Merged prompts longer
        than the model's maximum are cut on the right.
      sessions: of each prompt its video or image, or several in the order of their placeholders;
        None: text alone. May be the same for several prompts.
      max_new_tokens: at most so many.
      temperature: 0 is greedy.
      top_p: draw from the likeliest tokens, which together have this probability.
      top_k: draw from so many of the likeliest tokens; 0: from all.
      seed: of the draws; or one a prompt. A sample depends on its prompt and seed alone.
      decode_cross_attention: new tokens read slow tokens, as in training; False is what the
        released code does.

    Raises:
      UserError: prompts and sessions do not match, or an argument is out of range.
    """
    if not prompts:
      return []
    sampling = make_sampling(len(prompts), temperature, top_p, top_k, seed)
    run = self._start(prompts, sessions, max_new_tokens, sampling, decode_cross_attention)
    self._advance(run, max_new_tokens)
    return self._new_ids(run)

  def answer(
    self,
    questions: Sequence[str | Sequence[Turn]],
    sessions: Sequence[Sessions],
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    decode_cross_attention: bool = True,
  ) -> list[str]:
    """The replies as text.

    Args:
      questions: or conversations that end with one.
      stop: a reply ends before the first of these strings; nothing is computed past them.
      All others: as in `generate`.

    Raises:
      UserError: questions and sessions do not match, or as `generate`.
    """
    if len(questions) != len(sessions):
      raise UserError(f"Expected one session a question, got {len(sessions)} and {len(questions)}.")
    prompts = [self.prompt_ids(question, s) for question, s in zip(questions, sessions)]
    texts = [TextPieces(self.tokenizer, stop) for _ in prompts]
    if not prompts:
      return []
    sampling = make_sampling(len(prompts), temperature, top_p, top_k, seed)
    run = self._start(prompts, sessions, max_new_tokens, sampling, decode_cross_attention)
    if not stop:  # Then the device need not wait for the text.
      self._advance(run, max_new_tokens)
      return [text.update(ids, final=True) for text, ids in zip(texts, self._new_ids(run))]
    return ["".join(parts) for parts in zip(*self._pieces(run, texts, max_new_tokens))]

  def stream(
    self,
    question: str | Sequence[Turn],
    sessions: Sessions,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[str] = (),
    decode_cross_attention: bool = True,
  ) -> Iterator[str]:
    """Pieces of the reply as they come; together they are what `answer` returns.

    Raises:
      UserError: the prompt is longer than the model's maximum: cut, it would have no question.
    """
    pieces = TextPieces(self.tokenizer, stop)
    ids = self.prompt_ids(question, sessions)
    self.check_length(ids, sessions)
    sampling = make_sampling(1, temperature, top_p, top_k, seed)
    run = self._start([ids], [sessions], max_new_tokens, sampling, decode_cross_attention)
    for (piece,) in self._pieces(run, [pieces], max_new_tokens):
      if piece:
        yield piece

  def slow_attention(
    self, ids: Sequence[int], session: VideoSession, reply: Sequence[int] = ()
  ) -> SlowAttention:
    """What a prompt, and a reply to it, read of the slow tokens.

    Args:
      ids: the prompt's token ids, see `prompt_ids`.
      session: the prompt's video.
      reply: new token ids.

    Raises:
      UserError: the model has no slow path.
    """
    if session.kv is None:
      raise UserError("This model has no hybrid layers: it reads no slow tokens.")
    built, visual = self.build([[*ids, *reply]], [session])
    asked = np.maximum(np.asarray(built.lengths) - len(reply) - 1, 0)
    attended = self._attend(
      prompts=built, visual=visual, tokens_per_frame=session.slow.shape[2], asked=asked
    )
    return describe(
      attended,
      jax.device_get(built),
      reply=len(reply),
      num_frames=session.num_frames,
      turn_start=self.tokenizer.im_start_id,
      layers=self.export.model.hybrid_layers,
    )

  def build(
    self,
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[Sessions],
    least_rows: int = 1,
  ) -> tuple[Prompts, Visual]:
    """The arrays of a batch, padded to its bucket."""
    if len(prompts) != len(sessions):
      raise UserError(f"Expected one session a prompt, got {len(sessions)} and {len(prompts)}.")
    media = [join(as_tuple(s)) for s in sessions]
    return self.build_rows(prompts, media, bucket(len(prompts), least_rows))

  def build_rows(
    self, prompts: Sequence[Sequence[int]], media: Sequence[RowMedia | None], least_rows: int
  ) -> tuple[Prompts, Visual]:
    """As `build`, of what each row sees; at least so many rows, by steps that fit the mesh."""
    shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    rows = -(-max(least_rows, len(prompts)) // shards) * shards
    model = self.export.model
    built = build_prompts(
      prompts,
      [() if m is None else m.num_fast for m in media],
      fast_bound=max(0 if m is None else m.fast.shape[1] for m in media),
      rows=rows,
      query_set="text-only" if model.hybrid is None else model.hybrid.queries,
      vocab_size=model.decoder.vocab_size,
      max_length=self.max_length,
    )
    visual = self._visual([*media, *[None] * (rows - len(media))], built)
    return jax.tree.map(lambda array: self.place(array, "batch"), built), visual

  def _visual(self, media: Sequence[RowMedia | None], built: Prompts) -> Visual:
    """The visual arrays of all rows, padded to the longest."""
    # A row that was cut before its first video reads nothing.
    shown = (built.kind == FAST).any(axis=1)
    num_slow = np.array([0 if m is None else m.num_slow for m in media], np.int32) * shown
    kv: SlowKV | None = None
    fast: Any
    if all(m is None for m in media):
      fast = np.zeros((len(media), 1, self.export.model.decoder.width), self.dtype)
    else:
      fast = stack_rows([None if m is None else m.fast for m in media], axis=0)
      pairs = [None if m is None else m.kv for m in media]
      if any(pair is not None for pair in pairs):
        k = stack_rows([None if p is None else p.k for p in pairs], axis=1)
        v = stack_rows([None if p is None else p.v for p in pairs], axis=1)
        kv = SlowKV(*(self.place(x, None, "batch", "slow", "heads") for x in (k, v)))
    return Visual(self.place(fast, "batch"), kv, self.place(num_slow, "batch"))

  def check_length(self, ids: Sequence[int], sessions: Sessions) -> int:
    """Positions of a prompt.

    Raises:
      UserError: they are more than the model has.
    """
    media = as_tuple(sessions)
    num_fast = sum(s.num_fast for s in media)
    length = len(ids) - len(media) + num_fast
    if self.max_length is not None and length > self.max_length:
      raise UserError(
        f"The prompt takes {length} positions, {num_fast} of them for videos and images, and the "
        f"model has {self.max_length}; write a shorter question or take fewer frames."
      )
    return length

  def place(self, array: Array | np.ndarray, *axes: str | None) -> Array:
    """Puts an array where its first axes, by their logical names, belong on the mesh."""
    if self._mesh is None:
      return jax.device_put(array)
    named = (*axes, *[None] * (array.ndim - len(axes)))
    return jax.device_put(array, sharding_of(named, array.shape, self._mesh))

  def _start(self, prompts, sessions, max_new_tokens, sampling, decode_cross_attention) -> _Run:
    if max_new_tokens < 1:
      raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    built, visual = self.build(prompts, sessions, self._batch_size)
    rows, T = built.tokens.shape
    # Rows of padding are greedy.
    sampling = jax.tree.map(lambda x: np.pad(x, (0, rows - len(x))), sampling)
    room = bucket(max_new_tokens, 16)
    state = self.prefill(
      prompts=built,
      visual=visual,
      sampling=sampling,
      stop_ids=np.array(self.stop_ids, np.int32),
      max_new_tokens=room,
      cache_length=T + room,
    )
    if not decode_cross_attention:
      visual = dataclasses.replace(visual, kv=None)
    if self.by_layer:  # Once for all calls that follow.
      state, visual = programs.apart(state, visual)
    return _Run(state, visual, sampling, len(prompts), np.zeros(rows, np.bool_))

  def _pieces(
    self, run: _Run, texts: Sequence[TextPieces], max_new_tokens: int
  ) -> Iterator[list[str]]:
    """What every row's text gains, a few tokens at a time, until all have ended."""
    for limit in [*range(1, max_new_tokens, STREAM_STEPS), max_new_tokens]:
      self._advance(run, limit)
      gained = []
      for i, (text, ids) in enumerate(zip(texts, self._new_ids(run))):
        final = limit == max_new_tokens or len(ids) < limit or ids[-1] in self.stop_ids
        gained.append(text.update(ids, final))
        run.ended[i] |= final or text.stopped
      yield gained
      if run.ended[: run.count].all():
        return

  def _advance(self, run: _Run, limit: int) -> None:
    run.state = self._decode(
      state=run.state,
      visual=run.visual,
      sampling=run.sampling,
      limits=np.where(run.ended, 0, limit).astype(np.int32),
      steps=np.int32(limit),
      stop_ids=np.array(self.stop_ids, np.int32),
    )

  def _new_ids(self, run: _Run) -> list[list[int]]:
    tokens, counts = jax.device_get((run.state.tokens, run.state.counts))
    return [row[:n].tolist() for row, n in zip(tokens[: run.count], counts)]


def _stop_ids(export: Export) -> tuple[int, ...]:
  """Tokens that end a reply."""
  tokenizer = export.tokenizer
  own = () if tokenizer is None else (tokenizer.im_end_id, tokenizer.eos_id)
  return tuple(dict.fromkeys([*own, *export.stop_ids]))
