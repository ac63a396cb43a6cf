# SPDX-License-Identifier: Apache-2.0
"""The smallest model that has every part: learns a handful of samples in seconds on a CPU.

  slowfast train --config=configs/tiny.py --workdir=runs/tiny \\
    --config.data.records=DIR --config.data.tokenizer=DIR
"""

import ml_collections
from ml_collections.config_dict import create


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.system = "You are a helpful assistant."

  c.model = ml_collections.ConfigDict()
  c.model.preset = "demo"
  c.model.slow = True
  c.model.hybrid_init = "decoder"
  c.model.vision = create(
    image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_width=16
  )
  c.model.decoder = create(
    vocab_size=304, width=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32
  )
  c.model.compressor = create(sampling_stride=2, temporal_stride=1, min_fast_frames=2)
  c.model.hybrid = create(every=2, min_depth=0, max_depth=3)

  c.video = create(sampler="uniform", target_fps=2.0, policy="siglip")

  c.data = ml_collections.ConfigDict()
  c.data.records = ""
  c.data.mixture = ""
  c.data.tokenizer = ""
  c.data.batch_size = 8
  c.data.num_frames = 4
  c.data.decoder_length = 64
  c.data.text_bound = 56
  c.data.pack = False
  c.data.buckets = ()
  c.data.targets = "assistant"
  c.data.read_threads = 2
  c.data.workers = 0
  c.data.random_offset = False
  c.data.max_failure_rate = 0.1

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = "adamw"
  c.optimizer.schedule = "cosine"
  c.optimizer.decay_steps = 0
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 5
  c.optimizer.final_fraction = 0.1
  c.optimizer.weight_decay = 0.0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.98
  c.optimizer.max_grad_norm = 1.0
  c.optimizer.layer_decay = 1.0
  c.optimizer.groups = ()

  c.train = ml_collections.ConfigDict()
  c.train.steps = 50
  c.train.dtype = "float32"
  c.train.remat = "none"
  c.train.accumulation = 1
  c.train.z_loss = 0.0
  c.train.log_every = 1
  c.train.checkpoint_every = 20
  c.train.keep = 1
  c.train.keep_best = ""
  c.train.max_skipped = 10
  c.train.profile = (0, 0)
  c.train.hang_seconds = 1800.0
  c.train.trackers = ""
  c.train.init_from = ""

  c.eval = create(every=0, config="configs/eval_jsonl.py", questions="", videos="")
  c.mesh = create(data=-1, fsdp=1, context=1, tensor=1)
  return c
