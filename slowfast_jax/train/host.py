# SPDX-License-Identifier: Apache-2.0
"""The host's memory allocator, for runs on a CPU."""

import ctypes

import jax

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
  """Tells glibc to keep freed buffers for the next step; does nothing on other platforms.

  On a CPU every step allocates and frees the same large buffers. By default glibc gives them back
  to the system, which has to clear each page anew: a quarter of the time of a small step.
  """
  if jax.default_backend() != "cpu":
    return
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return
  mallopt(_MMAP_MAX, 0)
  mallopt(_TRIM_THRESHOLD, 2**31 - 1)
  mallopt(_TOP_PAD, 64 * 2**20)
