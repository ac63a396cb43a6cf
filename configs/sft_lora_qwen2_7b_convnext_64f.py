# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of Qwen2-7B with ConvNeXt-XXL at 576 pixels, 64 frames, the decoder by adapters (LoRA).

  slowfast train --config=configs/sft_lora_qwen2_7b_convnext_64f.py --workdir=runs/sft \\
    --config.data.records=RECORDS --config.train.init_from=runs/pretrain/export

`configs/sft_lora_qwen2_7b_convnext_64f.py:tiny` is a twin that learns on a CPU in a minute.
"""

import ml_collections

from slowfast_jax import recipes


def get_config(size: str = "full") -> ml_collections.ConfigDict:
  return recipes.sft_lora(size, decoder="qwen2-7b", tower="convnext", num_frames=64)
