# SPDX-License-Identifier: Apache-2.0
"""From video files to batches."""
