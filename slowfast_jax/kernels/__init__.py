# SPDX-License-Identifier: Apache-2.0
"""Kernels, one folder an operation."""
