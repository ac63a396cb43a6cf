# SPDX-License-Identifier: Apache-2.0
"""The demo's model: flashes between the frames that the fast tokens keep.

  slowfast train --config=configs/demo.py --workdir=runs/mine \\
    --config.data.records=runs/mine/records --config.data.tokenizer=runs/demo/tokenizer

`configs/demo.py:STAGE` is another stage. Each model learns from still pictures first and then from
videos: slow_fast_stills and slow_fast (the default), or fast_only_stills and fast_only, the same
without the slow path.
"""

import ml_collections

from slowfast_jax.errors import UsageError

STAGES = ("slow_fast_stills", "slow_fast", "fast_only_stills", "fast_only")


def get_config(stage: str = "slow_fast") -> ml_collections.ConfigDict:
  if stage not in STAGES:
    raise UsageError(f"configs/demo.py:{stage}: no such stage; choose from {STAGES}.")
  model, stills = stage.removesuffix("_stills"), stage.endswith("_stills")
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.system = "You are a helpful assistant."

  c.model = ml_collections.ConfigDict()
  c.model.preset = "demo"
  c.model.slow = model == "slow_fast"  # False: no hybrid layers, the fast tokens alone.
  c.model.hybrid_init = "decoder"  # How a slow path that is added starts; or "reference".
  c.model.vision = ml_collections.ConfigDict()  # Fields of the preset that differ, as in the rest.
  c.model.decoder = ml_collections.ConfigDict()
  c.model.compressor = ml_collections.ConfigDict()
  c.model.hybrid = ml_collections.ConfigDict()

  c.video = ml_collections.ConfigDict()
  c.video.sampler = "uniform"
  c.video.target_fps = 2.0
  c.video.policy = "siglip"

  c.data = ml_collections.ConfigDict()
  c.data.records = "runs/demo/stills/records" if stills else "runs/demo/records"
  c.data.mixture = ""  # A file of records folders and their weights, instead of data.records.
  c.data.tokenizer = "runs/demo/tokenizer"
  c.data.batch_size = 32 if stills else 16
  c.data.num_frames = 1 if stills else 32
  c.data.text_bound = 56 if stills else 132
  c.data.decoder_length = c.data.text_bound + (1 if stills else 4)  # And 1 fast token a frame.
  c.data.pack = False  # Several short samples in a row.
  c.data.buckets = ()  # Smaller shapes: (num_frames, decoder_length, text_bound, batch_size).
  c.data.targets = "assistant"
  c.data.read_threads = 2
  c.data.workers = 0  # Processes that read, each with read_threads; 0: this one does.
  c.data.random_offset = False  # Of longer records, other frames in every epoch.
  c.data.max_failure_rate = 0.1  # Of the latest thousand samples; more end the run.

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = "adamw"  # Or adafactor, muon.
  c.optimizer.schedule = "cosine"  # Or wsd: stable, then linear over the last decay_steps.
  c.optimizer.decay_steps = 0
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50 if stills else 20
  c.optimizer.final_fraction = 0.05
  c.optimizer.weight_decay = 0.01
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.98
  c.optimizer.max_grad_norm = 1.0
  c.optimizer.layer_decay = 1.0  # Of an encoder that learns: factor from block to block, downwards.
  # (regex of parameter paths, factor of the learning rate). One scalar a layer has to travel from
  # 0 to about 1 in the time in which weights move by a few hundredths. The aligned encoder stays as
  # it is: one that goes on learning soon knows its few thousand pictures by heart instead.
  c.optimizer.groups = (("^vision|^projector", 0.0), ("adapters.warm_up", 20.0))

  c.train = ml_collections.ConfigDict()
  c.train.steps = 900 if stills else 450
  c.train.dtype = "float32"
  c.train.remat = "none"  # Or, for less memory: dots, minimal, offload, full.
  c.train.accumulation = 1  # Parts of a batch, computed one after the other.
  c.train.z_loss = 0.0  # Weight of the squared log-partition.
  c.train.log_every = 10
  c.train.checkpoint_every = 250
  c.train.keep = 1
  c.train.keep_best = ""  # And the best one: by "loss", or by a metric of the evaluation.
  c.train.max_skipped = 10  # Steps in a row whose loss or gradient is not finite; more end the run.
  c.train.profile = (0, 0)  # From which step on, and how many; 0 steps: on SIGUSR1 only.
  c.train.hang_seconds = 1800.0  # A step that takes longer writes down where it is.
  c.train.trackers = ""  # Besides files: tensorboard, wandb, or both with a comma between.
  c.train.init_from = (
    "runs/demo/encoder" if stills else f"runs/demo/{model}_stills/export"
  )  # An export to start from; what it lacks of the slow path is added.

  c.eval = ml_collections.ConfigDict()  # While training; see docs/training.md.
  c.eval.every = 0  # Steps; 0: never.
  c.eval.config = "configs/eval_jsonl.py"
  c.eval.questions = ""
  c.eval.videos = ""

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # All devices that the other axes leave.
  c.mesh.fsdp = 1
  c.mesh.context = 1
  c.mesh.tensor = 1
  return c
