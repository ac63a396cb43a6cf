# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: OpenAI's chat completions, models and files; health and metrics."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Sequence

from anyio import CapacityLimiter, to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from slowfast_jax.serve.answers import Answer, make_ask, or_gone
from slowfast_jax.serve.body import ChatBody, parse_chat
from slowfast_jax.serve.errors import ApiError, bad_request, overloaded
from slowfast_jax.serve.guard import (
  Bodies,
  Guard,
  error_response,
  in_time,
  on_api_error,
  on_http_error,
)
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import MediaReader
from slowfast_jax.serve.metrics import Metrics
from slowfast_jax.serve.scheduler import Ask, Piece, Scheduler
from slowfast_jax.serve.sniff import sniff
from slowfast_jax.serve.uploads import Uploads
from slowfast_jax.serve.wire import Completion, error_event

_PATHS = ("/v1/chat/completions", "/v1/files", "/v1/models", "/healthz", "/metrics")

# Requests whose media are read at once; the others wait without a thread.
_READERS = 16


@dataclasses.dataclass(frozen=True)
class Service:
  """What answers requests.

  Attributes:
    model: its name.
    scheduler, reader, uploads, metrics: its parts.
    limits: of requests.
    keys: API keys; none: everybody may ask.
    started: seconds since 1970.
  """

  model: str
  scheduler: Scheduler
  reader: MediaReader
  uploads: Uploads
  metrics: Metrics
  limits: Limits
  keys: Sequence[str] = ()
  started: int = dataclasses.field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> Starlette:
  """The application without the web page."""
  api = _Api(service)
  # A mount of its own: what is unknown below /v1 must not become the page's.
  v1 = [
    Route("/chat/completions", api.chat, methods=["POST"]),
    Route("/models", api.models),
    Route("/models/{name:path}", api.model),
    Route("/files", api.list_files, methods=["GET"]),
    Route("/files", api.upload, methods=["POST"]),
    Route("/files/{file_id}", api.file, methods=["GET"]),
    Route("/files/{file_id}", api.delete_file, methods=["DELETE"]),
  ]
  routes = [Mount("/v1", routes=v1), Route("/healthz", api.health), Route("/metrics", api.metrics)]
  guard = Middleware(
    Guard, keys=service.keys, limits=service.limits, metrics=service.metrics, paths=_PATHS
  )
  # No other site may read anything. Gradio would let them in, unless its host does this itself.
  closed = Middleware(CORSMiddleware, allow_origins=())
  return Starlette(
    routes=routes,
    middleware=[guard, closed],
    exception_handlers={ApiError: on_api_error, HTTPException: on_http_error},
  )


