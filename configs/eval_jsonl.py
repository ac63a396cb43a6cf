# SPDX-License-Identifier: Apache-2.0
"""Evaluates a checkpoint on questions of one's own.

slowfast eval --config=configs/eval_jsonl.py --config.questions=test.jsonl --config.videos=videos \
  --checkpoint=runs/mine/export --workdir=runs/mine/eval
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = "jsonl"
  config.prompt_set = ""  # The task's own.
  config.questions = ""  # The file or folder of the task's questions.
  config.videos = ""  # The folder that their videos' paths start from.
  config.batch_size = 8
  config.max_new_tokens = 16
  config.decode_cross_attention = True
  config.zero_slow = False  # True: an ablation, the decoder sees slow tokens of zeros.
  config.dtype = "float32"
  config.read_threads = 2
  config.retry_errors = False  # True: ask again what could not be asked before.
  config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
  return config
