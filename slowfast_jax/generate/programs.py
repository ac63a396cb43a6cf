# SPDX-License-Identifier: Apache-2.0
"""What is compiled, as pure functions: encode a video, score prompts, prefill and decode."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from slowfast_jax.generate.prompts import Prompts
from slowfast_jax.generate.sampling import Sampling, next_token
from slowfast_jax.generate.sessions import fit
from slowfast_jax.kernels.self_attention import Causal
from slowfast_jax.models.apart import views
from slowfast_jax.models.cache import FlatCache, KVCache
from slowfast_jax.models.compressor import compress
from slowfast_jax.models.hybrid import SlowKV, SlowLayers, SlowQuery
from slowfast_jax.models.slowfast import SlowFast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visual:
  """What the rows of a batch see.

  Attributes:
    fast: fast tokens of each row, in order, then padding.
    kv: slow keys and values; None where nothing reads any.
    num_slow: valid slow tokens of each row.
  """

  fast: Float[Array, "B fast D"]
  kv: SlowKV | SlowLayers | None
  num_slow: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """Where the rows of a batch stand, each for itself.

  Attributes:
    cache: keys and values of prompts and new tokens.
    tokens: new tokens of each row, `counts` of them so far.
    counts: see `tokens`.
    lengths: positions of each row's prompt.
    stopped: rows that have produced a stop token, or are no prompt at all.
  """

  cache: KVCache | FlatCache
  tokens: Int[Array, "B new"]
  counts: Int[Array, " B"]
  lengths: Int[Array, " B"]
  stopped: Bool[Array, " B"]


# Its arrays whose first axis is the rows.
_BY_ROW = ("tokens", "counts", "lengths", "stopped")


def jit_program(
  graphdef: nnx.GraphDef,
  program: Callable,
  static: tuple[str, ...] = (),
  donate: tuple[str, ...] = (),
  out_shardings: Any = None,
) -> Any:
  """A program (model, ...) as a jitted function of the model's parameters and its keywords."""

  def run(params, **arguments):
    return program(nnx.merge(graphdef, params), **arguments)

  run.__name__ = program.__name__  # The name in profiles and compilation logs.
  return jax.jit(run, static_argnames=static, donate_argnames=donate, out_shardings=out_shardings)


def encode_video(
  model: SlowFast,
  frames: Array,
  pooling: Float[Array, "Q F"],
  zero_slow: Bool[Array, ""],
  dtype: jnp.dtype,
  frame_chunk: int,
) -> tuple[Float[Array, "1 F P D"], Float[Array, "1 fast D"], SlowKV | None]:
  """Slow tokens, flat fast tokens, and the slow keys and values of one video.

  With `zero_slow` the decoder gets the same fast tokens, but slow tokens of zeros.
  """
  slow, fast = visual_tokens(model, frames, pooling, dtype, frame_chunk)
  kv = model.slow_kv(jnp.where(zero_slow, jnp.zeros_like(slow), slow))
  return slow, fast, kv


def visual_tokens(
  model: SlowFast, frames: Array, pooling: Float[Array, "Q F"], dtype: jnp.dtype, frame_chunk: int
) -> tuple[Float[Array, "1 F P D"], Float[Array, "1 fast D"]]:
  """Slow tokens and flat fast tokens of one video."""
  if frames.dtype == jnp.uint8:
    slow = model.encode(frames[None], dtype, frame_chunk)
  else:
    slow = model.encode_pixels(frames[None].astype(dtype), frame_chunk)
  fast = compress(slow, pooling[None], model.cfg.compressor.spatial_stride)
  return slow, fast.reshape(1, -1, fast.shape[-1])


def embed_prompts(model: SlowFast, prompts: Prompts, visual: Visual) -> Float[Array, "B T D"]:
  """What the decoder reads: embeddings of the text, fast tokens where a video goes."""
  return model.embed(prompts.tokens, prompts.kind, visual.fast[:, :, None])


def uncached(prompts: Prompts) -> tuple[Int[Array, "B T"], Causal]:
  """Positions and mask of a pass over whole prompts, without a cache."""
  order = jnp.arange(prompts.tokens.shape[1])
  valid = order < prompts.lengths[:, None]
  return jnp.broadcast_to(order, valid.shape), Causal(valid.astype(jnp.int32))


