# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the checkout; `slowfast bench NAME` runs them."""
