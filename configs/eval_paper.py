# SPDX-License-Identifier: Apache-2.0
"""Evaluates a checkpoint on a public benchmark as the paper did: its prompts, its settings.

slowfast eval --config=configs/eval_paper.py:mlvu --config.questions=/data/mlvu \
  --checkpoint=CHECKPOINT --workdir=runs/mlvu

/data/mlvu is a copy of the public release, its archives of videos unpacked where they lie.
"""

import ml_collections


def get_config(task: str = "videomme") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = task
  config.prompt_set = "paper"
  config.questions = ""  # The folder of the release, or a file of its questions.
  config.videos = ""  # The folder that their videos' paths start from; "": the release's.
  config.batch_size = 32
  config.max_new_tokens = 256  # The released evaluation's, whatever each task's settings said.
  config.decode_cross_attention = False  # As the released code: only the prompt reads slow tokens.
  config.zero_slow = False  # True: an ablation, the decoder sees slow tokens of zeros.
  config.dtype = "bfloat16"
  config.read_threads = 8
  config.retry_errors = False  # True: ask again what could not be asked before.
  config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
  return config
