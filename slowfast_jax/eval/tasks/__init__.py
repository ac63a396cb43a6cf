# SPDX-License-Identifier: Apache-2.0
"""Benchmark tasks: prompts, answer extraction and scores."""
