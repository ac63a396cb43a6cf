# SPDX-License-Identifier: Apache-2.0
"""`slowfast prepare`: raw videos and LLaVA-style annotations to frame-sampled records."""

import argparse
import pathlib
import shlex
import shutil

from slowfast_jax.cli.progress import Progress
from slowfast_jax.data.prepare import Report, prepare
from slowfast_jax.data.prepare_beam import beam_runner
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.prepare_plan import format_plan, plan
from slowfast_jax.data.prepare_shards import make_locally
from slowfast_jax.errors import UsageError, UserError

HELP = "turn raw videos and their annotations into frame-sampled records"

EXAMPLES = """examples:
  slowfast prepare --videos clips/ --annotations train.json --output records/train
  slowfast prepare --videos clips/ --annotations train.jsonl --output records/train \\
      --frames 64 --sampler fps --target-fps 4 --size 576 --policy clip

  slowfast prepare --videos a.tar.gz b.tar.gz --annotations train.json --output records/train
  slowfast prepare --videos clips/ --annotations train.json --output records/train --plan
  slowfast prepare --videos /nfs/clips --annotations train.json --output /nfs/records \\
      --runner beam --beam-options "--runner=FlinkRunner --flink_master=host:8081"

The same command again resumes where a killed run stopped. Videos that cannot be read are left out
and listed in OUTPUT/errors.jsonl; OUTPUT/report.json sums up. `slowfast inspect OUTPUT` shows what
is there. An annotation file is a JSON list or has one JSON object a line:

  {"id": "1", "video": "a/b.mp4", "conversations": [
    {"from": "human", "value": "<video>\\nWhat happens?"}, {"from": "gpt", "value": "It rains."}]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  default = PrepareConfig()
  add = parser.add_argument
  add(
    "--videos",
    required=True,
    nargs="+",
    metavar="DIR",
    help="folders that the annotated paths start from, .tar or .tar.gz archives",
  )
  add("--annotations", required=True, metavar="FILE", help="LLaVA-style JSON or JSONL")
  add("--output", required=True, metavar="DIR", help="records folder to write or to resume")
  add("--report", metavar="FILE", help="also write report.json here")
  add("--plan", action="store_true", help="only say what there is to do; write nothing")
  add("--frames", type=int, default=default.num_frames, help="a video, at most (%(default)s)")
  add(
    "--sampler",
    choices=("uniform", "fps"),
    default=default.sampler,
    help="which frames: spread evenly, or at --target-fps (%(default)s)",
  )
  add(
    "--target-fps",
    type=float,
    default=default.target_fps,
    help="frames a second of --sampler fps (%(default)s)",
  )
  add("--size", type=int, default=default.size, help="of the frames, in pixels (%(default)s)")
  add(
    "--policy",
    choices=("siglip", "clip"),
    default=default.policy,
    help="how frames become square: siglip stretches, clip crops (%(default)s)",
  )
  add("--quality", type=int, default=default.quality, help="of the JPEG frames (%(default)s)")
  add("--shards", type=int, help="files (one for every 256 videos)")
  add("--workers", type=int, help="processes (one for every core; with beam, for every shard)")
  add(
    "--runner",
    choices=("local", "beam"),
    default="local",
    help="who does the work: this machine, or an Apache Beam pipeline (%(default)s)",
  )
  add("--beam-options", default="", metavar="WORDS", help="of --runner beam, in one string")
  add(
    "--on-error",
    default=default.on_error,
    metavar="{skip,fail,budget=P%}",
    help="broken videos: go past them, stop at the first, or stop at more than P%% (%(default)s)",
  )
  add(
    "--timeout",
    type=float,
    default=default.timeout,
    help="seconds that one video may take (%(default)g)",
  )
  add("--dedup", action="store_true", help="one record for all media files of the same content")
  add("--follow-links", action="store_true", help="links may lead out of the folders")


def run(args: argparse.Namespace) -> int:
  config = PrepareConfig(
    num_frames=args.frames,
    sampler=args.sampler,
    target_fps=args.target_fps,
    size=args.size,
    policy=args.policy,
    quality=args.quality,
    shards=args.shards,
    workers=args.workers,
    on_error=args.on_error,
    timeout=args.timeout,
    dedup=args.dedup,
    follow_links=args.follow_links,
  )
  if args.beam_options and args.runner != "beam":
    raise UsageError("--beam-options: is for --runner beam")
  if args.plan:
    print(format_plan(plan(args.videos, args.annotations, config)))
    return 0
  runner = beam_runner(shlex.split(args.beam_options)) if args.runner == "beam" else make_locally
  with Progress("Preparing", "videos") as progress:
    report = prepare(args.videos, args.annotations, args.output, config, progress, runner)
  if args.report:
    _copy_report(pathlib.Path(args.output) / "report.json", pathlib.Path(args.report))
  print(_summary(report, args.output))
  return 0


def _copy_report(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
  except OSError as error:
    raise UserError(f"--report {target}: cannot be written: {error}") from error


def _summary(report: Report, output: str) -> str:
  lines = [
    f"{output}: {report.records} records, {report.conversations} conversations, {report.frames} "
    f"frames, {report.num_bytes / 1e6:.1f} MB in {report.shards} shards; {report.seconds:.1f} s"
  ]
  if report.resumed_shards:
    lines.append(f"{report.resumed_shards} shards were already done.")
  if report.duplicates:
    lines.append(f"{report.duplicates} media files repeat the content of another.")
  if report.lost_frames:
    lines.append(f"{report.lost_frames} frames were damaged in their videos and are missing.")
  if report.errors:
    lines.append(f"{report.errors} left out: see {output}/errors.jsonl")
  return "\n".join(lines)
