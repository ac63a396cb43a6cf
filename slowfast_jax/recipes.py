# SPDX-License-Identifier: Apache-2.0
"""The training recipe of the released models (semantics section 6); configs/pretrain_* and sft_*.

Stage 1 (`pretrain`) teaches the projector and the slow path to a language model and an encoder that
stay as they are. Stage 2 (`sft`) trains all of it; `sft_lora` gives the language model adapters
instead, which is not of the released recipe. `tiny` makes a twin of either that learns on a
CPU in a minute.
"""

import ml_collections
from ml_collections.config_dict import create

from slowfast_jax.defaults import training_defaults
from slowfast_jax.errors import UsageError
from slowfast_jax.models.presets import PRESETS

TOWERS = {"convnext": "convnext-576", "siglip": "siglip-so400m-patch14-384"}
SIZES = ("full", "tiny")


def pretrain(size: str, decoder: str, tower: str, num_frames: int) -> ml_collections.ConfigDict:
  """Stage 1: the projector learns at 1e-3, every hybrid part at 2e-4, the rest is frozen."""
  c = _common(decoder, tower, num_frames)
  c.optimizer.learning_rate = 1e-3
  c.optimizer.groups = (("^projector", 1.0), ("^adapters", 0.2), ("", 0.0))
  c.train.remat = "minimal"  # The encoder, which is frozen, has no backward pass.
  return _sized(c, size, learning_rate=1e-2)


def sft(size: str, decoder: str, tower: str, num_frames: int) -> ml_collections.ConfigDict:
  """Stage 2: all of the model learns at 2e-5, the encoder too."""
  c = _common(decoder, tower, num_frames)
  c.optimizer.learning_rate = 2e-5
  if tower == "convnext":  # Inputs of its blocks alone, of 64 frames, take 13 GiB of a chip.
    c.train.frame_chunk = 4
  return _sized(c, size, learning_rate=2e-3)


def sft_lora(size: str, decoder: str, tower: str, num_frames: int) -> ml_collections.ConfigDict:
  """Stage 2 with adapters: they learn at 2e-4 and the decoder stays as it is; else as `sft`."""
  c = sft(size, decoder, tower, num_frames)
  c.model.lora.rank = 64 if size == "full" else 4
  c.model.lora.alpha = 2.0 * c.model.lora.rank
  c.optimizer.groups = (("lora", 10.0 if size == "full" else 1.0),)
  return c


def _common(decoder: str, tower: str, num_frames: int) -> ml_collections.ConfigDict:
  """What both stages share."""
  preset = f"slowfast-{decoder}-{TOWERS[tower]}-{num_frames}f"
  model = PRESETS[preset]
  c = training_defaults()
  c.model.preset = preset
  c.video = create(
    sampler="fps", target_fps=4.0, policy="clip" if tower == "convnext" else "siglip"
  )

  pooled = (model.vision.side // model.compressor.video_pooling_stride) ** 2
  fast = 16 * pooled  # Every released setting leaves 16 fast frames.
  length = 3072 if tower == "convnext" else 4096
  c.data.batch_size = 256
  c.data.num_frames = num_frames
  c.data.decoder_length = length
  c.data.text_bound = length - fast
  c.data.pack = True
  # Texts and still images, whose tokens are not pooled, have steps of their own.
  image = model.vision.tokens_per_frame
  c.data.buckets = ((1, length, length - image, c.data.batch_size),)
  c.data.read_threads = 4
  c.data.workers = 4

  c.train.steps = 2000  # One epoch: samples (`slowfast inspect RECORDS`) / data.batch_size.
  c.train.dtype = "bfloat16"
  c.train.remat = "full"
  c.train.checkpoint_every = 250
  c.train.keep = 2

  c.optimizer.warmup_steps = c.train.get_ref("steps") * 3 // 100
  c.optimizer.b2 = 0.999
  # Each of 32 devices has 112 of the 7B's 3,584 channels: see "Which mesh" in docs/compile.md.
  c.mesh.data, c.mesh.fsdp = (-1, 32) if decoder == "qwen2-7b" else (1, -1)
  return c


def _sized(
  c: ml_collections.ConfigDict, size: str, learning_rate: float
) -> ml_collections.ConfigDict:
  """The recipe itself, or its twin: fewer and smaller layers, frames of 16 pixels, short runs."""
  if size not in SIZES:
    raise UsageError(f"{size}: no such size of a recipe; choose from {SIZES}.")
  if size == "full":
    return c
  convnext = "convnext" in c.model.preset
  c.model.vision = create(**(_TINY_CONVNEXT if convnext else _TINY_SIGLIP))
  c.model.decoder = create(
    vocab_size=304, width=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32
  )
  c.model.compressor = create(video_pooling_stride=1, min_fast_frames=2)
  c.model.hybrid = create(every=2)
  c.data.batch_size, c.data.num_frames = 8, 4
  c.data.decoder_length, c.data.text_bound = 128, 100
  c.data.buckets, c.data.workers = (), 0
  c.optimizer.learning_rate = learning_rate  # Small models need and bear larger ones.
  c.train.steps, c.train.log_every, c.train.checkpoint_every = 60, 1, 60
  c.train.dtype = "float32"
  c.mesh.data, c.mesh.fsdp = 1, -1
  return c


_TINY_SIGLIP = {
  "image_size": 16, "patch_size": 8, "width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 16,
}  # fmt: skip
_TINY_CONVNEXT = {"image_size": 16, "depths": (1, 1), "widths": (8, 16)}
