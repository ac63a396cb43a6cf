# SPDX-License-Identifier: Apache-2.0
"""How much a client may ask of the server."""

import dataclasses

from slowfast_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Limits:
  """Bounds of a request, and of all requests together.

  Attributes:
    body_mb: megabytes of a request, and of each image or video in it.
    upload_mb: megabytes of all uploaded files; the one that was not used for longest goes.
    video_seconds: length of a video.
    video_frames: frames that a video's file may hold; the model sees a few of them.
    megapixels: of an image, or of a video's frame.
    media: images and videos in one request.
    new_tokens: of an answer.
    queue: requests that wait for a slot.
    request_seconds: from the request to the end of its answer.
    decode_seconds: for reading one image or video.
  """

  body_mb: float = 64.0
  upload_mb: float = 1024.0
  video_seconds: float = 3600.0
  video_frames: int = 250_000
  megapixels: float = 40.0
  media: int = 16
  new_tokens: int = 1024
  queue: int = 64
  request_seconds: float = 300.0
  decode_seconds: float = 60.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        flag = "--max-" + field.name.replace("_", "-")
        raise UsageError(f"{flag} must be positive, got {value:g}.")

  @property
  def body_bytes(self) -> int:
    return int(self.body_mb * 1e6)

  @property
  def upload_bytes(self) -> int:
    return int(self.upload_mb * 1e6)

  @property
  def pixels(self) -> int:
    return int(self.megapixels * 1e6)
