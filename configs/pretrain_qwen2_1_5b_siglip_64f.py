# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of Qwen2-1.5B with SigLIP-so400m at 384 pixels, 64 frames: projector and slow path.

  slowfast convert --to orbax runs/start \\
    --llm Qwen2-1.5B-Instruct/ --vision siglip-so400m-patch14-384/
  slowfast train --config=configs/pretrain_qwen2_1_5b_siglip_64f.py --workdir=runs/pretrain \\
    --config.data.records=RECORDS --config.train.init_from=runs/start

`configs/pretrain_qwen2_1_5b_siglip_64f.py:tiny` is a twin that learns on a CPU in a minute.
"""

import ml_collections

from slowfast_jax import recipes


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  return recipes.pretrain(size, decoder="qwen2-1.5b", tower="siglip", num_frames=64)
