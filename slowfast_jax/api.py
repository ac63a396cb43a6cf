# SPDX-License-Identifier: Apache-2.0
"""The Python interface: `sf.load` a checkpoint, score and continue token ids, or just ask.

```python
import slowfast_jax as sf

vlm = sf.load("SlowFast-Video-MLLM")
print(vlm.chat("clip.mp4", "What falls from the table?"))
```
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32

from slowfast_jax.checkpoints.hf import save_hf
from slowfast_jax.checkpoints.open import load_checkpoint
from slowfast_jax.checkpoints.store import Export, save_export
from slowfast_jax.data.chat import Turn
from slowfast_jax.data.video import VideoPath
from slowfast_jax.errors import UserError
from slowfast_jax.generate.engine import Engine
from slowfast_jax.generate.sessions import SessionStore, VideoSession
from slowfast_jax.generate.video import read_media
from slowfast_jax.models.int8 import has_int8_weights
from slowfast_jax.models.slowfast import SlowFastConfig

_WRITERS = {"orbax": save_export, "huggingface": save_hf}

# Of encoded videos that a model keeps: one of 64 frames takes 0.6 GB in the largest models.
SESSION_BYTES = 2**30

# A sample's media: normalised frames [T, h, w, 3] of a video, or [h, w, 3] of a still image;
# a list of such arrays, one for each -200; None for text alone.
Media = Any


class VLM:
  """A video language model that scores and continues token ids, and answers questions.

  Args:
    export: the model and what is needed to ask it, as `checkpoints` opens it.
    mesh: the devices that it runs on; None: where its parameters are.
    dtype: of the computation; scores are float32 whatever it is.

  Attributes:
    sessions: videos that were encoded; to ask one again costs no more than a text. They take up to
      SESSION_BYTES of the devices' memory, `sessions.clear()` frees it.
  """

  def __init__(self, export: Export, mesh: Mesh | None = None, dtype: str = "float32"):
    self.export = export
    self.engine = Engine(export, mesh, dtype=dtype)
    self.sessions = SessionStore(self.engine, SESSION_BYTES)

  @property
  def config(self) -> SlowFastConfig:
    return self.export.model

  def logits(
    self, input_ids: Sequence[Sequence[int]], frames: Sequence[Media]
  ) -> list[Float32[np.ndarray, "L V"]]:
    """Scores of the vocabulary at every position of every sample.

    Positions are those of the merged sequence: a -200 stands for all fast tokens of its video. It
    is cut on the right at the model's maximum length. Samples do not influence one another.

    Args:
      input_ids: the samples' token ids; -200 marks the place of a video or image.
      frames: of each sample a floating point array [T, h, w, 3] of a video's frames, normalised
        already, or [h, w, 3] of a still image; a list of such arrays where a sample has several
        -200, in their order; None where it has none.

    Returns:
      One array a sample, without rows of padding.

    Raises:
      UserError: what does not fit, and the sample that it is in.
    """
    return self.engine.logits(input_ids, self._sessions(input_ids, frames))

  def generate_ids(
    self,
    input_ids: Sequence[Sequence[int]],
    frames: Sequence[Media],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    decode_cross_attention: bool = True,
    top_k: int = 0,
  ) -> list[list[int]]:
    """New token ids of every sample, with the stop token that ended it, if one did.

    Args:
      input_ids, frames: as in `logits`.
      max_new_tokens: at most so many. They also come where they exceed the model's maximum length.
      temperature: 0 is greedy.
      top_p: draw from the likeliest tokens, which together have this probability.
      seed: of the draws, or one a sample; a draw depends on its own sample and seed alone.
      decode_cross_attention: new tokens read slow tokens, as in training. False: only the
        positions of `input_ids` do, as in the released code.
      top_k: draw from so many of the likeliest tokens; 0: from all.

    Raises:
      UserError: as in `logits`, or an option that is out of range.
    """
    return self.engine.generate(
      input_ids,
      self._sessions(input_ids, frames),
      max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      top_k=top_k,
      seed=seed,
      decode_cross_attention=decode_cross_attention,
    )

  def chat(
    self,
    video: VideoPath | Sequence[VideoPath] | None,
    question: str | Sequence[Turn],
    max_new_tokens: int = 256,
    **options: Any,
  ) -> str:
    """The answer to a question, or to the last one of a conversation.

    Args:
      video: a video or picture file, or several; None asks without any.
      question: text, or the turns of a conversation; `<video>` in it marks a video's place.
      max_new_tokens: at most so many.
      **options: `stop`, a list of strings before which the answer ends; temperature, top_p, top_k,
        seed and decode_cross_attention, as in `generate_ids`.

    Raises:
      UserError: the video cannot be read, the checkpoint has no tokenizer, or the prompt is too
        long for the model.
    """
    return "".join(self.stream(video, question, max_new_tokens, **options))

  def stream(
    self,
    video: VideoPath | Sequence[VideoPath] | None,
    question: str | Sequence[Turn],
    max_new_tokens: int = 256,
    **options: Any,
  ) -> Iterator[str]:
    """Pieces of what `chat` returns, as they come."""
    sessions = [self.sessions.encode(read_media(p, self.export).images) for p in _listed(video)]
    return self.engine.stream(question, sessions, max_new_tokens, **options)

  def _sessions(
    self, input_ids: Sequence[Sequence[int]], frames: Sequence[Media]
  ) -> list[tuple[VideoSession, ...]]:
    """Every sample's encoded media; an array that stands in several samples is encoded once."""
    if len(input_ids) != len(frames):
      raise UserError(
        f"Expected one entry of frames a sample (None for text alone), got {len(frames)} for "
        f"{len(input_ids)} samples."
      )
    arrays = [_listed(media) for media in frames]
    # All are checked before any is encoded: a mistake in the last must not cost minutes.
    pixels = {
      id(array): self._checked(array, f"Sample {i}, video or image {j}")
      for i, sample in enumerate(arrays)
      for j, array in enumerate(sample)
    }
    sessions = {key: self.sessions.encode(array) for key, array in pixels.items()}
    return [tuple(sessions[id(array)] for array in sample) for sample in arrays]

  def _checked(self, media: Any, name: str) -> Float[np.ndarray, "F h w C"]:
    array, size = np.asarray(media), self.config.vision.image_size
    still = array.ndim == 3
    if array.shape[-3:] != (size, size, 3) or array.ndim not in (3, 4) or not len(array):
      raise UserError(
        f"{name}: expected frames [T, {size}, {size}, 3] of a video or [{size}, {size}, 3] of a "
        f"still image, got {list(array.shape)}."
      )
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise UserError(
        f"{name}: expected float32 frames that are normalised, got {array.dtype}; "
        "divide pixels by 255, subtract the vision encoder's mean, divide by its deviation."
      )
    array = array.astype(np.float32)
    return array[None] if still else array


