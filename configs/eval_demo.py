# SPDX-License-Identifier: Apache-2.0
"""Evaluates a checkpoint on the demo's test questions.

slowfast eval --config=configs/eval_demo.py --checkpoint=runs/demo/slow_fast/export \\
  --workdir=runs/mine/eval
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = "jsonl"
  config.prompt_set = "text"  # The little models answer with the option itself.
  config.questions = "runs/demo/test.jsonl"
  config.videos = "runs/demo/videos"
  config.batch_size = 32
  config.max_new_tokens = 6
  config.decode_cross_attention = True
  config.zero_slow = False  # True: an ablation, the decoder sees slow tokens of zeros.
  config.dtype = "float32"
  config.read_threads = 2
  config.retry_errors = False
  config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
  return config
