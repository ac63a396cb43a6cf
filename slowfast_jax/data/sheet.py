# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of records as one HTML file: frames, conversations, and the tokens learned."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from slowfast_jax.data.chat import IMAGE_TOKEN, SYSTEM_PROMPT, encode_chat
from slowfast_jax.data.inspect import folder_facts, format_facts, spread
from slowfast_jax.data.records import Record, RecordsError, RecordSource
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.errors import UserError

_THUMBNAIL = 192
_UNFINISHED = "\ufffd"  # What the bytes of half a character decode to.
# A character has four bytes at most, and a token at least one.
_MOST_TOKENS = 4

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; } .about { margin: 0; opacity: .7; }
.frames { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0; }
figure { margin: 0; } figcaption { font-size: .75rem; opacity: .7; } img { display: block; }
.turn { margin: .1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.human { font-weight: 600; } ol { padding-left: 1.5rem; }
.chat { margin: .3rem 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .87rem; }
.chat span { padding: .1em 0; background: light-dark(#f1f1ee, #26292c); }
.chat span:nth-of-type(odd) { background: light-dark(#e5e5e1, #303438); }
.chat .loss { background: light-dark(#ffe2b8, #6a4300); border-bottom: 2px solid #d55e00; }
.chat .loss:nth-of-type(odd) { background: light-dark(#ffd08a, #845400); }
.chat span.media { background: #0072b2; color: #fff; border-radius: .3em; padding: .1em .5em; }
.chat i { opacity: .5; font-style: normal; } .bad { color: light-dark(#a02c6c, #f08bbf); }
"""


@dataclasses.dataclass(frozen=True)
class Chat:
  """How conversations become tokens, as in training.

  Attributes:
    tokenizer: a ChatML tokenizer.
    targets: which tokens are learned, see `encode_chat`.
    system: system prompt of conversations that bring none.
  """

  tokenizer: Tokenizer
  targets: str = "assistant"
  system: str = SYSTEM_PROMPT


def contact_sheet(
  source: RecordSource,
  num_records: int = 24,
  frames_per_record: int = 8,
  chat: Chat | None = None,
) -> str:
  """A self-contained HTML page: the facts, and some records with frames and conversations.

  Args:
    source: the records.
    num_records: how many, spread evenly over all.
    frames_per_record: how many, spread evenly over the record's.
    chat: shows the tokens of conversations, and which carry loss; None shows their text.
  """
  title = html.escape(f"Records of {source.path}")
  sections = "\n".join(
    _section(record, frames_per_record, chat) for record in spread(source, num_records)
  )
  legend = _LEGEND.format(html.escape(chat.targets)) if chat else ""
  return (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n'
    f"<h1>{title}</h1>\n<pre>{html.escape(format_facts(folder_facts(source)))}</pre>\n"
    f"{legend}{sections}\n</html>\n"
  )


_LEGEND = (
  '<p class="chat"><span>Every</span><span> shade</span><span> is</span><span> a</span>'
  '<span> token.</span> <span class="loss">Underlined</span><span class="loss"> ones</span> '
  "carry loss (targets: {}); ⏎ is a line break.</p>\n"
)


def _section(record: Record, num_frames: int, chat: Chat | None) -> str:
  about = [record.metadata["kind"], record.source]
  if record.duration:
    about.append(f"{record.width}x{record.height}, {record.duration:.1f} s, {record.fps:.4g} fps")
  about.append(f"{len(record.frames)} frames")
  if lost := record.metadata.get("decode_errors"):
    about.append(f"{lost} damaged frames are missing")
  chosen = sorted({int(i) for i in np.linspace(0, len(record.frames) - 1, num_frames)})
  figures = "".join(_figure(record, i) for i in chosen) if record.frames else ""
  talks = "".join(
    f"<li>{_tokens(record, turns, chat) if chat else _turns(turns)}</li>"
    for turns in record.conversations
  )
  return (
    f"<section><h2>{html.escape(record.id)}</h2>"
    f'<p class="about">{html.escape(" · ".join(filter(None, about)))}</p>'
    f'<div class="frames">{figures}</div><ol>{talks}</ol></section>'
  )


def _figure(record: Record, i: int) -> str:
  try:
    picture = Image.open(io.BytesIO(record.frames[i]))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
  except OSError as error:
    raise RecordsError(f"record {record.id!r}: frame {i} is no JPEG: {error}") from error
  small = io.BytesIO()
  picture.save(small, "jpeg", quality=85)
  data = base64.b64encode(small.getvalue()).decode()
  caption = f"{record.timestamps[i]:.2f} s"
  return (
    f'<figure><img src="data:image/jpeg;base64,{data}" alt="frame at {caption}">'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _turns(turns: list[dict[str, str]]) -> str:
  return "".join(
    f'<p class="turn {html.escape(turn["from"])}">{html.escape(turn["value"])}</p>'
    for turn in turns
  )


def _tokens(record: Record, turns: list[dict[str, str]], chat: Chat) -> str:
  """The conversation as training sees it, token by token."""
  num_media = 1 if record.frames else 0
  try:
    encoded = encode_chat(chat.tokenizer, turns, chat.system, chat.targets, num_media)
  except UserError as error:
    reason = html.escape(str(error))
    return f'<p class="bad">Training leaves this out: {reason}</p>{_turns(turns)}'
  spans = []
  for text, learned in token_texts(chat.tokenizer, encoded.ids, encoded.loss_mask):
    if text is None:
      kind = html.escape(f"{record.metadata['kind']}, {len(record.frames)} frames")
      spans.append(f'<span class="media">{kind}</span>')
    else:
      shown = html.escape(text).replace("\n", "<i>⏎</i>\n")
      spans.append(f'<span class="loss">{shown}</span>' if learned else f"<span>{shown}</span>")
  about = f"{len(encoded.ids)} tokens, {sum(encoded.loss_mask)} carry loss"
  return f'<p class="about">{about}</p><p class="chat">{"".join(spans)}</p>'


def token_texts(
  tokenizer: Tokenizer, ids: Sequence[int], loss_mask: Sequence[bool]
) -> Iterator[tuple[str | None, bool]]:
  """The text of each token, and whether it is learned; None for the place of a video or image.

  Tokens that hold parts of one character come together.
  """
  start = 0
  while start < len(ids):
    stop = start + 1
    text = None
    if ids[start] != IMAGE_TOKEN:
      text = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
      while _UNFINISHED in text and stop < min(len(ids), start + _MOST_TOKENS):
        stop += 1
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
    yield text, any(loss_mask[start:stop])
    start = stop
