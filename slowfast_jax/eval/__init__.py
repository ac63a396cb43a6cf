# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: tasks, scoring and the runner."""
