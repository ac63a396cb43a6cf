# SPDX-License-Identifier: Apache-2.0
"""The demo's model: flashes between the frames that the fast tokens keep.

  slowfast train --config=configs/demo.py --workdir=runs/mine \\
    --config.data.records=runs/mine/records --config.data.tokenizer=runs/demo/tokenizer

`configs/demo.py:STAGE` is another stage. Each model learns from still pictures first and then from
videos: slow_fast_stills and slow_fast (the default), or fast_only_stills and fast_only, the same
without the slow path.
"""

import ml_collections

from slowfast_jax.defaults import training_defaults
from slowfast_jax.errors import UsageError

STAGES = ("slow_fast_stills", "slow_fast", "fast_only_stills", "fast_only")


def get_config(stage: str = "slow_fast") -> ml_collections.ConfigDict:
  if stage not in STAGES:
    raise UsageError(f"configs/demo.py:{stage}: no such stage; choose from {STAGES}.")
  model, stills = stage.removesuffix("_stills"), stage.endswith("_stills")
  c = training_defaults()
  c.model.preset = "demo"
  c.model.slow = model == "slow_fast"

  c.data.records = "runs/demo/stills/records" if stills else "runs/demo/records"
  c.data.tokenizer = "runs/demo/tokenizer"
  c.data.batch_size = 32 if stills else 16
  c.data.num_frames = 1 if stills else 32
  c.data.text_bound = 56 if stills else 132
  c.data.decoder_length = c.data.text_bound + (1 if stills else 4)  # And 1 fast token a frame.

  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50 if stills else 20
  c.optimizer.final_fraction = 0.05
  c.optimizer.weight_decay = 0.01
  # One scalar a layer has to travel from 0 to about 1 in the time in which weights move by a few
  # hundredths. The aligned encoder stays as it is: one that goes on learning soon knows its few
  # thousand pictures by heart instead.
  c.optimizer.groups = (("^vision|^projector", 0.0), ("adapters.warm_up", 20.0))

  c.train.steps = 900 if stills else 450
  c.train.checkpoint_every = 250
  c.train.init_from = "runs/demo/encoder" if stills else f"runs/demo/{model}_stills/export"
  return c