def forward(model: SlowFast, prompts: Prompts, visual: Visual) -> Float[Array, "B T D"]:
  """Last hidden states of whole prompts, as training sees them."""
  positions, mask = uncached(prompts)
  readers = model.readers(visual.kv, query_of(prompts.text_index, visual))
  x = embed_prompts(model, prompts, visual)
  return model.decoder(x, positions, mask, readers=readers)[0]


def scores(
  model: SlowFast,
  hidden: Float[Array, "B T D"],
  row: Int[Array, ""],
  start: Int[Array, ""],
  count: int,
) -> Float[Array, "count V"]:
  """Scores of the vocabulary at some positions of a row: those of all would fill the memory."""
  part = jax.lax.dynamic_slice(hidden, (row, start, 0), (1, count, hidden.shape[2]))
  return model.decoder.logits(part[0])


def query_of(text_index: Int[Array, "B X"], visual: Visual) -> SlowQuery | None:
  """Each row reads the valid slow tokens of its own video."""
  if visual.kv is None:
    return None
  slots = jnp.arange(visual.kv.num_slots)
  return SlowQuery(
    text_index,
    (text_index >= 0).astype(jnp.int32),
    (slots < visual.num_slow[:, None]).astype(jnp.int32),
  )


def prefill(
  model: SlowFast,
  prompts: Prompts,
  visual: Visual,
  sampling: Sampling,
  stop_ids: Int[Array, " stops"],
  max_new_tokens: int,
  cache_length: int,
) -> Decoding:
  """Runs the prompts and takes the first new token of every row.

  Args:
    model, prompts, visual, sampling, stop_ids: what the arrays of a batch are made of.
    max_new_tokens: room for new tokens.
    cache_length: room for positions; prompts and their new tokens must fit.
  """
  x = embed_prompts(model, prompts, visual)
  positions, mask = uncached(prompts)
  readers = model.readers(visual.kv, query_of(prompts.text_index, visual))
  hidden, kv = model.decoder(x, positions, mask, readers=readers)
  last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
  token = next_token(model.decoder.logits(last), sampling, jnp.zeros_like(prompts.lengths))
  tokens = jnp.zeros((len(token), max_new_tokens), jnp.int32).at[:, 0].set(token)
  cache = jax.tree.map(lambda array: fit(array, 2, cache_length), kv)
  stopped = ~prompts.real | is_stop(token, stop_ids)
  return Decoding(cache, tokens, jnp.ones_like(prompts.lengths), prompts.lengths, stopped)


def decode_logits(
  model: SlowFast, state: Decoding, visual: Visual
) -> tuple[Float[Array, "B V"], KVCache | FlatCache]:
  """Scores of the token after each row's latest one, which is written into the cache."""
  latest = jnp.take_along_axis(state.tokens, state.counts[:, None] - 1, axis=1)
  positions = (state.lengths + state.counts - 1)[:, None]
  x = model.decoder.embed(latest, state.cache.dtype)
  # New tokens are text: they query under every query set.
  text_index = jnp.where(visual.num_slow > 0, 0, -1)[:, None]
  query = query_of(text_index, visual)
  hidden, cache = model.cached_step(x, positions, state.cache, visual.kv, query)
  return model.decoder.logits(hidden[:, 0]), cache


def decode(
  model: SlowFast,
  state: Decoding,
  visual: Visual,
  sampling: Sampling,
  limits: Int[Array, " B"],
  steps: Int[Array, ""],
  stop_ids: Int[Array, " stops"],
) -> Decoding:
  """Takes up to `steps` new tokens of every row that has not stopped or reached its limit."""
  if isinstance(state.cache, FlatCache):
    state = dataclasses.replace(state, cache=state.cache.entering_loop())

  def active(state: Decoding) -> Bool[Array, " B"]:
    return ~state.stopped & (state.counts < limits)

  def body(carry: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
    i, state = carry
    logits, cache = decode_logits(model, state, visual)
    token, live = next_token(logits, sampling, state.counts), active(state)
    # A row that is finished writes outside of its tokens: nowhere.
    column = jnp.where(live, state.counts, state.tokens.shape[1])
    tokens = state.tokens.at[jnp.arange(len(token)), column].set(token, mode="drop")
    stopped = state.stopped | (live & is_stop(token, stop_ids))
    return i + 1, Decoding(cache, tokens, state.counts + live, state.lengths, stopped)

  def more(carry: tuple[Array, Decoding]) -> Bool[Array, ""]:
    return (carry[0] < steps) & jnp.any(active(carry[1]))

  done = jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]
  if isinstance(done.cache, FlatCache):
    done = dataclasses.replace(done, cache=done.cache.leaving_loop())
  return done


