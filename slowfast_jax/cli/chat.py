# SPDX-License-Identifier: Apache-2.0
"""`slowfast chat`: one question about a video, or a conversation; the answer streams."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from slowfast_jax.checkpoints.open import load_checkpoint
from slowfast_jax.checkpoints.store import Export
from slowfast_jax.data.chat import Turn
from slowfast_jax.errors import UsageError
from slowfast_jax.generate.engine import Engine, VideoSession
from slowfast_jax.generate.timeline import Timeline, draw_timeline
from slowfast_jax.generate.video import ModelFrames, is_picture, read_media, read_video
from slowfast_jax.generate.words import below, draw_words, words_of
from slowfast_jax.sharding import make_mesh

HELP = "ask a checkpoint about a video"

EXAMPLES = """examples:
  slowfast chat clip.mp4 "What falls from the table?" --checkpoint=runs/mine/export
  slowfast chat clip.mp4 "What falls from the table?" --checkpoint=runs/mine/export \\
      --attention moments.png
  slowfast chat film.mp4 "Who comes in?" --checkpoint=runs/mine/export \\
      --start=60 --end=90 --sampler=fps --target-fps=1
  slowfast chat clip.mp4 --checkpoint=runs/mine/export

Without a question it is a conversation: one question a line, an empty line or Ctrl-D ends it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("video", metavar="VIDEO", help="a video or picture file")
  add("question", metavar="QUESTION", nargs="?", help="without it: a conversation")
  add("--checkpoint", required=True, metavar="DIR", help="an export or a Hugging Face folder")
  add("--int8", action="store_true", help="the decoder's weights as int8: a quarter of the memory")
  add("--start", type=float, metavar="SECONDS", help="look at the video from here on")
  add("--end", type=float, metavar="SECONDS", help="look at the video up to here")
  add("--frames", type=int, metavar="N", help="at most so many (as in the model's training)")
  add("--sampler", choices=("uniform", "fps"), help="how they are chosen (as in training)")
  add("--target-fps", type=float, metavar="X", help="frames a second of --sampler=fps")
  add("--attention", metavar="FILE.png", help="plot which moments the last question read")
  add(
    "--attention-of",
    choices=("answer", "words"),
    default="answer",
    help="the moments that the answer came from, or also what each of its words read (%(default)s)",
  )
  add("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (%(default)s)")
  add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)g)")
  add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens (%(default)g)")
  add("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest; 0: from all")
  add("--seed", type=int, default=0, help="of the draws (%(default)s)")
  add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")


def run(args: argparse.Namespace) -> int:
  _check(args)
  mesh = make_mesh({"tensor": -1})  # All devices: a large model fits on none alone.
  engine = Engine(load_checkpoint(args.checkpoint, mesh, int8=args.int8), mesh)
  frames = _read(args, engine.export)
  if frames.lost:
    print(f"{args.video}: {frames.lost} frames are damaged and left out", file=sys.stderr)
  session = engine.encode(frames.images)
  turns: list[Turn] = []
  for question in [args.question] if args.question is not None else _questions():
    turns.append({"from": "human", "value": question})
    reply = _answer(engine, turns, session, args)
    if args.attention:
      # Before the reply joins the turns: the prompt ends with the question.
      _plot(engine, turns, session, frames, reply, args)
    turns.append({"from": "gpt", "value": reply})
  return 0


def _check(args: argparse.Namespace) -> None:
  """
  Raises:
    UsageError: what cannot be meant, before a large model is opened.
  """
  if args.question is not None and not args.question.strip():
    raise UsageError("the question is empty; leave it out for a conversation.")
  if args.attention and not args.attention.lower().endswith(".png"):
    raise UsageError(f"--attention {args.attention}: the file's name must end with .png.")
  if args.attention and not Path(args.attention).absolute().parent.is_dir():
    raise UsageError(f"--attention {args.attention}: there is no such folder.")
  if args.attention_of != "answer" and not args.attention:
    raise UsageError("--attention-of says what --attention FILE.png shows; give both.")
  for name in ("frames", "target_fps", "max_new_tokens"):
    value = getattr(args, name)
    if value is not None and value <= 0:
      raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value:g}.")
  of_videos = ("start", "end", "frames", "sampler", "target_fps")
  given = [f"--{n.replace('_', '-')}" for n in of_videos if getattr(args, n) is not None]
  if given and is_picture(args.video):
    raise UsageError(f"{', '.join(given)}: {args.video} is a picture, which has no time.")
  if args.start is not None and args.end is not None and args.start >= args.end:
    raise UsageError(f"--start {args.start:g} must lie before --end {args.end:g}.")


def _read(args: argparse.Namespace, export: Export) -> ModelFrames:
  if is_picture(args.video):
    return read_media(args.video, export)
  chosen = {
    "num_frames": args.frames,
    "sampler": args.sampler,
    "target_fps": args.target_fps,
  }
  changes = {name: value for name, value in chosen.items() if value is not None}
  video = dataclasses.replace(export.video, **changes)
  return read_video(args.video, export, video, args.start, args.end)


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
  options = {
    "temperature": args.temperature,
    "top_p": args.top_p,
    "top_k": args.top_k,
    "seed": args.seed,
    "stop": args.stop,
  }
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
  args: argparse.Namespace,
) -> None:
  ids = engine.tokenizer.encode(reply) if args.attention_of == "words" else []
  attention = engine.slow_attention(engine.prompt_ids(turns, session), session, ids)
  question = turns[-1]["value"]
  picture = draw_timeline(
    Timeline(
      frames.images, frames.timestamps, frames.duration, attention.profile(), question, reply
    )
  )
  if ids:
    words = words_of(engine.tokenizer, ids, attention.read_by_reply())
    picture = below(picture, draw_words(words, frames.timestamps))
  picture.save(args.attention)
