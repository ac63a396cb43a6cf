# SPDX-License-Identifier: Apache-2.0
"""From a prompt and frames to new tokens."""