def load(
  path: str | os.PathLike,
  dtype: str = "float32",
  mesh: Mesh | None = None,
  *,
  int8: bool = False,
) -> VLM:
  """Opens a checkpoint.

  Args:
    path: a Hugging Face folder of the official layout, an exported Orbax folder, or the folder of
      a training run that has one.
    dtype: of parameters and computation, e.g. "bfloat16".
    mesh: the devices that it is spread over, see `sharding.make_mesh`; None: the first one.
    int8: keep the decoder's weights as int8 with a scale a channel: a quarter of the memory for
      about a percent of error. Needs the extra `int8`; such a model cannot be saved.

  Raises:
    UserError: the folder holds no model, a part of it is missing or damaged, or the extra is not
      installed.
  """
  return VLM(load_checkpoint(path, mesh, dtype, int8=int8), mesh, dtype)


def save(vlm: VLM, path: str | os.PathLike, format: str = "orbax") -> None:
  """Writes a model as a folder that `load` opens.

  Args:
    vlm: the model.
    path: the folder; one that is there is replaced.
    format: "orbax", or "huggingface": the official layout, which PyTorch code opens too.

  Raises:
    UserError: an unknown format, or the model's weights are int8.
  """
  if format not in _WRITERS:
    raise UserError(f"format must be one of {list(_WRITERS)}, got {format!r}.")
  if has_int8_weights(vlm.export.params):
    raise UserError("The model's weights are int8; load it without `int8` to save it.")
  _WRITERS[format](path, vlm.export)


def _listed(media: Any) -> list[Any]:
  """One of them, several, or none as a list."""
  if media is None:
    return []
  return list(media) if isinstance(media, list | tuple) else [media]
