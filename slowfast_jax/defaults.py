# SPDX-License-Identifier: Apache-2.0
"""Every field of a training config, with the value that it has unless a config says otherwise.

A config starts from these and sets what makes it an experiment; what it must set has no default:
`model.preset`, the sizes in `data`, `optimizer.learning_rate` and the lengths of the run.
"""

import ml_collections
from ml_collections.config_dict import create


def training_defaults() -> ml_collections.ConfigDict:
  """A fresh config with all fields that have a default."""
  return create(
    seed=0,
    system="You are a helpful assistant.",
    model=_model(),
    video=create(sampler="uniform", target_fps=2.0, policy="siglip"),
    data=_data(),
    optimizer=_optimizer(),
    train=_train(),
    eval=_eval(),
    mesh=create(data=-1, fsdp=1, context=1, tensor=1),  # -1: the devices that the others leave.
  )


def _model() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.slow = True  # False: no hybrid layers, the fast tokens alone.
  c.lora = create(  # Adapters of the decoder, which itself stays as it is; rank 0: none.
    rank=0, alpha=32.0, modules=("q", "k", "v", "out", "gate", "up", "down")
  )
  c.hybrid_init = "decoder"  # How a slow path that is added starts; or "reference".
  for part in ("vision", "decoder", "compressor", "hybrid"):
    c[part] = ml_collections.ConfigDict()  # Fields of the preset that differ.
  return c


def _data() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.records = ""  # Folders of records, with commas between.
  c.mixture = ""  # A file of records folders and their weights, instead of data.records.
  c.tokenizer = ""  # A folder; "": the one of train.init_from.
  c.pack = False  # Several short samples in a row.
  c.buckets = ()  # Further shapes: (num_frames, decoder_length, text_bound, batch_size).
  c.targets = "assistant"
  c.read_threads = 2
  c.workers = 0  # Processes that read, each with read_threads; 0: this one does.
  c.random_offset = False  # Of longer records, other frames in every epoch.
  c.max_failure_rate = 0.1  # Of the latest thousand samples; more end the run.
  return c


def _optimizer() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.name = "adamw"  # Or adafactor, muon.
  c.schedule = "cosine"  # Or wsd: stable, then linear over the last decay_steps.
  c.decay_steps = 0
  c.final_fraction = 0.0
  c.weight_decay = 0.0
  c.b1 = 0.9
  c.b2 = 0.98
  c.max_grad_norm = 1.0
  c.layer_decay = 1.0  # Of an encoder that learns: factor from block to block, downwards.
  c.groups = ()  # (regex of parameter paths, factor of the learning rate); 0 freezes.
  return c


def _train() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.dtype = "float32"
  c.remat = "none"  # Or, for less memory: dots, minimal, offload, full.
  c.frame_chunk = 0  # Frames that a device encodes at a time, and again backward; 0: all.
  c.compiler_options = ()  # Of XLA, for the step: (name, value).
  c.accumulation = 1  # Parts of a batch, computed one after the other.
  c.z_loss = 0.0  # Weight of the squared log-partition.
  c.log_every = 10
  c.keep = 1
  c.keep_best = ""  # And the best one: by "loss", or by a metric of the evaluation.
  c.max_skipped = 10  # Steps in a row whose loss or gradient is not finite; more end the run.
  c.profile = (0, 0)  # From which step on, and how many; 0 steps: on SIGUSR1 only.
  c.hang_seconds = 1800.0  # A step that takes longer writes down where it is.
  c.trackers = ""  # Besides files: tensorboard, wandb, or both with a comma between.
  c.init_from = ""  # An export to start from; what it lacks of the slow path is added.
  return c


def _eval() -> ml_collections.ConfigDict:
  """While training; see docs/training.md."""
  c = ml_collections.ConfigDict()
  c.every = 0  # Steps; 0: never.
  c.config = "configs/eval_jsonl.py"
  c.questions = ""
  c.videos = ""
  return c
