# SPDX-License-Identifier: Apache-2.0
"""Runs on Cloud TPUs: what `launch/tpu.py` does on the desk, and `host` on every TPU host.

The standard library alone, so that a desk needs Python and the Google Cloud CLI, not JAX.
"""
