# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: Qwen2-format byte-level BPE with the ChatML special tokens."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from slowfast_jax.errors import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The chat template that Hugging Face users of an exported folder get; `chat.py` writes the same.
CHAT_TEMPLATE = (
  "{% for message in messages %}"
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
  "{% endif %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# How Qwen2 splits text into words before the merges: digits one by one, newlines kept together.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
  """A ChatML tokenizer whose `encode` never produces a special token.

  What a user types is content: `<|im_end|>` in it stays ten characters of text and cannot end
  a turn. The special tokens of a conversation are put in by id (see `chat.py`).
  """

  def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]):
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    self._backend = backend
    self._config = config
    self.im_start_id = self._special_id(IM_START)
    self.im_end_id = self._special_id(IM_END)
    self.eos_id = self._special_id(_content(config.get("eos_token")) or IM_END)
    self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

  def __reduce__(self):
    # Through __init__: a pickled backend forgets that special tokens in text are to stay text.
    return Tokenizer, (self._backend, self._config)

  @classmethod
  def from_dir(cls, path: str | os.PathLike) -> "Tokenizer":
    """Loads the tokenizer of a Hugging Face folder.

    Read are tokenizer_config.json and tokenizer.json; without the latter, vocab.json and merges.txt
    in Qwen2's layout.

    Raises:
      UserError: a file is missing or unreadable, or the tokenizer has no ChatML special tokens.
    """
    folder = pathlib.Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    if not file.exists() and (folder / "vocab.json").exists():
      file = folder / "vocab.json"
    try:
      if file.name == "vocab.json":
        backend = _qwen2_backend(folder, config)
      else:
        backend = tokenizers.Tokenizer.from_file(str(_existing(file)))
      return cls(backend, config)
    except UserError as error:
      raise UserError(f"{file}: {error}") from None
    except Exception as error:  # The library raises bare Exception.
      raise UserError(f"{file}: not a tokenizer of the tokenizers library: {error}") from error

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; special tokens written in it are encoded as the text they are."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

  def fingerprint(self) -> str:
    """Tells tokenizers apart that give other ids."""
    return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

  def save(self, path: str | os.PathLike) -> None:
    """Writes a folder that `from_dir` and Hugging Face's AutoTokenizer both load."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    self._backend.save(str(folder / "tokenizer.json"))
    text = json.dumps(self._config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

  def _special_id(self, token: str) -> int:
    index = self._backend.token_to_id(token)
    if index is None:
      raise UserError(f"the vocabulary has no token {token!r}; a ChatML tokenizer is needed.")
    return index


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Learns a Qwen2-format tokenizer from texts.

  Args:
    texts: the text to learn merges from.
    vocab_size: the most ids it may have: 256 bytes, learned merges, 3 special tokens.

  Raises:
    UserError: vocab_size has no room for the bytes and the special tokens.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  specials = [END_OF_TEXT, IM_START, IM_END]
  if vocab_size < len(alphabet) + len(specials):
    least = len(alphabet) + len(specials)
    raise UserError(f"vocab_size must be at least {least} (bytes and specials), got {vocab_size}.")
  backend = _empty_backend()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - len(specials),
    initial_alphabet=alphabet,
    special_tokens=[],
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  # After training, so that their ids follow the learned vocabulary, as in Qwen2.
  added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in specials]
  backend.add_special_tokens(added)
  return Tokenizer(backend, _qwen2_config(backend, specials))


def _empty_backend() -> tokenizers.Tokenizer:
  options = {"add_prefix_space": False, "use_regex": False}
  backend = tokenizers.Tokenizer(models.BPE())
  backend.normalizer = normalizers.NFC()
  words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated", invert=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(**options)])
  backend.decoder = decoders.ByteLevel()
  backend.post_processor = processors.ByteLevel(trim_offsets=False, **options)
  return backend


def _qwen2_backend(folder: pathlib.Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer of a folder that was saved without tokenizer.json."""
  backend = _empty_backend()
  merges = _existing(folder / "merges.txt")
  backend.model = models.BPE.from_file(str(folder / "vocab.json"), str(merges))
  added = config.get("added_tokens_decoder", {})
  for index, token in sorted(added.items(), key=lambda item: int(item[0])):
    backend.add_tokens([tokenizers.AddedToken(**token)])
    if backend.token_to_id(token["content"]) != int(index):
      got = backend.token_to_id(token["content"])
      raise UserError(
        f"tokenizer_config.json gives {token['content']!r} the id {index}, but here it gets {got}; "
        "save the tokenizer again so that the folder has a tokenizer.json."
      )
  return backend


def _qwen2_config(backend: tokenizers.Tokenizer, specials: list[str]) -> dict[str, Any]:
  """tokenizer_config.json as Qwen2 ships it."""
  flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
  added = {
    str(backend.token_to_id(token)): {"content": token, **flags, "special": True}
    for token in specials
  }
  return {
    "add_prefix_space": False,
    "added_tokens_decoder": added,
    "additional_special_tokens": [IM_START, IM_END],
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": IM_END,
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": END_OF_TEXT,
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
  }


def _existing(file: pathlib.Path) -> pathlib.Path:
  if not file.is_file():
    raise UserError(f"no such file {file.name}; a Hugging Face tokenizer folder has one.")
  return file


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(_existing(file).read_text(encoding="utf-8"))
  except UserError as error:
    raise UserError(f"{file}: {error}") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{file}: not readable as JSON: {error}") from error
  if not isinstance(config, dict):
    raise UserError(f"{file}: expected a JSON object, got {type(config).__name__}.")
  return config


def _content(token: str | dict[str, Any] | None) -> str | None:
  """Hugging Face writes a token as its text or as an object that has it."""
  return token["content"] if isinstance(token, dict) else token
