# SPDX-License-Identifier: Apache-2.0
"""The smallest model that has every part: learns a handful of samples in seconds on a CPU.

  slowfast train --config=configs/tiny.py --workdir=runs/tiny \\
    --config.data.records=DIR --config.data.tokenizer=DIR
"""

import ml_collections
from ml_collections.config_dict import create

from slowfast_jax.defaults import training_defaults


def get_config() -> ml_collections.ConfigDict:
  c = training_defaults()
  c.model.preset = "demo"
  c.model.vision = create(
    image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_width=16
  )
  c.model.decoder = create(
    vocab_size=304, width=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32
  )
  c.model.compressor = create(sampling_stride=2, temporal_stride=1, min_fast_frames=2)
  c.model.hybrid = create(every=2, min_depth=0, max_depth=3)

  c.data.batch_size = 8
  c.data.num_frames = 4
  c.data.decoder_length = 64
  c.data.text_bound = 56

  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 5
  c.optimizer.final_fraction = 0.1

  c.train.steps = 50
  c.train.log_every = 1
  c.train.checkpoint_every = 20
  return c
