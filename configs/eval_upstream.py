# SPDX-License-Identifier: Apache-2.0
"""Evaluates a checkpoint on a public benchmark with today's public prompts, of lmms-eval 0.7.3.

slowfast eval --config=configs/eval_upstream.py:mlvu --config.questions=/data/mlvu \
  --checkpoint=CHECKPOINT --workdir=runs/mlvu_upstream

Such scores do not compare with the paper's: prompts and the reading of replies have changed since.
"""

import ml_collections

# Where that tool's settings say nothing, 256.
MAX_NEW_TOKENS = {
  "videomme": 16,
  "videomme_w_subtitle": 16,
  "mlvu": 16,
  "mvbench": 16,
  "egoschema": 16,
  "egoschema_subset": 16,
  "longvideobench": 32,
  "activitynetqa": 64,
}


def get_config(task: str = "videomme") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = task
  config.prompt_set = "upstream"
  config.questions = ""  # The folder of the release, or a file of its questions.
  config.videos = ""  # The folder that their videos' paths start from; "": the release's.
  config.batch_size = 32
  config.max_new_tokens = MAX_NEW_TOKENS.get(task, 256)
  config.decode_cross_attention = True
  config.zero_slow = False  # True: an ablation, the decoder sees slow tokens of zeros.
  config.dtype = "bfloat16"
  config.read_threads = 8
  config.retry_errors = False  # True: ask again what could not be asked before.
  config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
  return config
