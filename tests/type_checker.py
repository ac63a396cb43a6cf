# SPDX-License-Identifier: Apache-2.0
"""The checker of array annotations under test: shapes and dtypes, by beartype.

Other annotations are mypy's: tests pass wrong settings and stand-ins on purpose.
"""

import inspect
import typing
from collections.abc import Callable

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable) -> Callable:
  hints = {name: hint for name, hint in function.__annotations__.items() if _has_axes(hint)}
  function.__annotations__ = hints
  return beartype(function) if hints else function


def _has_axes(hint: typing.Any) -> bool:
  if inspect.isclass(hint) and issubclass(hint, AbstractArray):
    return True
  return any(_has_axes(part) for part in typing.get_args(hint))
