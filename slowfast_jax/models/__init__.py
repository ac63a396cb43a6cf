# SPDX-License-Identifier: Apache-2.0
"""Flax modules: vision encoder, projector, compressor, hybrid decoder."""
