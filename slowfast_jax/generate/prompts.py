# SPDX-License-Identifier: Apache-2.0
"""Prompts of different lengths to arrays of few different shapes: right padding and buckets.

Slot = position: a row's new tokens overwrite its padding, and nothing sees a later slot.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from slowfast_jax.data.chat import IMAGE_TOKEN
from slowfast_jax.data.packing import querying_positions
from slowfast_jax.errors import UserError
from slowfast_jax.shapes import FAST, PAD, PROMPT, Array

# Shorter texts share one program.
LEAST_TEXT = 64


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
  num_fast: Sequence[int],
  *,
  fast_bound: int,
  rows: int,
  query_set: str,
) -> Prompts:
  """Splices the fast positions into every prompt.

  Args:
    prompts: token ids, IMAGE_TOKEN where the fast tokens go.
    num_fast: fast tokens of each prompt's video; 0 = it has none.
    fast_bound: the most fast tokens that a row may have.
    rows: B; rows past the prompts are padding.
    query_set: which positions query slow tokens.

  Raises:
    UserError: an empty prompt, or placeholders and videos that do not match.
  """
  merged = [_merge(ids, count, i) for i, (ids, count) in enumerate(zip(prompts, num_fast))]
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


def _merge(ids: Sequence[int], num_fast: int, index: int) -> tuple[np.ndarray, np.ndarray]:
  array = np.asarray(ids, np.int32)
  if not len(array):
    raise UserError(f"Prompt {index} is empty; give it at least one token.")
  placeholder = array == IMAGE_TOKEN
  if placeholder.sum() != (num_fast > 0):
    raise UserError(
      f"Prompt {index} has {placeholder.sum()} placeholder(s) ({IMAGE_TOKEN}) and "
      f"{'a video' if num_fast else 'no video'}; write one placeholder for a video, else none."
    )
  repeats = np.where(placeholder, num_fast, 1)
  kind = np.where(placeholder, FAST, PROMPT).astype(np.int8)
  return np.repeat(np.where(placeholder, 0, array), repeats), np.repeat(kind, repeats)
