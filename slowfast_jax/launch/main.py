# SPDX-License-Identifier: Apache-2.0
"""The command line of `launch/tpu.py`: a verb and a launch file."""

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slowfast_jax.errors import UsageError, UserError
from slowfast_jax.launch.commands import Command, capture, run_shown
from slowfast_jax.launch.gke import Gke
from slowfast_jax.launch.machines import Machines
from slowfast_jax.launch.retry import Babysitter
from slowfast_jax.launch.settings import Settings, load_settings

VERBS = {
  "up": "rent the machines and wait for them",
  "run": "install the code on every host and start the job",
  "status": "what the machines and the job do",
  "logs": "the end of a host's log",
  "stop": "let the job save and end; the machines stay, and cost",
  "down": "give the machines back",
  "retry": "all of it, again and again, until the job is done",
}
EPILOG = """examples:
  python launch/tpu.py up launch/examples/queued_spot.toml --dry-run
  python launch/tpu.py retry my.toml
  python launch/tpu.py logs my.toml --worker=all --follow
  python launch/tpu.py run my.toml --set job.name=second --set cloud.accelerator=v6e-64
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one verb. Returns 0 done, 1 failed, 2 wrong usage, 130 stopped."""
  args = _parser().parse_args(argv)
  try:
    settings = load_settings(args.file, args.set)
    route = Gke(settings) if settings.cloud.route == "gke" else Machines(settings)
    if args.dry_run:
      print("\n".join(command.render() for command in plan(args, route)))
      return 0
    if args.verb == "retry":
      return _retry(settings, route)
    _run_all(args, route, settings.retry.poll_seconds)
  except UserError as error:
    print(f"tpu.py {args.verb}: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
  except KeyboardInterrupt:
    print("stopped by Ctrl-C; machines and job go on, and `down` gives them back", file=sys.stderr)
    return 130
  return 0


def _parser() -> argparse.ArgumentParser:
  verbs = "\n".join(f"  {name:<8}{text}" for name, text in VERBS.items())
  parser = argparse.ArgumentParser(
    prog="tpu.py",
    description=f"Runs on Cloud TPUs.\n\nverbs:\n{verbs}",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("verb", choices=VERBS, metavar="VERB")
  parser.add_argument("file", help="a launch file; launch/examples/ has some")
  parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
  parser.add_argument(
    "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field"
  )
  parser.add_argument("--worker", default="0", help="whose log: a number or all (default: 0)")
  parser.add_argument("--follow", action="store_true", help="stay and show what the log gets")
  return parser


def plan(args: argparse.Namespace, route: Machines | Gke) -> list[Command]:
  """The commands of a verb; for `retry` those of a run that nothing disturbs."""
  if args.verb == "logs":
    return route.logs(args.worker, args.follow)
  if args.verb != "retry":
    return getattr(route, args.verb)()
  if isinstance(route, Gke):
    return [*route.build(), *route.ship(), route.job_state()]
  return [*route.build(), *route.up(), *route.ship(), route.job_state(), *route.down()]


def _run_all(args: argparse.Namespace, route: Machines | Gke, poll_seconds: float) -> None:
  commands = plan(args, route)
  if args.verb == "up" and isinstance(route, Machines) and not capture(route.describe()).code:
    print("# the request is there already")
    commands = commands[1:]
  for command in commands:
    _run(command, poll_seconds)
  if args.verb in ("up", "run", "stop"):
    print(f"# the machines cost money until: python launch/tpu.py down {shlex.quote(args.file)}")


def _run(command: Command, poll_seconds: float) -> None:
  if not command.until:
    print(command.render(), flush=True)
    run_shown(command)
    return
  last = ""
  while last != command.until:
    outcome = capture(command)
    if outcome.code:
      raise UserError(f"to {command.why}: {outcome.text}")
    if outcome.output.strip() != last:
      last = outcome.output.strip()
      print(f"# the machines are {last}", flush=True)
    if last in ("FAILED", "SUSPENDED", "PREEMPTED", "TERMINATED", "STOPPED"):
      raise UserError(f"the machines are {last} and will not come; `down` removes the request.")
    if last != command.until:
      time.sleep(poll_seconds)


def _retry(settings: Settings, route: Machines | Gke) -> int:
  folder = Path("runs/launch") / settings.job.name
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "retry.log").open("a", encoding="utf-8") as log:

    def say(line: str) -> None:
      now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
      print(f"{now} {line}", flush=True)
      print(f"{now} {line}", file=log, flush=True)

    if isinstance(route, Machines) and (route.bundle / "constraints.txt").exists():  # Copied last.
      # Code that changes half-way through a run would make it two runs.
      say(f"the code is what {route.bundle} has; without that folder it is built anew")
    else:
      for command in route.build():
        run_shown(command)
    try:
      return Babysitter(settings, route, say).watch()
    except UserError as error:
      say(f"gave up: {error}")
      raise
