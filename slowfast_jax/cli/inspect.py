# SPDX-License-Identifier: Apache-2.0
"""`slowfast inspect`: what is in records, a checkpoint or a config."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from slowfast_jax.errors import UsageError, UserError

if TYPE_CHECKING:
  import ml_collections

HELP = "show what is in records, a checkpoint or a config"

EXAMPLES = """examples:
  slowfast inspect records/train
  slowfast inspect records/train --html sheet.html     frames and conversations, to look at
  slowfast inspect records/train --html sheet.html --tokenizer qwen2/     and learned tokens
  slowfast inspect runs/mine                           the model of a training run
  slowfast inspect checkpoints/SlowFast-7B             of a Hugging Face folder, tensors unread
  slowfast inspect configs/demo.py                     its fields, and the model that they make
"""


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of thing that can be inspected.

  Attributes:
    name: with its article, for messages.
    matches: whether a path is of this kind; looks at names only.
    describe: the text to print.
    sheet: the HTML page of `--html`; None where there is none.
  """

  name: str
  matches: Callable[[pathlib.Path], bool]
  describe: Callable[[pathlib.Path], str]
  sheet: Callable[[pathlib.Path, argparse.Namespace], str] | None = None


def _is_records(path: pathlib.Path) -> bool:
  from slowfast_jax.data.tfds import split_path

  path = pathlib.Path(split_path(path)[0])
  return any((path / name).exists() for name in ("index.npy", "dataset_info.json", ".prepare"))


def _describe_records(path: pathlib.Path) -> str:
  from slowfast_jax.data.inspect import folder_facts, format_facts
  from slowfast_jax.data.tfds import open_records

  return format_facts(folder_facts(open_records(path)))


def _records_sheet(path: pathlib.Path, args: argparse.Namespace) -> str:
  from slowfast_jax.data.sheet import Chat, contact_sheet
  from slowfast_jax.data.tfds import open_records
  from slowfast_jax.data.tokenizer import Tokenizer

  chat = Chat(Tokenizer.from_dir(args.tokenizer), args.targets) if args.tokenizer else None
  return contact_sheet(open_records(path), chat=chat)


def _is_checkpoint(path: pathlib.Path) -> bool:
  return any((path / name).exists() for name in ("config.json", "export/config.json"))


def _describe_checkpoint(path: pathlib.Path) -> str:
  from slowfast_jax.checkpoints.describe import describe_checkpoint

  return describe_checkpoint(path)


def _is_config(path: pathlib.Path) -> bool:
  # `FILE.py:ARG` calls get_config(ARG).
  return ".py" in (path.suffix, path.suffix.partition(":")[0])


def _describe_config(path: pathlib.Path) -> str:
  from slowfast_jax.config import load_config

  config = load_config(path)
  return "\n".join([str(config).rstrip(), *_model_of(config)])


def _model_of(config: "ml_collections.ConfigDict") -> list[str]:
  """The model that a training config makes; other configs have none."""
  if "preset" not in config.get("model", {}):
    return []
  from slowfast_jax.checkpoints.describe import format_facts, model_facts, video_facts
  from slowfast_jax.checkpoints.export import VideoConfig
  from slowfast_jax.train.plan import model_config

  model, c = model_config(config.model), config.video
  video = VideoConfig(config.data.num_frames, c.sampler, c.target_fps, c.policy)
  return ["", "Its model:", format_facts([*model_facts(model), *video_facts(model, video)])]


# The first that matches describes the path.
KINDS = (
  Kind("a records folder", _is_records, _describe_records, _records_sheet),
  Kind("a checkpoint folder", _is_checkpoint, _describe_checkpoint),
  Kind("a config file (.py)", _is_config, _describe_config),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add("path", metavar="PATH", help=f"{_names()}")
  add("--html", metavar="FILE", help="write a page to look at (records)")
  add("--tokenizer", metavar="DIR", help="of --html: show the tokens, and which carry loss")
  add(
    "--targets",
    choices=("assistant", "reference"),
    default="assistant",
    help="of --tokenizer: which tokens are learned (%(default)s)",
  )


def run(args: argparse.Namespace) -> int:
  path = pathlib.Path(args.path)
  kind = find_kind(path)
  if args.html and kind.sheet is None:
    raise UsageError(f"--html: there is no page for {kind.name} such as {path}")
  if args.tokenizer and not args.html:
    raise UsageError("--tokenizer: is for the page of --html")
  print(kind.describe(path))
  if args.html and kind.sheet:
    _write(pathlib.Path(args.html), kind.sheet(path, args))
  return 0


def describe(path: pathlib.Path) -> str:
  """What is in a path, as text.

  Raises:
    UserError: nothing of a kind that can be inspected is there.
  """
  return find_kind(path).describe(path)


def find_kind(path: pathlib.Path) -> Kind:
  for kind in KINDS:
    if kind.matches(path):
      return kind
  raise UserError(f"{path}: {_what_is(path)}; expected {_names()}")


def _names() -> str:
  return " or ".join(kind.name for kind in KINDS)


def _what_is(path: pathlib.Path) -> str:
  if path.is_dir():
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"a folder with {', '.join(names[:5])}{more}" if names else "an empty folder"
  if path.exists():
    return f"a file of {path.stat().st_size} bytes"
  return "there is no such file or folder"


def _write(file: pathlib.Path, text: str) -> None:
  try:
    file.write_text(text, encoding="utf-8")
  except OSError as error:
    raise UserError(f"--html {file}: cannot be written: {error.strerror}") from error
  print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