def decode_rows(
  model: SlowFast,
  state: Decoding,
  visual: Visual,
  sampling: Sampling,
  limits: Int[Array, " B"],
  steps: Int[Array, ""],
  stop_ids: Int[Array, " stops"],
  rows: int,
) -> Decoding:
  """As `decode`, of the first `rows` rows alone: the others stand still and cost nothing."""
  if rows == len(limits):
    return decode(model, state, visual, sampling, limits, steps, stop_ids)

  def head(axis: int, tree: Any) -> Any:
    return jax.tree.map(lambda array: jax.lax.slice_in_dim(array, 0, rows, axis=axis), tree)

  def back(axis: int, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, 0, axis), old, new)

  by_row, axis = [getattr(state, name) for name in _BY_ROW], rows_axis(state)
  part = Decoding(head(axis, state.cache), *head(0, by_row))
  seen = Visual(head(0, visual.fast), head(axis, visual.kv), head(0, visual.num_slow))
  done = decode(model, part, seen, head(0, sampling), limits[:rows], steps, stop_ids)
  new = [getattr(done, name) for name in _BY_ROW]
  return Decoding(back(axis, state.cache, done.cache), *back(0, by_row, new))


def rows_axis(state: Decoding) -> int:
  """The axis of the rows in caches; before it are the layers, where they are one array."""
  return 0 if isinstance(state.cache, FlatCache) else 1


def is_stop(token: Int[Array, " B"], stop_ids: Int[Array, " stops"]) -> Bool[Array, " B"]:
  """Which new tokens end their reply."""
  return jnp.isin(token, stop_ids)


def insert(
  state: Decoding, visual: Visual, row: Decoding, media: Visual, slot: Int[Array, ""]
) -> tuple[Decoding, Visual]:
  """Copies a batch of one, prefilled with the batch's room, into a row of a batch."""

  def at(axis: int):
    def put(old: Array, new: Array) -> Array:
      # On a mesh there may be rows of padding.
      first = jax.lax.slice_in_dim(new, 0, 1, axis=axis)
      return jax.lax.dynamic_update_slice_in_dim(old, first.astype(old.dtype), slot, axis)

    return put

  axis, new = rows_axis(state), row.cache
  if isinstance(state.cache, FlatCache) and isinstance(new, KVCache):
    new = FlatCache.of(new, turned=state.cache.turned)
  cache = jax.tree.map(at(axis), state.cache, new)
  rest = [at(0)(getattr(state, name), getattr(row, name)) for name in _BY_ROW]
  kv = visual.kv
  if kv is not None and media.kv is not None:
    length = kv.num_slots
    fitted = jax.tree.map(lambda array: fit(array, 2, length), media.kv)
    if isinstance(kv, SlowLayers):
      fitted = SlowLayers.of(fitted, turned=kv.turned)
    kv = jax.tree.map(at(axis), kv, fitted)
  num_slow = at(0)(visual.num_slow, media.num_slow)
  return Decoding(cache, *rest), Visual(visual.fast, kv, num_slow)


_flat = jax.jit(FlatCache.of, static_argnames="turned")
_turned = jax.jit(functools.partial(SlowLayers.of, turned=True))


def apart(state: Decoding, visual: Visual) -> tuple[Decoding, Visual]:
  """A batch that was prefilled, in the forms that a processor decodes best."""
  rows, kv = len(state.lengths), visual.kv
  if isinstance(state.cache, KVCache):
    state = dataclasses.replace(state, cache=_flat(state.cache, turned=rows > 1))
  if isinstance(kv, SlowKV):
    kv = _turned(kv) if rows > 1 else SlowLayers(views(kv.k).layers, views(kv.v).layers)
  return state, dataclasses.replace(visual, kv=kv)


def with_layers_apart(params: nnx.State) -> nnx.State:
  """The parameters with those of the decoder's layers, and adapters, as views of their stacks."""
  parts = dict(params)
  parts["decoder"] = nnx.State({**params["decoder"], "layers": views(params["decoder"]["layers"])})
  if "adapters" in parts:
    parts["adapters"] = views(parts["adapters"])
  return nnx.State(parts)
