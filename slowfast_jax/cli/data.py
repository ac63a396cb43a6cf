# SPDX-License-Identifier: Apache-2.0
"""`slowfast data`: what is wrong with data, how they are distributed, what a mixture amounts to."""

import argparse
import json
import pathlib

from slowfast_jax.cli.progress import Progress
from slowfast_jax.errors import UsageError, UserError

HELP = "find what is wrong with data, show distributions, measure a mixture"

EXAMPLES = """examples:
  slowfast data validate --annotations train.json --videos clips/
  slowfast data validate --annotations train.json --tokenizer qwen2/ --max-tokens 8192
  slowfast data validate records/train
  slowfast data stats records/train --tokenizer qwen2/ --output pictures/
  slowfast data stats train.json
  slowfast data mix mixture.json --tokenizer qwen2/ --samples 1000000

`validate` prints a line for every problem, with its place, and ends with 1 if there is any. A
mixture file lists records folders; without weights each sample comes equally often:

  [{"name": "talks", "path": "records/talks", "weight": 3, "licence": "CC-BY-4.0"},
   {"name": "stills", "path": "records/stills", "weight": 1, "licence": "MIT"}]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  commands = parser.add_subparsers(dest="command", required=True, metavar="{validate,stats,mix}")
  for name, (add, text) in {
    "validate": (_add_validate, "find everything that is wrong"),
    "stats": (_add_stats, "distributions of frames, durations, tokens, turns"),
    "mix": (_add_mix, "what a mixture file amounts to"),
  }.items():
    add(commands.add_parser(name, help=text, description=text, allow_abbrev=False))


def _add_validate(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("path", nargs="?", metavar="PATH", help="records folder, or annotation file")
  add("--annotations", metavar="FILE", help="LLaVA-style JSON or JSONL")
  add("--videos", nargs="+", metavar="DIR", help="folders or archives; files are opened")
  add("--follow-links", action="store_true", help="links may lead out of the folders")
  add("--tokenizer", metavar="DIR", help="folder with tokenizer.json, to find samples too long")
  add("--max-tokens", type=int, metavar="N", help="decoder positions of a row")
  add(
    "--visual-tokens", type=int, default=0, metavar="N", help="of them, for a video (%(default)s)"
  )
  add("--workers", type=int, help="processes (one for every core)")
  add("--timeout", type=float, default=60.0, help="seconds for one file (%(default)g)")
  add("--show", type=int, default=100, metavar="N", help="problems to print (%(default)s)")
  add("--report", metavar="FILE", help="write all problems here, one JSON object a line")


def _add_stats(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("path", metavar="PATH", help="records folder, or annotation file")
  parser.add_argument("--tokenizer", metavar="DIR", help="counts tokens instead of words")
  parser.add_argument("--output", metavar="DIR", help="write stats.json and a PNG for each")


def _add_mix(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("path", metavar="FILE", help="mixture file")
  parser.add_argument("--tokenizer", metavar="DIR", help="counts tokens instead of words")
  parser.add_argument("--samples", type=int, metavar="N", help="to draw (all that there are)")
  parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
  return {"validate": _validate, "stats": _stats, "mix": _mix}[args.command](args)


def _validate(args: argparse.Namespace) -> int:
  from slowfast_jax.data.validate import (
    LengthLimit,
    default_workers,
    is_annotations,
    validate_annotations,
    validate_records,
  )

  path = args.annotations or args.path
  if path is None or (args.annotations and args.path):
    raise UsageError("validate: give a records folder, or --annotations FILE")
  if bool(args.tokenizer) != bool(args.max_tokens):
    raise UsageError("validate: --tokenizer and --max-tokens go together")
  limit = None
  if args.tokenizer:
    limit = LengthLimit(_tokenizer(args.tokenizer), args.max_tokens, args.visual_tokens)
  if not is_annotations(path):
    with Progress("Validating", "records") as progress:
      found = validate_records(path, limit, progress)
  elif args.videos:
    workers = args.workers or default_workers()
    with Progress("Validating", "files") as progress:
      found = validate_annotations(
        path, args.videos, limit, workers, args.timeout, progress, args.follow_links
      )
  else:
    found = validate_annotations(path, None, limit)
  for problem in found.problems[: args.show]:
    print(problem)
  if (more := len(found.problems) - args.show) > 0:
    print(f"and {more} more")
  if args.report:
    lines = [{"place": p.place, "reason": p.reason} for p in found.problems]
    _write(args.report, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
  checked = f"{found.conversations} conversations"
  if found.media:
    checked += f", {found.media} {'files' if is_annotations(path) else 'records'}"
  print(f"{path}: {checked}: {len(found.problems) or 'no'} problems")
  return 1 if found.problems else 0


def _stats(args: argparse.Namespace) -> int:
  from slowfast_jax.data.stats import format_stats, gather, write_pictures

  stats = gather(args.path, _tokenizer(args.tokenizer))
  print(format_stats(stats))
  if args.output:
    files = write_pictures(stats, args.output)
    _write(f"{args.output}/stats.json", json.dumps(stats.to_json(), indent=2) + "\n")
    print(f"\nwrote {args.output}/stats.json and {', '.join(file.name for file in files)}")
  return 0


def _mix(args: argparse.Namespace) -> int:
  import dataclasses

  from slowfast_jax.data.mixture_stats import format_mixture, measure_mixture

  if args.samples is not None and args.samples < 1:
    raise UsageError(f"mix: --samples must be at least 1, got {args.samples}")
  shares = measure_mixture(args.path, _tokenizer(args.tokenizer), args.samples)
  if args.json:
    print(json.dumps([dataclasses.asdict(share) for share in shares], indent=2))
  else:
    print(format_mixture(shares, "tokens" if args.tokenizer else "words"))
  return 0


def _tokenizer(folder: str | None):
  from slowfast_jax.data.tokenizer import Tokenizer

  return Tokenizer.from_dir(folder) if folder else None


def _write(file: str, text: str) -> None:
  try:
    pathlib.Path(file).write_text(text, encoding="utf-8")
  except OSError as error:
    raise UserError(f"{file}: cannot be written: {error.strerror}") from error
