# SPDX-License-Identifier: Apache-2.0
"""`slowfast serve`: a checkpoint behind OpenAI's HTTP interface and a web page."""

import argparse
import importlib
import ipaddress
import os
import sys
from pathlib import Path

from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.serve.limits import Limits

HELP = "serve a checkpoint: OpenAI's HTTP interface and a web page"

EXAMPLES = """examples:
  slowfast serve --checkpoint=runs/mine/export --port=8000
  slowfast serve --checkpoint=runs/mine/export --allow-folder=/data/videos --slots=16
  SLOWFAST_API_KEY=secret slowfast serve --checkpoint=runs/mine/export --host=0.0.0.0

The interface is at http://HOST:PORT/v1, the page at http://HOST:PORT/, what Prometheus reads at
/metrics. SIGTERM or Ctrl-C stops it when the running answers are finished. It needs the extra
`serve`: pip install ".[serve]" in the checkout
"""

_LIMITS = {
  "body_mb": "megabytes of a request, and of each image or video in it",
  "upload_mb": "megabytes of all uploaded files; the one not used for longest goes first",
  "video_seconds": "length of a video",
  "video_frames": "frames in a video's file; the model sees a few of them",
  "megapixels": "of an image or of a video's frame",
  "media": "images and videos in one request",
  "new_tokens": "of an answer",
  "queue": "requests that wait; more are refused with 503",
  "request_seconds": "from a request to the end of its answer",
  "decode_seconds": "for reading one image or video",
}
_MODULES = ("starlette", "uvicorn", "prometheus_client", "pydantic", "python_multipart", "gradio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("--checkpoint", required=True, metavar="DIR", help="an export or a Hugging Face folder")
  add("--int8", action="store_true", help="the decoder's weights as int8: a quarter of the memory")
  add(
    "--mesh",
    default="tensor=-1",
    metavar="AXIS=N,...",
    help="how the devices share the work: data (slots), context (slow tokens), tensor and fsdp "
    "(weights); -1 takes what is left (%(default)s)",
  )
  add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (%(default)s)")
  add("--port", type=int, default=8000, metavar="N", help="0: any that is free (%(default)s)")
  add("--name", help="of the model, for clients (the checkpoint's folder)")
  add("--slots", type=int, default=8, metavar="N", help="answers at once (%(default)s)")
  add(
    "--context",
    type=int,
    metavar="N",
    help="tokens of a conversation, its fast tokens and its answer (a video's and 3072)",
  )
  add("--slow-tokens", type=int, metavar="N", help="of a conversation (those of one video)")
  add("--session-mb", type=float, default=2048.0, metavar="N", help="of encoded videos that are "
      "kept for more questions (%(default)g)")  # fmt: skip
  add("--decoders", type=int, default=2, metavar="N", help="processes that read media (2)")
  add(
    "--allow-folder",
    action="append",
    default=[],
    metavar="DIR",
    help="clients may name files in it by their path; may be given several times",
  )
  add(
    "--api-key-file",
    metavar="FILE",
    help="keys that may ask, one a line; or one in the environment's SLOWFAST_API_KEY",
  )
  add("--no-page", action="store_true", help="without the web page")
  limits = parser.add_argument_group("limits of requests")
  for name, text in _LIMITS.items():
    default = getattr(Limits, name)
    flag = "--max-" + name.replace("_", "-")
    kind = type(default)
    limits.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} ({default:g})")


def run(args: argparse.Namespace) -> int:
  for name in ("slots", "decoders", "context", "slow_tokens"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
  limits = Limits(**{name: getattr(args, f"max_{name}") for name in _LIMITS})
  folders = [_folder(name) for name in args.allow_folder]
  keys = _keys(args.api_key_file)
  _check_extra(args.no_page)
  if not keys and not _is_local(args.host):
    print(f"Anybody who reaches {args.host} may ask: there is no API key.", file=sys.stderr)
  from slowfast_jax.serve.server import Options, serve

  serve(
    Options(
      args.checkpoint,
      args.host,
      args.port,
      args.name or Path(args.checkpoint).resolve().name,
      args.slots,
      args.context,
      args.slow_tokens,
      args.session_mb,
      args.decoders,
      folders,
      keys,
      not args.no_page,
      limits,
      _mesh(args.mesh),
      args.int8,
    )
  )
  return 0


def _check_extra(no_page: bool) -> None:
  missing = []
  for name in _MODULES[: -1 if no_page else None]:
    try:
      importlib.import_module(name)
    except ImportError:
      missing.append(name)
  if missing:
    raise UserError(
      f"serving needs packages that are not installed ({', '.join(missing)}); "
      'pip install ".[serve]" in the checkout'
    )


def _mesh(text: str) -> dict[str, int]:
  """The sizes of a mesh's axes, as "data=2,tensor=4"."""
  try:
    pairs = [part.split("=") for part in text.split(",")]
    sizes = {name.strip(): int(size) for name, size in pairs}
  except ValueError:
    raise UsageError(
      f"--mesh must name axes and their sizes, such as data=2,tensor=4, got {text!r}."
    ) from None
  if len(sizes) < len(pairs):
    raise UsageError(f"--mesh must name each axis once, got {text!r}.")
  return sizes


def _folder(name: str) -> Path:
  path = Path(name).resolve()
  if not path.is_dir():
    raise UsageError(f"--allow-folder {name}: there is no such folder.")
  return path


def _keys(file: str | None) -> list[str]:
  """API keys; from a file or the environment, since all users of a machine see command lines."""
  if file is not None:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
      raise UsageError(f"--api-key-file {file}: there is no key in it.")
    return keys
  key = os.environ.get("SLOWFAST_API_KEY", "").strip()
  return [key] if key else []


def _is_local(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
