# SPDX-License-Identifier: Apache-2.0
"""Slow-fast video language models in JAX: few fast tokens, cross-attention to all slow ones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from slowfast_jax.api import VLM, load, save

__version__ = "0.1.0"
__all__ = ["VLM", "load", "save"]


def __getattr__(name: str) -> Any:
  """The Python interface, imported when it is used: `slowfast --help` must not wait for JAX."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from slowfast_jax import api

  return getattr(api, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
