# SPDX-License-Identifier: Apache-2.0
"""Makes the files beside it: a tiny random ConvNeXt as timm saves it, and what it computes there.

Recorded and not computed by the tests, because timm needs torchvision, whose published wheel for
Linux does not load beside a PyTorch without CUDA. To record them again:

  pip install timm==1.0.31 torch==2.13.0 torchvision==0.28.0
  python tests/parity/timm_convnext/make.py
"""

from pathlib import Path

import numpy as np
import timm
import torch
from timm.models import save_for_hf

FOLDER = Path(__file__).parent
SIZE = 64
# The released encoder with smaller stages; norms have its epsilon.
SIZES = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 12)}


def main() -> None:
  model = timm.create_model("convnext_xxlarge", num_classes=3, **SIZES).eval()
  model.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if weight.ndim > 1:
        weight.copy_(noise * weight[0].numel() ** -0.5)
      else:
        weight.copy_(0.25 * noise + (0.0 if "bias" in name else 1.0))
    pixels = np.random.default_rng(0).normal(0, 1, (2, SIZE, SIZE, 3)).astype(np.float32)
    pixels = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
    outputs = [model.stem(pixels), *model.forward_intermediates(pixels, intermediates_only=True)]
  save_for_hf(model, FOLDER, model_args=SIZES, safe_serialization=True)
  # Channels last, as everywhere here.
  np.savez(FOLDER / "outputs.npz", *[np.moveaxis(x.numpy(), 1, -1) for x in outputs])


if __name__ == "__main__":
  main()
