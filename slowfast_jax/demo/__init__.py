# SPDX-License-Identifier: Apache-2.0
"""A question set made of real videos, and the run that learns it."""
