# SPDX-License-Identifier: Apache-2.0
"""Requests that a server must refuse: malformed, oversized, lying, or after what is not theirs."""

import base64
import dataclasses
import io
import json
import random
import struct
import zlib
from typing import Any

import httpx
from PIL import Image

_CHAT = "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Hostile:
  """A request and how it must be refused.

  Attributes:
    name: what is wrong with it.
    content: its body.
    statuses: of which the answer must have one.
    path, method, headers: of the request.
  """

  name: str
  content: bytes
  statuses: tuple[int, ...] = (400,)
  path: str = _CHAT
  method: str = "POST"
  headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)

  def send(self, client: httpx.Client, url: str) -> httpx.Response:
    request = {"content": self.content, "headers": dict(self.headers)}
    return client.request(self.method, url + self.path, **request)


def wrong_answer(hostile: Hostile, response: httpx.Response) -> str | None:
  """What is wrong with how the server refused; None where all is right."""
  if response.status_code not in hostile.statuses:
    return f"{hostile.name}: expected {hostile.statuses}, got {response.status_code}"
  try:
    error = response.json()["error"]
    well = set(error) == {"message", "type", "code", "param"} and error["message"]
  except (ValueError, KeyError, TypeError):
    well = False
  return None if well else f"{hostile.name}: not an error of OpenAI's form: {response.text[:200]}"


def chat(**fields: Any) -> bytes:
  """A body that is right but for these fields; None leaves one out."""
  body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
  body = {key: value for key, value in (body | fields).items() if value is not None}
  return json.dumps(body).encode()


def asking(*parts: Any) -> bytes:
  """A user's message of these parts."""
  return chat(messages=[{"role": "user", "content": list(parts)}])


def data_url(content: bytes, mime: str) -> str:
  return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_part(url: str) -> dict[str, Any]:
  return {"type": "image_url", "image_url": {"url": url}}


def video_part(url: str) -> dict[str, Any]:
  return {"type": "video_url", "video_url": {"url": url}}


def huge_png(width: int, height: int) -> bytes:
  """A PNG of a few bytes whose header claims a size."""

  def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(bytes(1000))
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
  )


def small_png() -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), (200, 0, 0)).save(file, "PNG")
  return file.getvalue()


def table() -> list[Hostile]:
  """What is known to be tried."""
  user = {"role": "user", "content": "Hi"}
  png = small_png()
  bodies = {
    "no JSON": b"{",
    "nothing": b"",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "nested deeply": b"[" * 100_000,
    "a long number": b'{"model": "tiny", "seed": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "no messages": chat(messages=None),
    "empty messages": chat(messages=[]),
    "messages as text": chat(messages="Hi"),
    "a message of a number": chat(messages=[5]),
    "no role": chat(messages=[{"content": "Hi"}]),
    "an unknown role": chat(messages=[{"role": "tool", "content": "Hi"}]),
    "no content": chat(messages=[{"role": "user"}]),
    "content of a number": chat(messages=[{"role": "user", "content": 5}]),
    "an unknown part": asking({"type": "input_audio", "input_audio": {}}),
    "a part without text": asking({"type": "text"}),
    "two system messages": chat(messages=[{"role": "system", "content": ""}] * 2 + [user]),
    "an answer at the end": chat(messages=[user, {"role": "assistant", "content": "Yes"}]),
    "half a surrogate pair": b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    "a marker in the text": chat(messages=[{"role": "user", "content": "<video> Hi"}]),
    "two answers": chat(n=2),
    "no tokens": chat(max_tokens=0),
    "too many tokens": chat(max_tokens=10**9),
    "tokens as text": chat(max_tokens="5"),
    "a cold temperature": chat(temperature=-1),
    "NaN": b'{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"temperature":NaN}',
    "top_p of 0": chat(top_p=0),
    "a tool": chat(tools=[{"type": "function"}]),
    "an unknown field": chat(colour="red"),
    "JSON as an answer": chat(response_format={"type": "json_object"}),
    "an empty stop": chat(stop=""),
    "too many stops": chat(stop=["a"] * 100),
    "a long conversation": chat(messages=[{"role": "user", "content": "word " * 5000}]),
    "an address": asking(video_part("https://example.com/a.mp4")),
    "another address": asking(image_part("ftp://example.com/a.png")),
    "a bad data URL": asking(image_part("data:image/png;base64,!!!")),
    "a data URL without base64": asking(image_part("data:image/png,abc")),
    "a torn image": asking(image_part(data_url(png[:40], "image/png"))),
    "a file of two": asking({"type": "file", "file": {"file_id": "a", "file_data": "b"}}),
  }  # fmt: skip
  found = [Hostile(name, content) for name, content in bodies.items()]
  unsupported = {
    "text as an image": image_part(data_url(b"hello", "image/png")),
    "an image as a video": video_part(data_url(png, "video/mp4")),
    "a PNG as a JPEG": image_part(data_url(png, "image/jpeg")),
    "an image in a video part": video_part(data_url(png, "image/png")),
    "SVG": image_part(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")),
  }
  found += [Hostile(name, asking(part), (415,)) for name, part in unsupported.items()]
  bomb = image_part(data_url(huge_png(60_000, 60_000), "image/png"))
  found += [
    Hostile("an image of 3.6 gigapixels", asking(bomb), (413,)),
    Hostile("too large", chat(user="x" * 5_000_000), (413,)),
    Hostile("a local file", asking(video_part("/etc/passwd")), (403,)),
    Hostile("an unknown file", asking({"type": "file", "file": {"file_id": "../../etc"}}), (404,)),
    Hostile("an unknown model", chat(model="gpt-4o"), (404,)),
    Hostile("a form", b"a=b", (415,), headers=(("content-type", "text/plain"),)),
    Hostile("another method", b"", (405,), method="DELETE"),
    Hostile("no such page", b"", (404,), "/v1/completions"),
    Hostile("an upload without a form", b"x", (400,), "/v1/files"),
  ]
  return found


def fuzzed(seed: int) -> Hostile:
  """A right body that was damaged at random, so that it is no longer one."""
  rng = random.Random(seed)
  body = json.loads(asking({"type": "text", "text": "Hi"}, image_part("data:image/png;base64,AA")))
  kind = rng.randrange(3)
  if kind == 0:
    text = bytearray(json.dumps(body).encode())
    del text[rng.randrange(1, len(text)) :]  # Cut, a JSON object is none.
    return Hostile(f"cut, seed {seed}", bytes(text))
  junk = rng.choice([None, -1, 1e308, "", "\x00", [], {}, [[]], {"type": "x"}, True, "x" * 99])
  if kind == 1:
    body[rng.choice(["messages", "stream_options", "stop", "top_k", "seed"])] = [{"a": junk}]
    return Hostile(f"another value, seed {seed}", json.dumps(body).encode())
  # Whatever stands there: the picture is none either.
  part = rng.choice(body["messages"][0]["content"])
  part[rng.choice([*part, "extra"])] = junk
  return Hostile(f"another part, seed {seed}", json.dumps(body).encode(), (400, 415))
