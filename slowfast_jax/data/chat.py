# SPDX-License-Identifier: Apache-2.0
"""Conversations to token ids: the ChatML template turn by turn, and which tokens are learned."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError

# Stands in the ids where a sample's visual tokens go. Negative, so no text can produce it.
IMAGE_TOKEN = -200
SYSTEM_PROMPT = "You are a helpful assistant."

# A turn in LLaVA's form: {"from": "system" | "human" | "gpt", "value": text}.
Turn = Mapping[str, str]
TARGETS = ("assistant", "reference")

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_PLACEHOLDER = re.compile("<image>|<video>")


@dataclasses.dataclass(frozen=True)
class ChatIds:
  """Token ids of a conversation, with IMAGE_TOKEN where its media go.

  Attributes:
    ids: token ids.
    loss_mask: whether the token is learned, one entry for each id.
  """

  ids: list[int]
  loss_mask: list[bool]


def encode_chat(
  tokenizer: Tokenizer,
  turns: Sequence[Turn],
  system: str = SYSTEM_PROMPT,
  targets: str = "assistant",
  num_media: int | None = None,
) -> ChatIds:
  """Encodes a conversation for training.

  Args:
    tokenizer: a ChatML tokenizer.
    turns: LLaVA turns; `<image>` or `<video>` in a human turn marks the place of a medium.
    system: the system prompt; a system turn at the start takes its place.
    targets: "assistant" learns the assistant's text and its `<|im_end|>`; "reference" also every
      newline, `<|im_start|>` and `<|im_end|>` anywhere, as the released training does.
    num_media: how many placeholders there must be; None does not check.

  Raises:
    UserError: a turn is malformed, or placeholders and media do not match.
  """
  if targets not in TARGETS:
    raise UserError(f"targets must be one of {TARGETS}, got {targets!r}.")
  check_turns(turns, num_media)
  ids: list[int] = []
  mask: list[bool] = []
  for turn in _with_system(turns, system):
    turn_ids, learned = _encode_turn(tokenizer, _ROLES[turn["from"]], turn["value"])
    ids += turn_ids
    mask += learned
  if targets == "reference":
    structure = {tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode("\n")}
    mask = [learned or token in structure for token, learned in zip(ids, mask)]
  return ChatIds(ids, mask)


def encode_prompt(
  tokenizer: Tokenizer,
  question: str | Sequence[Turn],
  system: str = SYSTEM_PROMPT,
  num_media: int = 1,
) -> list[int]:
  """Encodes what the model is to continue: the ids end with `<|im_start|>assistant\\n`.

  Args:
    tokenizer: a ChatML tokenizer.
    question: one question, or the turns of a conversation that ends with a human turn. Without
      any placeholder, the media are put before the first human turn's text, one a line.
    system: the system prompt; a system turn at the start takes its place.
    num_media: how many media the question is about; 0 for text alone.

  Raises:
    UserError: a turn is malformed, or placeholders and media do not match.
  """
  turns = [{"from": "human", "value": question}] if isinstance(question, str) else list(question)
  check_turns(turns, None)
  if turns[-1]["from"] != "human":
    raise UserError(f"A prompt must end with a human turn, got {turns[-1]['from']!r}.")
  if not any(_PLACEHOLDER.search(turn["value"]) for turn in turns):
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
    turns[first] = {"from": "human", "value": "<image>\n" * num_media + turns[first]["value"]}
  chat = encode_chat(tokenizer, turns, system, num_media=num_media)
  return [*chat.ids, tokenizer.im_start_id, *tokenizer.encode("assistant\n")]


def _encode_turn(tokenizer: Tokenizer, role: str, text: str) -> tuple[list[int], list[bool]]:
  """One turn of the template: `<|im_start|>role\\ntext<|im_end|>\\n`."""
  newline = tokenizer.encode("\n")
  if role == "assistant":
    # The header apart from the text: that is how a prompt ends when the model answers, and where
    # the loss begins. Together, a text that opens with a newline would merge with the header's.
    header = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
    body = [*tokenizer.encode(text), tokenizer.im_end_id]
    learned = [False] * len(header) + [True] * len(body) + [False] * len(newline)
    return header + body + newline, learned
  ids = [tokenizer.im_start_id]
  for i, piece in enumerate(_PLACEHOLDER.split(f"{role}\n{text}")):
    ids += [IMAGE_TOKEN] * (i > 0) + tokenizer.encode(piece)
  ids += [tokenizer.im_end_id, *newline]
  return ids, [False] * len(ids)


def _with_system(turns: Sequence[Turn], system: str) -> list[Turn]:
  if turns[0]["from"] == "system":
    return list(turns)
  return [{"from": "system", "value": system}, *turns]


def check_turns(turns: Sequence[Turn], num_media: int | None) -> None:
  """Raises a UserError if a turn is malformed, or placeholders and media do not match."""
  found = 0
  for i, turn in enumerate(turns, start=1):
    role, text = turn.get("from"), turn.get("value")
    if role not in _ROLES:
      raise UserError(f'Turn {i}: "from" must be one of {sorted(_ROLES)}, got {role!r}.')
    if not isinstance(text, str):
      raise UserError(f'Turn {i} ({role}): "value" must be text, got {type(text).__name__}.')
    if role == "system" and i > 1:
      raise UserError(f"Turn {i}: a system turn may only stand first.")
    placeholders = _PLACEHOLDER.findall(text)
    if placeholders and role != "human":
      raise UserError(f"Turn {i} ({role}): {placeholders[0]} may only stand in a human turn.")
    found += len(placeholders)
  if not any(turn["from"] == "human" for turn in turns):
    raise UserError("A conversation needs a human turn, got none.")
  if num_media is not None and found != num_media:
    raise UserError(
      f"{found} placeholder(s) <image>/<video> for {num_media} video(s) or image(s); "
      "write one placeholder in a human turn for each."
    )
