# SPDX-License-Identifier: Apache-2.0
"""The body of `POST /v1/chat/completions`: OpenAI's, as far as a video model can serve it.

A field that this server does not know is refused, never ignored: who asks for a tool or for JSON
shall not get something else without being told. Fields that change no answer are accepted.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slowfast_jax.serve.errors import ApiError, bad_request

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# They change no answer here.
_WITHOUT_EFFECT = (
  "user",
  "metadata",
  "store",
  "service_tier",
  "safety_identifier",
  "prompt_cache_key",
  "prompt_cache_retention",
  "parallel_tool_calls",
)
_MARKERS = ("<image>", "<video>")


class _Model(BaseModel):
  model_config = _STRICT


class MediaUrl(_Model):
  """Where an image or video is."""

  url: str = Field(min_length=1)
  detail: str | None = None  # OpenAI's images have it; every image is read in full here.


class TextPart(_Model):
  """Text as it is shown to the model."""

  type: Literal["text"]
  text: str

  @field_validator("text")
  @classmethod
  def _check(cls, text: str) -> str:
    if any(marker in text for marker in _MARKERS):
      raise ValueError(
        "the text has <image> or <video> in it, which marks the place of one for the model; "
        "leave it out: parts stand where they are sent"
      )
    try:
      text.encode()
    except UnicodeEncodeError:  # Half of a surrogate pair, which JSON can write.
      raise ValueError("the text is not valid Unicode") from None
    return text


class ImagePart(_Model):
  type: Literal["image_url"]
  image_url: MediaUrl


class VideoPart(_Model):
  type: Literal["video_url"]
  video_url: MediaUrl


class FileRef(_Model):
  """An uploaded file, or one that stands here."""

  file_id: str | None = None
  file_data: str | None = None
  filename: str | None = None

  @model_validator(mode="after")
  def _one(self) -> "FileRef":
    if (self.file_id is None) == (self.file_data is None):
      raise ValueError("expected either file_id or file_data")
    return self


class FilePart(_Model):
  type: Literal["file"]
  file: FileRef


Part = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]


class Message(_Model):
  """One turn. Text alone stands for one part."""

  role: Literal["system", "developer", "user", "assistant"]
  content: list[Part]
  name: str | None = None

  @field_validator("content", mode="before")
  @classmethod
  def _parts(cls, content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content

  @model_validator(mode="after")
  def _check(self) -> "Message":
    for part in self.content:
      if part.type != "text" and self.role != "user":
        raise ValueError(f"images and videos stand in user messages, got one of {self.role!r}")
    return self


class StreamOptions(_Model):
  include_usage: bool = False
  include_obfuscation: bool | None = None


class TextFormat(_Model):
  type: Literal["text"]


class ChatBody(_Model):
  """A request for an answer."""

  model: str
  messages: list[Message] = Field(min_length=1, max_length=1000)
  max_tokens: int | None = Field(None, ge=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  temperature: float | None = Field(None, ge=0, le=2)
  top_p: float | None = Field(None, gt=0, le=1)
  top_k: int | None = Field(None, ge=0)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(
    None, max_length=16
  )
  stream: bool | None = False
  stream_options: StreamOptions | None = None
  n: int | None = Field(1, ge=1, le=1)
  presence_penalty: float | None = Field(0, ge=0, le=0)
  frequency_penalty: float | None = Field(0, ge=0, le=0)
  logprobs: Literal[False] | None = None
  response_format: TextFormat | None = None

  @field_validator("stop", mode="before")
  @classmethod
  def _listed(cls, stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop

  @field_validator("messages")
  @classmethod
  def _ends_with_a_question(cls, messages: list[Message]) -> list[Message]:
    if messages[-1].role != "user":
      raise ValueError("the last message must be the user's")
    return messages

  @property
  def token_limit(self) -> int | None:
    asked = self.max_completion_tokens
    return self.max_tokens if asked is None else asked


def parse_chat(body: Any) -> ChatBody:
  """Checks a body that was read from JSON.

  Raises:
    ApiError: 400, with the field.
  """
  if not isinstance(body, dict):
    raise bad_request(f"Expected a JSON object, got {type(body).__name__}.")
  known = {key: value for key, value in body.items() if key not in _WITHOUT_EFFECT}
  try:
    return ChatBody.model_validate(known)
  except ValidationError as error:
    raise _explained(error, known) from None


def _explained(error: ValidationError, body: dict[str, Any]) -> ApiError:
  problem = error.errors(include_url=False, include_context=False)[0]
  param = _field_name(problem["loc"], body)
  got = repr(problem["input"])
  got = got if len(got) <= 80 else got[:77] + "..."
  if problem["type"] == "extra_forbidden":
    return bad_request(f"This server does not know the field {param}.", param, "unknown_field")
  if problem["type"] == "missing":
    return bad_request(f"{param}: the field is missing.", param, "missing_field")
  if param == "n":
    return bad_request(f"n: this server gives one answer a request, got {got}.", param)
  message = problem["msg"].removeprefix("Value error, ")
  return bad_request(f"{param or 'body'}: {message}; got {got}.", param)


def _field_name(loc: tuple[int | str, ...], body: Any) -> str | None:
  """The place as a client writes it: without the names of alternatives that pydantic puts in."""
  name, value = "", body
  for i, key in enumerate(loc):
    inside = isinstance(value, dict) and key in value
    listed = isinstance(value, list) and isinstance(key, int) and key < len(value)
    if not inside and not listed and i + 1 < len(loc):
      continue
    if isinstance(key, int):
      if listed or not isinstance(value, str):
        name += f"[{key}]"
    elif inside or isinstance(value, dict):
      name += f".{key}" if name else key
    value = value[key] if inside or listed else None
  return name or None