class _Api:
  """The endpoints."""

  def __init__(self, service: Service):
    self._service = service
    self._bodies = Bodies(service.limits)
    # Of their own: slow files must not take the threads that everything else needs.
    self._readers = CapacityLimiter(_READERS)
    scheduler, metrics = service.scheduler, service.metrics
    metrics.watch("queue_length", "Requests that wait for a slot.", lambda: scheduler.waiting)
    metrics.watch("slots_in_use", "Requests that are being answered.", lambda: scheduler.running)
    metrics.watch(
      "sessions_bytes", "Encoded videos that are kept.", lambda: scheduler.sessions_bytes
    )

  async def chat(self, request: Request) -> Response:
    service = self._service
    service.scheduler.check_room()  # Before anything is read: a full server must stay quick.
    async with self._bodies.hold(request):
      body = await to_thread.run_sync(parse_chat, await self._bodies.read_json(request))
      self._check_model(body.model)
      ask = await or_gone(self._read(body), _gone(request))
    if ask is None:
      return Response(status_code=499)
    answer = Answer(service.scheduler)
    try:
      await answer.start(ask)
      if not body.stream:
        return await self._whole(answer, request)
      return await self._stream(answer, request, body)
    except BaseException:
      answer.cancel()
      raise

  async def _read(self, body: ChatBody) -> Ask:
    service = self._service
    read = functools.partial(make_ask, body, service.reader, service.limits)
    try:
      with service.metrics.decode.time():
        async with asyncio.timeout(service.limits.request_seconds):
          return await to_thread.run_sync(read, limiter=self._readers, abandon_on_cancel=True)
    except TimeoutError:
      raise overloaded("Too many images and videos are being read.") from None

  async def _whole(self, answer: Answer, request: Request) -> Response:
    async def collect() -> list[Piece]:
      return [piece async for piece in answer]

    pieces = await or_gone(collect(), _gone(request))
    if pieces is None:
      answer.cancel()
      return Response(status_code=499)
    text = "".join(piece.text for piece in pieces)
    return JSONResponse(Completion(self._service.model).whole(text, pieces[-1]))

  async def _stream(self, answer: Answer, request: Request, body: ChatBody) -> Response:
    """Begins when the first piece is there: until then an error can have its own status."""
    pieces = aiter(answer)
    first = await or_gone(anext(pieces), _gone(request))
    if first is None:
      answer.cancel()
      return Response(status_code=499)
    options = body.stream_options
    writer = Completion(self._service.model, bool(options and options.include_usage))
    return _Stream(answer, writer, first, pieces)

  def _check_model(self, name: str) -> None:
    if name != self._service.model:
      raise ApiError(
        404,
        f"There is no model {name[:80]!r}; this server has {self._service.model!r}.",
        "model_not_found",
        "model",
      )

  async def models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._model_body()]})

  async def model(self, request: Request) -> Response:
    self._check_model(request.path_params["name"])
    return JSONResponse(self._model_body())

  def _model_body(self) -> dict[str, object]:
    service = self._service
    about = {"created": service.started, "owned_by": "slowfast_jax"}
    return {"id": service.model, "object": "model", **about}

  async def upload(self, request: Request) -> Response:
    async with self._bodies.hold(request):
      try:
        form = await in_time(request.form(max_files=1, max_fields=8))
      except HTTPException as error:
        raise bad_request(f"The form cannot be read: {error.detail}", "file") from None
      file = form.get("file")
      if not isinstance(file, UploadFile):
        raise bad_request("Expected a form with the field `file`.", "file", "missing_field")
      content = await file.read()
      sniff(content)
      purpose = form.get("purpose")
      upload = await to_thread.run_sync(
        self._service.uploads.add,
        content,
        file.filename or "file",
        purpose if isinstance(purpose, str) else "user_data",
      )
      await form.close()
    return JSONResponse(upload.body)

  async def list_files(self, request: Request) -> Response:
    files = [upload.body for upload in self._service.uploads.all()]
    return JSONResponse({"object": "list", "data": files, "has_more": False})

  async def file(self, request: Request) -> Response:
    return JSONResponse(self._service.uploads.get(request.path_params["file_id"]).body)

  async def delete_file(self, request: Request) -> Response:
    file_id = request.path_params["file_id"]
    keys = await to_thread.run_sync(self._service.reader.forget_upload, file_id)
    # What is deleted is gone from the device too, once the client hears of it.
    scheduler = self._service.scheduler
    await asyncio.wrap_future(scheduler.call(lambda: scheduler.forget(keys)))
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})

  async def health(self, request: Request) -> Response:
    if not self._service.scheduler.alive:
      return error_response(ApiError(503, "The server is stopping.", "stopping"))
    return JSONResponse({"status": "ok", "model": self._service.model})

  async def metrics(self, request: Request) -> Response:
    return Response(self._service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


async def _gone(request: Request) -> None:
  """Returns when the client has gone. For after its body was read."""
  while (await request.receive())["type"] != "http.disconnect":
    await asyncio.sleep(0)


class _Stream(StreamingResponse):
  """An answer as it comes. However it ends, also before it began, the answer's slot is free."""

  def __init__(
    self, answer: Answer, writer: Completion, first: Piece, pieces: AsyncIterator[Piece]
  ):
    super().__init__(
      _events(writer, first, pieces),
      media_type="text/event-stream",
      headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )
    self._answer = answer

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._answer.cancel()


async def _events(
  writer: Completion, first: Piece, pieces: AsyncIterator[Piece]
) -> AsyncIterator[str]:
  try:
    yield writer.first()
    for text in writer.events(first):
      yield text
    if first.finish is None:
      async for piece in pieces:
        for text in writer.events(piece):
          yield text
  except ApiError as error:
    yield error_event(error)
