# SPDX-License-Identifier: Apache-2.0
"""`slowfast chat`: one question about a video, or a conversation; the answer streams."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slowfast_jax.checkpoints.open import load_checkpoint
from slowfast_jax.data.chat import Turn
from slowfast_jax.errors import UsageError
from slowfast_jax.generate.engine import Engine, VideoSession
from slowfast_jax.generate.timeline import Timeline, draw_timeline
from slowfast_jax.generate.video import ModelFrames, read_media
from slowfast_jax.sharding import make_mesh

HELP = "ask a checkpoint about a video"

EXAMPLES = """examples:
  slowfast chat clip.mp4 "What falls from the table?" --checkpoint=runs/mine/export
  slowfast chat clip.mp4 "What falls from the table?" --checkpoint=runs/mine/export \\
      --attention moments.png
  slowfast chat clip.mp4 --checkpoint=runs/mine/export

Without a question it is a conversation: one question a line, an empty line or Ctrl-D ends it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("video", metavar="VIDEO", help="a video or picture file")
  add("question", metavar="QUESTION", nargs="?", help="without it: a conversation")
  add("--checkpoint", required=True, metavar="DIR", help="an export or a Hugging Face folder")
  add("--attention", metavar="FILE.png", help="plot which moments the last question read")
  add("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (%(default)s)")
  add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)g)")
  add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens (%(default)g)")
  add("--seed", type=int, default=0, help="of the draws (%(default)s)")


def run(args: argparse.Namespace) -> int:
  if args.question is not None and not args.question.strip():
    raise UsageError("the question is empty; leave it out for a conversation.")
  if args.attention and not args.attention.lower().endswith(".png"):
    raise UsageError(f"--attention {args.attention}: the file's name must end with .png.")
  if args.attention and not Path(args.attention).absolute().parent.is_dir():
    raise UsageError(f"--attention {args.attention}: there is no such folder.")
  mesh = make_mesh({"tensor": -1})  # All devices: a large model fits on none alone.
  engine = Engine(load_checkpoint(args.checkpoint, mesh), mesh)
  frames = read_media(args.video, engine.export)
  if frames.lost:
    print(f"{args.video}: {frames.lost} frames are damaged and left out", file=sys.stderr)
  session = engine.encode(frames.images)
  turns: list[Turn] = []
  for question in [args.question] if args.question is not None else _questions():
    turns.append({"from": "human", "value": question})
    reply = _answer(engine, turns, session, args)
    if args.attention:
      # Before the reply joins the turns: the prompt ends with the question.
      _plot(engine, turns, session, frames, reply, args.attention)
    turns.append({"from": "gpt", "value": reply})
  return 0


def _questions():
  """Lines of the terminal; of a file or pipe, without the prompt."""
  shown = "> " if sys.stdin.isatty() else ""
  while True:
    try:
      line = input(shown).strip()
    except EOFError:
      return
    if not line:
      return
    yield line


def _answer(
  engine: Engine, turns: Sequence[Turn], session: VideoSession, args: argparse.Namespace
) -> str:
  pieces = []
  options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
  for piece in engine.stream(turns, session, args.max_new_tokens, **options):
    print(piece, end="", flush=True)
    pieces.append(piece)
  print()
  return "".join(pieces)


def _plot(
  engine: Engine,
  turns: Sequence[Turn],
  session: VideoSession,
  frames: ModelFrames,
  reply: str,
  file: str,
) -> None:
  profile = engine.slow_attention(engine.prompt_ids(turns, session), session).profile()
  picture = draw_timeline(
    Timeline(frames.images, frames.timestamps, frames.duration, profile, turns[-1]["value"], reply)
  )
  picture.save(file)
