# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of Qwen2-1.5B with SigLIP-so400m at 384 pixels, 64 frames: all of the model.

  slowfast train --config=configs/sft_qwen2_1_5b_siglip_64f.py --workdir=runs/sft \\
    --config.data.records=RECORDS --config.train.init_from=runs/pretrain/export

`configs/sft_qwen2_1_5b_siglip_64f.py:tiny` is a twin that learns on a CPU in a minute.
"""

import ml_collections

from slowfast_jax import recipes


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  return recipes.sft(size, decoder="qwen2-1.5b", tower="siglip", num_frames=64)
