# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of Qwen2-7B with ConvNeXt-XXL at 576 pixels, 64 frames: projector and slow path.

  slowfast convert --to orbax runs/start \\
    --llm Qwen2-7B-Instruct/ --vision convnext-576/
  slowfast train --config=configs/pretrain_qwen2_7b_convnext_64f.py --workdir=runs/pretrain \\
    --config.data.records=RECORDS --config.train.init_from=runs/start

`configs/pretrain_qwen2_7b_convnext_64f.py:tiny` is a twin that learns on a CPU in a minute.
"""

import ml_collections

from slowfast_jax import recipes


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  return recipes.pretrain(size, decoder="qwen2-7b", tower="convnext", num_frames=64)
