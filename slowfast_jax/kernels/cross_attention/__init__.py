# SPDX-License-Identifier: Apache-2.0
"""Slow cross-attention: few text queries over many visual keys, grouped heads."""

from slowfast_jax.kernels.cross_attention.ops import cross_attention

__all__ = ["cross_attention"]
