# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face folder has besides the model: small files, and tensors that nothing runs."""

import tempfile

from absl import logging
from etils import epath

from slowfast_jax.checkpoints.export import HubFiles
from slowfast_jax.checkpoints.safetensors_files import SafetensorsFiles, SafetensorsWriter
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
UNUSED_FILE = "unused.safetensors"

# What tells how to use a model. Others (training states, pickles, pictures) stay behind.
_SMALL_FILES = (
  "config.json", "vision_tower_config.json", "generation_config.json", "*processor*config.json",
  "*tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
  "chat_template*", "LICENSE*", "README.md",
)  # fmt: skip


def small_files(folder: epath.Path) -> dict[str, bytes]:
  """The files of a Hugging Face folder that travel with its model, by name."""
  found = {file for pattern in _SMALL_FILES for file in folder.glob(pattern) if not file.is_dir()}
  return {file.name: file.read_bytes() for file in sorted(found)}


def write_hub_files(folder: epath.Path, hub: HubFiles) -> None:
  """Into a folder of an export, which may be in a bucket."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in hub.files.items():
    (folder / name).write_bytes(content)
  if hub.unused:
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in hub.unused.items()}
    with tempfile.TemporaryDirectory() as local:
      writer = SafetensorsWriter(local, described, name=UNUSED_FILE)
      for name, tensor in hub.unused.items():
        writer.write_raw(name, tensor)
      writer.close()
      epath.Path(local, UNUSED_FILE).copy(folder / UNUSED_FILE)


def read_hub_files(folder: epath.Path, head_copy: bool) -> HubFiles:
  """What `write_hub_files` wrote."""
  unused = {}
  if (folder / UNUSED_FILE).exists():
    with SafetensorsFiles(folder / UNUSED_FILE) as files:
      unused = {name: files.read_raw(name) for name in files.tensors}
  return HubFiles(small_files(folder), unused, head_copy)


def open_tokenizer(folder: epath.Path) -> Tokenizer | None:
  """The tokenizer of a Hugging Face folder; None, with a warning, if it is not one for chat.

  The model is of use without it: it takes and gives token ids.
  """
  if not any((folder / name).exists() for name in TOKENIZER_FILES):
    return None
  try:
    return Tokenizer.from_dir(folder)
  except UserError as error:
    logging.warning("%s; the model is opened without a tokenizer", error)
    return None
