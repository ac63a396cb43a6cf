# SPDX-License-Identifier: Apache-2.0
"""TPU types: the runtime image of each, and what the number in its name counts."""

import dataclasses
import re

from slowfast_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
  """TPUs of one generation.

  Attributes:
    runtime: the image of a TPU VM; empty where there are none outside GKE.
    parts: what the number in a type's name counts for each chip (v4 and v5p count cores).
  """

  runtime: str
  parts: int


FAMILIES = {
  "v4": Family("tpu-ubuntu2204-base", 2),
  "v5litepod": Family("v2-alpha-tpuv5-lite", 1),
  "v5p": Family("v2-alpha-tpuv5", 2),
  "v6e": Family("v2-alpha-tpuv6e", 1),
  "tpu7x": Family("", 2),
}


def family(accelerator: str) -> Family:
  """The generation of a type such as v5litepod-256.

  Raises:
    UserError: there is no such type, with those that there are.
  """
  match = re.fullmatch(r"(\w+)-([1-9]\d*)", accelerator)
  known = FAMILIES.get(match[1]) if match else None
  if match is None or known is None or int(match[2]) % known.parts:
    names = ", ".join(f"{name}-N" for name in FAMILIES)
    raise UserError(
      f"cloud.accelerator: expected a TPU type, one of {names} (N even for v4, v5p and tpu7x, "
      f"which count two cores a chip), got {accelerator!r}."
    )
  return known
