# SPDX-License-Identifier: Apache-2.0
"""Slow-fast video language models in JAX: few fast tokens, cross-attention to all slow ones."""

__version__ = "0.1.0"
