# SPDX-License-Identifier: Apache-2.0
"""What Prometheus may read of the server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
  """Counters of one server; each has a registry of its own.

  Attributes:
    active: requests to the interface that are being answered.
  """

  def __init__(self):
    self.active = 0
    self._registry = CollectorRegistry()
    registry = self._registry
    self.requests = Counter(
      "slowfast_requests", "Answered requests.", ["path", "status"], registry=registry
    )
    self.tokens = Counter(
      "slowfast_tokens", "Tokens read and written.", ["kind"], registry=registry
    )
    self.first_token = Histogram(
      "slowfast_first_token_seconds",
      "From a request to the first text of its answer.",
      buckets=_SECONDS,
      registry=registry,
    )
    self.encode = Histogram(
      "slowfast_encode_seconds",
      "Encoding an image or video on the device.",
      buckets=_SECONDS,
      registry=registry,
    )
    self.decode = Histogram(
      "slowfast_decode_seconds",
      "Reading the media of a request.",
      buckets=_SECONDS,
      registry=registry,
    )

  def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
    """Adds a gauge that is asked for its value."""
    Gauge(f"slowfast_{name}", text, registry=self._registry).set_function(value)

  def render(self) -> bytes:
    return generate_latest(self._registry)
