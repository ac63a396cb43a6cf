# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation for TPUs that are not here: what fits, what it costs, what is fast."""
