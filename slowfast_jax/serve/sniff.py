# SPDX-License-Identifier: Apache-2.0
"""What a file is, by its content. Its name and label are what a stranger says about it."""

import dataclasses
from typing import Literal

from slowfast_jax.serve.errors import ApiError

Kind = Literal["image", "video"]

_STARTS: tuple[tuple[bytes, str], ...] = (
  (b"\x89PNG\r\n\x1a\n", "image/png"),
  (b"\xff\xd8\xff", "image/jpeg"),
  (b"BM", "image/bmp"),
  (b"II*\x00", "image/tiff"),
  (b"MM\x00*", "image/tiff"),
  (b"GIF87a", "image/gif"),
  (b"GIF89a", "image/gif"),
  (b"\x1aE\xdf\xa3", "video/webm"),
  (b"FLV\x01", "video/x-flv"),
  (b"\x00\x00\x01\xba", "video/mpeg"),
  (b"\x00\x00\x01\xb3", "video/mpeg"),
  (b"OggS", "video/ogg"),
  (b"0&\xb2u\x8ef\xcf\x11", "video/x-ms-wmv"),
)
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
# Pictures that stand in the container of MP4.
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
# Labels that name the same content.
_ALIASES = {
  "image/jpg": "image/jpeg",
  "image/x-ms-bmp": "image/bmp",
  "video/quicktime": "video/mp4",
  "video/x-m4v": "video/mp4",
  "video/3gpp": "video/mp4",
  "video/3gpp2": "video/mp4",
  "video/x-matroska": "video/webm",
  "video/avi": "video/x-msvideo",
  "video/vnd.avi": "video/x-msvideo",
  "video/x-ms-asf": "video/x-ms-wmv",
  "application/ogg": "video/ogg",
}
_UNSAID = ("", "application/octet-stream")


@dataclasses.dataclass(frozen=True)
class FileType:
  """What the content is.

  Attributes:
    mime: its media type; that of the container, where several share one.
    kind: how it is read. An animated GIF is read as a video.
  """

  mime: str
  kind: Kind


def sniff(content: bytes) -> FileType:
  """
  Raises:
    ApiError: 415, neither an image nor a video that can be read.
  """
  mime = _mime(content[:400])
  if mime is None:
    raise ApiError(
      415,
      "The content is no image or video that can be read; send PNG, JPEG, WebP, BMP, TIFF or GIF "
      "images, or MP4, WebM, Matroska, AVI, MPEG, FLV, Ogg or WMV videos.",
      "unsupported_media_type",
    )
  is_picture = mime.startswith("image/") and mime != "image/gif"
  return FileType(mime, "image" if is_picture else "video")


def check_label(label: str, found: FileType) -> None:
  """Refuses content that is not what its label says; no label says nothing.

  Raises:
    ApiError: 415.
  """
  said = label.partition(";")[0].strip().lower()
  if said in _UNSAID or _ALIASES.get(said, said) == found.mime:
    return
  raise ApiError(
    415,
    f"The content is {found.mime}, but its label says {said!r}; send it under its own type.",
    "mislabelled_media",
  )


def _mime(head: bytes) -> str | None:
  for start, mime in _STARTS:
    if head.startswith(start):
      return mime
  if head[:4] == b"RIFF":
    return {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}.get(head[8:12])
  if head[4:8] in _MP4_BOXES:
    return None if head[8:12] in _PICTURE_BRANDS else "video/mp4"
  # Packets of 188 bytes, each with the same first one.
  if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
    return "video/mp2t"
  return None
