# SPDX-License-Identifier: Apache-2.0
"""The training state, its pure step and the loop around it."""
