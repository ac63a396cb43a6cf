# SPDX-License-Identifier: Apache-2.0
"""Prompts of different lengths to arrays of few different shapes: right padding and buckets.

Slot = position: a row's new tokens overwrite its padding, and nothing sees a later slot.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Int

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.data.packing import querying_positions
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import FAST, PAD, PROMPT, Array

# Shorter texts share one program.
LEAST_TEXT = 64


# Tokens and kinds of a sample's positions.
_Merged = tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """Rows of a batch before the first new token.

  Attributes:
    tokens: text ids; 0 at fast positions and padding.
    kind: PAD, PROMPT or FAST.
    lengths: positions of each row; 1 in a row that is all padding.
    text_index: positions that query slow tokens; -1 = none.
    real: whether a row is a prompt at all.
  """

  tokens: Int[Array, "B T"]
  kind: Int[Array, "B T"]
  lengths: Int[Array, " B"]
  text_index: Int[Array, "B X"]
  real: Bool[Array, " B"]


def bucket(n: int, least: int = 1) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least n and `least`."""
  n = max(n, least)
  power = 1 << (n - 1).bit_length()
  return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def build_prompts(
  prompts: Sequence[Sequence[int]],
  num_fast: Sequence[Sequence[int]],
  *,
  fast_bound: int,
  rows: int,
  query_set: str,
  vocab_size: int,
  max_length: int | None = None,
) -> Prompts:
  """Splices the fast positions into every prompt.

  Args:
    prompts: token ids, IMAGE_TOKEN where the fast tokens of a video or image go.
    num_fast: fast tokens of each of a prompt's videos and images, in order.
    fast_bound: the most fast tokens that a row may have.
    rows: B; rows past the prompts are padding.
    query_set: which positions query slow tokens.
    vocab_size: ids lie below it.
    max_length: longer rows are cut on the right; None: there is no bound.

  Raises:
    UserError: an empty prompt, ids out of range, or placeholders and videos that do not match.
  """
  merged = [
    _cut(_merge(_checked(ids, i, vocab_size), counts, i), max_length, i)
    for i, (ids, counts) in enumerate(zip(prompts, num_fast))
  ]
  text = bucket(max(int((kind != FAST).sum()) for _, kind in merged), LEAST_TEXT)
  T = text + fast_bound
  built = Prompts(
    tokens=np.zeros((rows, T), np.int32),
    kind=np.full((rows, T), PAD, np.int8),
    lengths=np.ones(rows, np.int32),
    text_index=np.full((rows, T if query_set == "all" else text), -1, np.int32),
    real=np.arange(rows) < len(merged),
  )
  for row, (tokens, kind) in enumerate(merged):
    built.tokens[row, : len(tokens)] = tokens
    built.kind[row, : len(kind)] = kind
    built.lengths[row] = len(kind)
    queries = querying_positions(kind, query_set)
    built.text_index[row, : len(queries)] = queries
  return built


def _checked(ids: Sequence[int], index: int, vocab_size: int) -> Int[np.ndarray, " n"]:
  """The ids as an array. On a device a wrong one would silently be another token."""
  array = np.asarray(ids)
  if not array.size:
    raise UserError(f"Sample {index} is empty; give it at least one token id.")
  if array.ndim != 1 or array.dtype.kind not in "iu":
    raise UserError(
      f"Sample {index} must be a list of token ids, got {array.dtype} of shape {array.shape}."
    )
  wrong = np.flatnonzero(((array < 0) & (array != IMAGE_TOKEN)) | (array >= vocab_size))
  if len(wrong):
    raise UserError(
      f"Sample {index} has the id {array[wrong[0]]} at place {wrong[0]}; expected 0 to "
      f"{vocab_size - 1}, or {IMAGE_TOKEN} where a video or image goes."
    )
  return array.astype(np.int32)


def _merge(ids: Int[np.ndarray, " n"], num_fast: Sequence[int], index: int) -> _Merged:
  """Tokens and kinds of the merged sequence."""
  placeholder = ids == IMAGE_TOKEN
  if placeholder.sum() != len(num_fast):
    raise UserError(
      f"Sample {index} has {placeholder.sum()} placeholder(s) ({IMAGE_TOKEN}) and "
      f"{len(num_fast)} video(s) or image(s); write one placeholder for each."
    )
  repeats = np.ones(len(ids), np.int64)
  repeats[placeholder] = num_fast
  kind = np.where(placeholder, FAST, PROMPT).astype(np.int8)
  return np.repeat(np.where(placeholder, 0, ids), repeats), np.repeat(kind, repeats)


def _cut(merged: _Merged, max_length: int | None, index: int) -> _Merged:
  tokens, kind = merged
  if max_length is None or len(tokens) <= max_length:
    return merged
  logging.warning(
    "Sample %d takes %d positions; cut on the right to the model's %d.",
    index,
    len(tokens),
    max_length,
  )
  return tokens[:max_length], kind[:max_length]
