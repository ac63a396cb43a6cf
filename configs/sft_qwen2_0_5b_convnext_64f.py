# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of Qwen2-0.5B with ConvNeXt-XXL at 576 pixels, 64 frames: all of the model.

  slowfast train --config=configs/sft_qwen2_0_5b_convnext_64f.py --workdir=runs/sft \\
    --config.data.records=RECORDS --config.train.init_from=runs/pretrain/export

`configs/sft_qwen2_0_5b_convnext_64f.py:tiny` is a twin that learns on a CPU in a minute.
"""

import ml_collections

from slowfast_jax import recipes


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  return recipes.sft(size, decoder="qwen2-0.5b", tower="convnext", num_frames=64)
