# SPDX-License-Identifier: Apache-2.0
"""The console command `slowfast`: finds the verb, reads its flags, turns its outcome into a code.

A verb is a module `slowfast_jax/cli/VERB.py` with `HELP`, `add_arguments(parser)` and
`run(args) -> int`; `EXAMPLES` stands at the end of its help, and `ACCEPTS_OVERRIDES = True` lets
`--config.a.b=v` through as `args.overrides`. Only the verb that was asked for is imported.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

import slowfast_jax
from slowfast_jax.errors import UsageError, UserError

DONE, FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 42, 130

# The help of each verb once more, so that `slowfast --help` need not import JAX.
VERBS = {
  "demo": "make a small video question set, train on it, evaluate, answer a question",
  "prepare": "turn raw videos and their annotations into frame-sampled records",
  "data": "find what is wrong with data, show distributions, measure a mixture",
  "inspect": "show what is in records, a checkpoint or a config",
  "train": "train a model; the same command again resumes",
  "eval": "evaluate a checkpoint",
  "chat": "ask a checkpoint about a video",
  "serve": "serve a checkpoint: OpenAI's HTTP interface and a web page",
  "compile": "compile a config for TPUs that are not here: does it fit, what does it cost",
  "convert": "convert a checkpoint between Hugging Face and Orbax, or make one of its parts",
  "bench": "run a benchmark of the checkout",
  "doctor": "check what works on this machine and what does not",
}

_OVERRIDE = re.compile(r"--config(\.\w+)+=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one verb. Returns 0 done, 1 failed, 2 wrong usage, 42 preempted and saved, 130 stopped."""
  try:
    code = _run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    return code
  except BrokenPipeError:  # `slowfast inspect ... | head`: the reader has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


def _run(argv: list[str]) -> int:
  try:
    return _dispatch(argv)
  except SystemExit as stop:  # How argparse leaves: 0 after --help, 2 on wrong usage.
    return stop.code if isinstance(stop.code, int) else FAILED
  except UserError as error:
    _say(argv, str(error))
    return USAGE if isinstance(error, UsageError) else FAILED
  except OSError as error:
    if error.filename is None:  # Not about a file that the user named: a bug, so show where.
      raise
    _say(argv, f"{error.filename}: {error.strerror}")
    return FAILED
  except KeyboardInterrupt:
    _say(argv, "stopped by Ctrl-C")
    return INTERRUPTED


def _dispatch(argv: list[str]) -> int:
  if not argv or argv[0].startswith("-"):
    parser = _top_parser()
    parser.parse_args(argv)
    parser.print_help(sys.stderr)
    return USAGE
  verb, *rest = argv
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"there is no verb {verb!r}.{hint} The verbs are: {', '.join(VERBS)}.")
  module = importlib.import_module(f"slowfast_jax.cli.{verb}")
  return module.run(_parse(verb, module, rest))


def _top_parser() -> argparse.ArgumentParser:
  verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
  parser = argparse.ArgumentParser(
    prog="slowfast",
    usage="slowfast VERB [options]",
    description=f"{slowfast_jax.__doc__}\n\nverbs:\n{verbs}",
    epilog="`slowfast VERB --help` shows the options of a verb, with examples.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  version = f"slowfast-jax {slowfast_jax.__version__}"
  parser.add_argument("--version", action="version", version=version)
  return parser


def _parse(verb: str, module: ModuleType, rest: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog=f"slowfast {verb}",
    description=module.HELP,
    epilog=getattr(module, "EXAMPLES", None),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,  # A later option must not change what a script's shortened one means.
  )
  module.add_arguments(parser)
  if not getattr(module, "ACCEPTS_OVERRIDES", False):
    return parser.parse_args(rest)
  args, unknown = parser.parse_known_args(rest)
  wrong = [word for word in unknown if not _OVERRIDE.fullmatch(word)]
  if wrong:
    parser.error(
      f"unrecognized arguments: {' '.join(wrong)} "
      "(a field of the config is changed by --config.SECTION.FIELD=VALUE)"
    )
  args.overrides = unknown
  return args


def _say(argv: list[str], message: str) -> None:
  name = f"slowfast {argv[0]}" if argv and argv[0] in VERBS else "slowfast"
  print(f"{name}: {message}", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())
