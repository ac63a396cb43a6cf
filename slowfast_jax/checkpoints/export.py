# SPDX-License-Identifier: Apache-2.0
"""A model with all that is needed to ask it: what every kind of checkpoint is opened as."""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from slowfast_jax.checkpoints.safetensors_files import RawTensor
from slowfast_jax.data.tokenizer import Tokenizer
from slowfast_jax.models.slowfast import SlowFastConfig


@dataclasses.dataclass(frozen=True)
class VideoConfig:
  """How frames are taken from a video, so that a question is asked as the training asked it.

  Attributes:
    num_frames: frames of a video.
    sampler: "uniform" or "fps".
    target_fps: frames a second of "fps".
    policy: how a frame becomes square, see `data.preprocess`.
  """

  num_frames: int
  sampler: str = "uniform"
  target_fps: float = 2.0
  policy: str = "siglip"


@dataclasses.dataclass(frozen=True)
class HubFiles:
  """What a Hugging Face folder has besides the model, so that it can be written again.

  Attributes:
    files: config.json as it was, and the files of tokenizer and processor, by name.
    unused: tensors that the model does not run, by name.
    head_copy: the embeddings are stored a second time, as lm_head.weight.
  """

  files: Mapping[str, bytes]
  unused: Mapping[str, RawTensor] = dataclasses.field(default_factory=dict)
  head_copy: bool = False


@dataclasses.dataclass(frozen=True)
class Export:
  """A model with all that is needed to ask it.

  Attributes:
    model: its sizes and variants.
    params: the parameters of `SlowFast(model)`.
    tokenizer: the tokenizer that it was trained with; None where the checkpoint has none.
    video: how frames are taken from a video.
    system: the system prompt.
    max_length: longer merged sequences are cut on the right; None: there is no limit.
    stop_ids: tokens that end a reply, besides those that the tokenizer names.
    hub: what must travel along for a Hugging Face folder; None: it never was one.
  """

  model: SlowFastConfig
  params: nnx.State
  tokenizer: Tokenizer | None
  video: VideoConfig
  system: str
  max_length: int | None = None
  stop_ids: tuple[int, ...] = ()
  hub: HubFiles | None = None
