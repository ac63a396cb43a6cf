# SPDX-License-Identifier: Apache-2.0
"""What holds for every request: who may ask, how large it may be, what errors look like."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from absl import logging
from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slowfast_jax.serve.errors import ApiError, bad_request, overloaded
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import too_many_bytes
from slowfast_jax.serve.metrics import Metrics

# A body that takes longer holds its connection for nothing.
BODY_SECONDS = 60.0
# Bodies that are held at once, in times the largest.
_BODIES = 8
# Of a body that is too large, so much is read and dropped: a client hears of the refusal only
# after it has sent its part.
_DRAINED_BODIES = 4


def error_response(error: ApiError) -> JSONResponse:
  """An error as OpenAI's clients read it."""
  return JSONResponse(error.body, error.status, error.headers)


def on_api_error(request: Request, error: Exception) -> Response:
  """What an endpoint refuses."""
  assert isinstance(error, ApiError)
  return error_response(error)


def on_http_error(request: Request, error: Exception) -> Response:
  """What the router refuses: no such path, no such method."""
  assert isinstance(error, HTTPException)
  code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
  message = f"{request.method} {request.url.path[:200]}: {error.detail}."
  response = error_response(ApiError(error.status_code, message, code))
  response.headers.update(error.headers or {})
  return response


class Guard:
  """Middleware: API keys, the size of bodies, counts of requests, errors that nobody expected.

  Args:
    app: what is guarded.
    keys: that may ask; none: everybody may.
    limits: of bodies.
    metrics: what to count in.
    paths: that are told apart in the counts.
  """

  def __init__(
    self, app: ASGIApp, keys: Sequence[str], limits: Limits, metrics: Metrics, paths: Sequence[str]
  ):
    self._app, self._keys, self._limits = app, [key.encode() for key in keys], limits
    self._metrics, self._paths = metrics, paths

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    status = 499  # The client has gone before it was answered.

    async def counted(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    is_api = scope["path"].startswith("/v1")
    self._metrics.active += is_api
    try:
      await self._checked(scope, receive, counted)
    except ApiError as error:  # Of the body's size, seen while a mounted app was reading it.
      if status == 499:
        await error_response(error)(scope, receive, counted)
    except ClientDisconnect:
      pass
    except Exception:
      logging.exception("%s %s failed", scope["method"], scope["path"])
      if status == 499:
        failure = ApiError(500, "The server failed; its log says why.", "internal_error")
        await error_response(failure)(scope, receive, counted)
    finally:
      self._metrics.active -= is_api
      path = next((p for p in self._paths if scope["path"].startswith(p)), "other")
      self._metrics.requests.labels(path, str(status)).inc()

  async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
    headers = dict(scope["headers"])
    if scope["path"].startswith("/v1") and not self._may_ask(headers.get(b"authorization", b"")):
      raise ApiError(
        401, "Send your API key in the header `Authorization: Bearer KEY`.", "invalid_api_key"
      )
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > self._limits.body_bytes:
      await _drain(receive, _DRAINED_BODIES * self._limits.body_bytes)
      raise too_many_bytes(self._limits)
    await self._app(scope, self._limited(receive), send)

  def _may_ask(self, header: bytes) -> bool:
    scheme, _, given = header.partition(b" ")
    known = [hmac.compare_digest(given.strip(), key) for key in self._keys]
    return not self._keys or (scheme.lower() == b"bearer" and any(known))

  def _limited(self, receive: Receive) -> Receive:
    """Counts what comes, for a body that does not say its length."""
    count = 0

    async def limited() -> Message:
      nonlocal count
      message = await receive()
      count += len(message.get("body", b""))
      if count > self._limits.body_bytes:
        await _drain(receive, _DRAINED_BODIES * self._limits.body_bytes)
        raise too_many_bytes(self._limits)
      return message

    return limited


async def _drain(receive: Receive, most: int) -> None:
  count = 0
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(BODY_SECONDS):
      while count < most:
        message = await receive()
        count += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
          return


class Bodies:
  """Reads bodies, of which only so many megabytes are held at once."""

  def __init__(self, limits: Limits):
    self._limits, self._held = limits, 0

  @contextlib.asynccontextmanager
  async def hold(self, request: Request) -> AsyncIterator[None]:
    """While a body is read and understood.

    Raises:
      ApiError: 503, too many are; 408, it came too slowly.
    """
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdigit() else self._limits.body_bytes
    if self._held and self._held + size > _BODIES * self._limits.body_bytes:
      raise overloaded("Too many large requests are being read.", "overloaded")
    self._held += size
    try:
      yield
    finally:
      self._held -= size

  async def read_json(self, request: Request) -> Any:
    """
    Raises:
      ApiError: no JSON, or not in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
      # A page of another site can post anything but this without being asked first.
      raise ApiError(
        415, f"Expected Content-Type application/json, got {kind!r}.", "unsupported_content_type"
      )
    content = await in_time(request.body())
    try:
      return await to_thread.run_sync(json.loads, content)
    except (ValueError, RecursionError) as error:
      raise bad_request(f"The body is not JSON: {error}.", code="invalid_json") from None


async def in_time(reading: Any) -> Any:
  """What a client sends, if it comes in time.

  Raises:
    ApiError: 408.
  """
  try:
    return await asyncio.wait_for(reading, BODY_SECONDS)
  except TimeoutError:
    raise ApiError(408, "The body did not come in time.", "body_timeout") from None
