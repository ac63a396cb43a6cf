# SPDX-License-Identifier: Apache-2.0
"""Answers: a video is encoded once and asked many times, prompts of all sorts in one batch.

Programs are compiled for buckets of shapes, so another question rarely compiles anything.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from slowfast_jax.checkpoints.store import Export
from slowfast_jax.data.chat import Turn, encode_prompt
from slowfast_jax.errors import UserError
from slowfast_jax.generate import programs
from slowfast_jax.generate.attention import SlowAttention, attend
from slowfast_jax.generate.programs import Decoding, Visual
from slowfast_jax.generate.prompts import Prompts, bucket, build_prompts
from slowfast_jax.generate.sampling import Sampling, make_sampling
from slowfast_jax.generate.text import TextPieces
from slowfast_jax.models.compressor import pooling_matrix
from slowfast_jax.models.hybrid import SlowKV
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.shapes import FAST, PROMPT
from slowfast_jax.sharding import sharding_of, state_shardings

# New tokens that `stream` waits for: few enough to look alive, enough to keep the device busy.
STREAM_STEPS = 4


@dataclasses.dataclass(frozen=True)
class VideoSession:
  """A video that was encoded and can be asked. Its arrays stay on the devices.

  Attributes:
    slow: slow tokens; frames past `num_frames` are padding.
    fast: fast tokens, flat; those past `num_fast` are padding.
    kv: slow keys and values of every hybrid layer; None where the model has none.
    num_frames: frames of the video.
    num_fast: decoder positions that it takes.
  """

  slow: Float[Array, "1 F P D"]
  fast: Float[Array, "1 fast D"]
  kv: SlowKV | None
  num_frames: int
  num_fast: int

  @property
  def num_slow(self) -> int:
    return self.num_frames * self.slow.shape[2]


@dataclasses.dataclass
class _Run:
  """A generation under way."""

  state: Decoding
  visual: Visual
  sampling: Sampling
  count: int


class Engine:
  """A model that answers.

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
    self.tokenizer = export.tokenizer
    self.stop_ids = (export.tokenizer.im_end_id, export.tokenizer.eos_id)
    self._mesh, self._batch_size = mesh, batch_size
    self._dtype = jnp.dtype(dtype)
    params = export.params
    self.params = params if mesh is None else jax.device_put(params, state_shardings(params, mesh))
    self._graphdef = graphdef_of(export.model)
    self._encode = self._compile(programs.encode_video, static=("dtype",))
    self._prefill = self._compile(programs.prefill, static=("max_new_tokens",))
    self._decode = self._compile(programs.decode, donate=("state",))
    self._attend = self._compile(attend, static=("tokens_per_frame",))

  def _compile(
    self, program: Callable, static: tuple[str, ...] = (), donate: tuple[str, ...] = ()
  ) -> Callable:
    """The program as a function of its keywords, compiled for each bucket that it meets."""

    def run(params, **arguments):
      return program(nnx.merge(self._graphdef, params), **arguments)

    run.__name__ = program.__name__  # The name in profiles and compilation logs.
    jitted = jax.jit(run, static_argnames=static, donate_argnames=donate)
    return functools.partial(jitted, self.params)

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
    padded = count if count == self.export.video.num_frames else bucket(count)
    compressor = self.export.model.compressor
    strides = (compressor.sampling_stride, compressor.temporal_stride, compressor.min_fast_frames)
    map_QF = pooling_matrix(count, *strides)
    pooling = np.zeros((len(pooling_matrix(padded, *strides)), padded), np.float32)
    pooling[: len(map_QF), :count] = map_QF
    frames = np.concatenate([frames, np.zeros((padded - count, *frames.shape[1:]), frames.dtype)])
    slow, fast, kv = self._encode(
      frames=self._place(frames, "frames"),
      pooling=pooling,
      zero_slow=np.bool_(zero_slow),
      dtype=self._dtype,
    )
    slow, fast = self._place(slow), self._place(fast)
    kv = jax.tree.map(lambda x: self._place(x, None, None, None, "heads"), kv)
    return VideoSession(slow, fast, kv, count, fast.shape[1] // len(pooling) * len(map_QF))

  def prompt_ids(self, question: str | Sequence[Turn], session: VideoSession | None) -> list[int]:
    """Token ids of a question, or of a conversation that ends with one."""
    num_media = 0 if session is None else 1
    return encode_prompt(self.tokenizer, question, self.export.system, num_media)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[VideoSession | None],
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    decode_cross_attention: bool = True,
  ) -> list[list[int]]:
    """New token ids of every prompt, its stop token included where it came to one.

    Args:
      prompts: token ids, IMAGE_TOKEN (-200) once where the prompt has a video.
      sessions: the video of each prompt; None: text alone. May be the same for several.
      max_new_tokens: at most so many.
      temperature: 0 is greedy.
      top_p: draw from the likeliest tokens, which together have this probability.
      seed: of the draws; or one a prompt. A sample depends on its prompt and seed alone.
      decode_cross_attention: new tokens read slow tokens, as in training; False is what the
        released code does.

    Raises:
      UserError: prompts and sessions do not match, or an argument is out of range.
    """
    if not prompts:
      return []
    run = self._start(
      prompts,
      sessions,
      max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      decode_cross_attention=decode_cross_attention,
    )
    self._advance(run, max_new_tokens)
    return self._new_ids(run)

  def answer(
    self,
    questions: Sequence[str | Sequence[Turn]],
    sessions: Sequence[VideoSession | None],
    max_new_tokens: int = 256,
    **options,
  ) -> list[str]:
    """The replies as text; `options` as in `generate`."""
    prompts = [self.prompt_ids(question, s) for question, s in zip(questions, sessions)]
    replies = self.generate(prompts, sessions, max_new_tokens, **options)
    return [self.tokenizer.decode(ids) for ids in replies]

  def stream(
    self,
    question: str | Sequence[Turn],
    session: VideoSession | None,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    decode_cross_attention: bool = True,
  ) -> Iterator[str]:
    """Pieces of the reply as they come; together they are what `answer` returns."""
    pieces = TextPieces(self.tokenizer)
    run = self._start(
      [self.prompt_ids(question, session)],
      [session],
      max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      decode_cross_attention=decode_cross_attention,
    )
    for limit in [*range(1, max_new_tokens, STREAM_STEPS), max_new_tokens]:
      self._advance(run, limit)
      (ids,) = self._new_ids(run)
      final = limit == max_new_tokens or len(ids) < limit or ids[-1] in self.stop_ids
      if piece := pieces.update(ids, final):
        yield piece
      if final:
        return

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
    weights, gates, relevance = self._attend(
      prompts=built, visual=visual, tokens_per_frame=session.slow.shape[2], asked=asked
    )
    index = np.asarray(built.text_index)[0]
    index = index[index >= 0]
    kind, tokens = np.asarray(built.kind)[0], np.asarray(built.tokens)[0]
    # In a conversation the last turn but one is what was asked.
    starts = np.flatnonzero((tokens == self.tokenizer.im_start_id) & (kind == PROMPT))
    visual_stop = np.flatnonzero(kind == FAST)[-1] + 1
    behind = index >= max(visual_stop, starts[-2] if len(starts) > 1 else 0)
    replied = index >= int(built.lengths[0]) - len(reply)
    return SlowAttention(
      np.asarray(weights)[:, 0, :, : len(index), : session.num_frames],
      np.asarray(gates)[:, 0, : len(index)],
      tokens[index],
      behind & ~replied,
      replied,
      self.export.model.hybrid_layers,
      np.asarray(relevance)[:, 0, :, : len(index), : session.num_frames],
    )

  def build(
    self,
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[VideoSession | None],
    least_rows: int = 1,
  ) -> tuple[Prompts, Visual]:
    """The arrays of a batch, padded to its bucket."""
    if len(prompts) != len(sessions):
      raise UserError(f"Expected one session a prompt, got {len(sessions)} and {len(prompts)}.")
    rows = bucket(len(prompts), least_rows)
    shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    rows = -(-rows // shards) * shards
    hybrid = self.export.model.hybrid
    visual = self._gather(sessions, rows)
    built = build_prompts(
      prompts,
      [0 if s is None else s.num_fast for s in sessions],
      fast_bound=visual.fast.shape[1] if any(s is not None for s in sessions) else 0,
      rows=rows,
      query_set="text-only" if hybrid is None else hybrid.queries,
    )
    return jax.tree.map(lambda array: self._place(array, "batch"), built), visual

  def _gather(self, sessions: Sequence[VideoSession | None], rows: int) -> Visual:
    """The visual arrays of all rows, padded to the longest."""
    padding = [None] * (rows - len(sessions))
    some = next((s for s in sessions if s is not None), None)
    num_slow = np.array([0 if s is None else s.num_slow for s in [*sessions, *padding]], np.int32)
    if some is None:
      width = self.export.model.decoder.width
      fast = jnp.zeros((rows, 1, width), self._dtype)
      return Visual(self._place(fast, "batch"), None, self._place(num_slow, "batch"))
    fast = _stack([None if s is None else s.fast for s in [*sessions, *padding]], axis=0)
    kv = None
    if some.kv is not None:
      pairs = [None if s is None else s.kv for s in [*sessions, *padding]]
      k = _stack([None if p is None else p.k for p in pairs], axis=1)
      v = _stack([None if p is None else p.v for p in pairs], axis=1)
      kv = SlowKV(*(self._place(x, None, "batch", None, "heads") for x in (k, v)))
    return Visual(self._place(fast, "batch"), kv, self._place(num_slow, "batch"))

  def _place(self, array: Array | np.ndarray, *axes: str | None) -> Array:
    """Puts an array where its first axes, by their logical names, belong on the mesh."""
    if self._mesh is None:
      return jax.device_put(array)
    named = (*axes, *[None] * (array.ndim - len(axes)))
    return jax.device_put(array, sharding_of(named, array.shape, self._mesh))

  def _start(
    self, prompts, sessions, max_new_tokens, *, temperature, top_p, seed, decode_cross_attention
  ) -> _Run:
    if max_new_tokens < 1:
      raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    built, visual = self.build(prompts, sessions, self._batch_size)
    rows = len(built.lengths)
    sampling = make_sampling(rows, len(prompts), temperature, top_p, seed)
    state = self._prefill(
      prompts=built,
      visual=visual,
      sampling=sampling,
      stop_ids=np.array(self.stop_ids, np.int32),
      max_new_tokens=bucket(max_new_tokens, 16),
    )
    if not decode_cross_attention:
      visual = dataclasses.replace(visual, kv=None)
    return _Run(state, visual, sampling, len(prompts))

  def _advance(self, run: _Run, limit: int) -> None:
    run.state = self._decode(
      state=run.state,
      visual=run.visual,
      sampling=run.sampling,
      limit=np.int32(limit),
      stop_ids=np.array(self.stop_ids, np.int32),
    )

  def _new_ids(self, run: _Run) -> list[list[int]]:
    tokens, step = jax.device_get((run.state.tokens, run.state.step))
    return [self._until_stop(row[:step].tolist()) for row in tokens[: run.count]]

  def _until_stop(self, ids: list[int]) -> list[int]:
    stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
    return ids[: stops[0] + 1] if stops else ids


def _stack(rows: Sequence[Array | None], axis: int) -> Array:
  """Arrays of batch size 1 along `axis`, the next axis padded to the longest; None is zeros."""
  some = next(row for row in rows if row is not None)
  length = max(row.shape[axis + 1] for row in rows if row is not None)

  def fill(row: Array | None) -> Array:
    if row is None:
      shape = list(some.shape)
      shape[axis + 1] = length
      return jnp.zeros(shape, some.dtype)
    widths = [(0, 0)] * row.ndim
    widths[axis + 1] = (0, length - row.shape[axis + 1])
    return jnp.pad(row, widths) if widths[axis + 1][1] else row

  return jnp.concatenate([fill(row) for row in rows], axis=axis)
