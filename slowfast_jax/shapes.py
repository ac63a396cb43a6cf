# SPDX-License-Identifier: Apache-2.0
"""The axis alphabet of the project and `Batch`, the one contract between data and model.

B batch · F frames · P tokens per frame · S slow tokens (F·P) · Q fast frames · T decoder tokens
(text + fast) · X text positions that query slow tokens · D decoder width · E vision width ·
N query heads · K kv heads · G N/K · H head size · M mlp width · V vocabulary · C colour.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int, UInt8

# What a decoder position holds (`Batch.kind`).
PAD, PROMPT, RESPONSE, FAST = 0, 1, 2, 3

# Which positions query slow tokens (`Batch.text_index`, semantics section 4).
QUERY_SETS = ("text-only", "text-only-masksystem", "all")

# NumPy on the host, JAX on the device, shapes alone where a program is only compiled.
Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of decoder positions with the frames that they talk about. All shapes are static.

  Attributes:
    tokens: text ids; any valid id at fast positions.
    kind: PAD, PROMPT, RESPONSE or FAST.
    positions: rotary position inside the sample.
    segments: packing id of the sample, from 1; 0 = padding.
    targets: next-token target of each position.
    loss_weights: weight of that target; 0 where nothing is learned.
    frames: uint8 pixels, normalised on the device.
    frame_segments: the packed sample that a frame belongs to; 0 = padding.
    pooling: fast frame q = sum over f of pooling[q, f] * slow frame f; rows of padding are zero.
    text_index: positions that query slow tokens; -1 = none.
  """

  tokens: Int[Array, "B T"]
  kind: Int[Array, "B T"]
  positions: Int[Array, "B T"]
  segments: Int[Array, "B T"]
  targets: Int[Array, "B T"]
  loss_weights: Float[Array, "B T"]
  frames: UInt8[Array, "B F h w C"]
  frame_segments: Int[Array, "B F"]
  pooling: Float[Array, "B Q F"]
  text_index: Int[Array, "B X"]
