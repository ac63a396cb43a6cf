# SPDX-License-Identifier: Apache-2.0
"""An HTTP server that answers about videos: OpenAI's interface, a web page, metrics."""
