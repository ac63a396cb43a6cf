# SPDX-License-Identifier: Apache-2.0
"""A checkpoint behind a port: builds the parts, serves, and stops without losing an answer."""

import asyncio
import contextlib
import dataclasses
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvicorn

from slowfast_jax.checkpoints.open import load_checkpoint
from slowfast_jax.cli.progress import Progress
from slowfast_jax.errors import UserError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sessions import SessionStore
from slowfast_jax.generate.slots import Slots
from slowfast_jax.serve.app import Service, make_app
from slowfast_jax.serve.decode import DecodePool, FrameSpec
from slowfast_jax.serve.limits import Limits
from slowfast_jax.serve.media import MediaReader
from slowfast_jax.serve.metrics import Metrics
from slowfast_jax.serve.scheduler import Scheduler
from slowfast_jax.serve.uploads import Uploads
from slowfast_jax.sharding import make_mesh

# Text of a conversation that a slot has room for, beside its video and its answer.
_TEXT_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Options:
  """How to serve.

  Attributes:
    checkpoint: what to serve.
    host, port: where; port 0 is any that is free.
    name: of the model, for clients.
    slots: requests that are answered at once.
    context: decoder positions of a slot; None: a video, 2048 tokens of text and an answer.
    slow_tokens: slow tokens of a slot; None: those of one video.
    session_mb: megabytes of encoded videos that are kept.
    decoders: processes that read media.
    folders: whose files may be named by path.
    keys: API keys; none: everybody may ask.
    page: whether there is a web page.
    limits: of requests.
    mesh: sizes of the mesh's axes, see `sharding.make_mesh`.
    int8: keep the decoder's weights as int8.
  """

  checkpoint: str
  host: str = "127.0.0.1"
  port: int = 8000
  name: str = "slowfast"
  slots: int = 8
  context: int | None = None
  slow_tokens: int | None = None
  session_mb: float = 2048.0
  decoders: int = 2
  folders: Sequence[Path] = ()
  keys: Sequence[str] = ()
  page: bool = True
  limits: Limits = dataclasses.field(default_factory=Limits)
  mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"tensor": -1})
  int8: bool = False


def serve(options: Options) -> None:
  """Serves until SIGTERM, then finishes what was asked.

  Raises:
    UserError: the checkpoint cannot be opened, or the port is taken.
  """
  with contextlib.ExitStack() as stack:
    listener = stack.enter_context(contextlib.closing(_bind(options.host, options.port)))
    # All devices: a large model fits on none alone.
    whole = make_mesh(options.mesh)
    mesh = whole if whole.size > 1 else None
    print(f"Loading {options.checkpoint} ...", flush=True)
    engine = Engine(load_checkpoint(options.checkpoint, mesh, int8=options.int8), mesh)
    service = build_service(engine, options, stack)
    app = make_app(service)
    if options.page:
      from slowfast_jax.serve.page import mount_page  # Gradio takes seconds to import.

      mount_page(app, service, engine)
    # For the same signal after uvicorn's own handling of it: stopped as asked is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(app, log_level="warning", ws="none", lifespan="on")
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Serving {options.name} at http://{shown}:{port}", flush=True)
    _Server(config, service).run(sockets=[listener])
    print("Stopped.", flush=True)


def build_service(engine: Engine, options: Options, stack: contextlib.ExitStack) -> Service:
  """The parts of a server for this engine; `stack` ends them."""
  limits, metrics, export = options.limits, Metrics(), engine.export
  engine.tokenizer  # noqa: B018  Without one there is no text to serve: said now, not later.
  # A picture may have more tokens than a video, whose frames are pooled.
  sizes = [engine.media_size(frames) for frames in (1, export.video.num_frames)]
  num_fast, num_slow = (max(found) for found in zip(*sizes))
  context = options.context or num_fast + _TEXT_TOKENS + limits.new_tokens
  if export.max_length is not None:
    context = min(context, export.max_length)
  slots = Slots(
    engine, options.slots, text_length=context, slow_length=options.slow_tokens or num_slow
  )
  with Progress("Compiling", "programs") as progress:
    slots.warm_up(progress=progress)
  video, vision = export.video, export.model.vision
  spec = FrameSpec(
    vision.image_size,
    video.num_frames,
    video.sampler,
    video.target_fps,
    video.policy,
    vision.pixel_mean,
  )
  uploads = Uploads(limits.upload_bytes)
  stack.callback(uploads.close)
  pool = stack.enter_context(DecodePool(options.decoders, spec, limits))
  scheduler = stack.enter_context(
    Scheduler(
      engine,
      slots,
      SessionStore(engine, int(options.session_mb * 1e6)),
      metrics,
      text_length=context,
      token_limit=limits.new_tokens,
      queue=limits.queue,
      seconds=limits.request_seconds,
    )
  )
  reader = MediaReader(pool.decode, limits, uploads, options.folders)
  return Service(options.name, scheduler, reader, uploads, metrics, limits, options.keys)


def _bind(host: str, port: int) -> socket.socket:
  """A socket that does not listen yet: whoever connects is refused until the model is ready."""
  try:
    family, *_, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except (OSError, OverflowError) as error:
    raise UserError(f"--host {host} --port {port}: {error}; choose another.") from error
  return listener


class _Server(uvicorn.Server):
  """Stops when what was asked is answered; open pages, which listen for ever, do not hold it."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config)
    self._service = service

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    print("Stopping: running answers are finished first.", flush=True)
    ending = asyncio.create_task(self._end_when_done())
    await super().shutdown(sockets)
    ending.cancel()

  async def _end_when_done(self) -> None:
    quiet = 0
    while quiet < 5:  # Half a second: a page's last event is on its way.
      await asyncio.sleep(0.1)
      busy = self._service.metrics.active or not self._service.scheduler.idle
      quiet = 0 if busy else quiet + 1
    self.force_exit = True
