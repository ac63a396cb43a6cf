# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of other libraries, saved as those libraries save them.

No weight keeps its start: a norm of ones, a bias of zeros or a layer scale of 1e-6 would hide that
it is not loaded.
"""

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 64
IMAGE_SIZE = 64
SIZES = {
  "vocab_size": VOCAB_SIZE,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  # The defaults end a text at id 2, of 151936 and more that they expect.
  "bos_token_id": None,
  "eos_token_id": 1,
  "pad_token_id": 0,
}
# A slow rotation, so that a wrong angle shows within a few positions.
THETA = {"rope_theta": 100.0, "rope_type": "default"}
# Wavelengths from 6 to 350: short ones are kept, long ones stretched, and one lies between.
LLAMA3 = {
  "rope_theta": 100.0,
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
DECODERS = {
  "qwen2": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": THETA}),
  "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA}),
  "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": THETA}),
  "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": LLAMA3}),
}
VISION = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "image_size": IMAGE_SIZE,
  "patch_size": 16,
}
# The other half of a SigLIP or CLIP, which no video model has.
TEXT_SIDE = {
  "hidden_size": 8,
  "intermediate_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 1,
  "vocab_size": 8,
  "bos_token_id": None,
  "eos_token_id": 1,
  "projection_size": 8,
}
# Family, and whether the text side is saved too, as in the published files.
TOWERS = {
  "siglip": ("Siglip", False),
  "clip": ("CLIP", False),
  "siglip-whole": ("Siglip", True),
  "clip-whole": ("CLIP", True),
}
# Weights whose rows are looked up, or added as they are.
TABLES = ("embed_tokens", "position_embedding", "class_embedding")


def decoder(name: str, folder: Path) -> torch.nn.Module:
  """One of DECODERS, written to the folder."""
  family, changes = DECODERS[name]
  config = getattr(transformers, f"{family}Config")(**SIZES | changes)
  model = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
  model.save_pretrained(folder)
  return model


def tower(name: str, folder: Path) -> torch.nn.Module:
  """One of TOWERS, written to the folder."""
  family, whole = TOWERS[name]
  config = getattr(transformers, f"{family}VisionConfig")(**VISION)
  model = randomise(getattr(transformers, f"{family}VisionModel")(config))
  if not whole:
    model.save_pretrained(folder)
    return model
  config = getattr(transformers, f"{family}Config")(
    vision_config=config.to_dict(), text_config=TEXT_SIDE
  )
  both = getattr(transformers, f"{family}Model")(config)
  both.vision_model.load_state_dict(model.state_dict())
  both.save_pretrained(folder)
  return model


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Random weights: matrices keep the size of what they map, nothing else is near its start."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if any(table in name for table in TABLES):
        weight.copy_(noise)
      elif weight.ndim > 1:
        weight.copy_(noise * (weight[0].numel() ** -0.5))
      else:
        # Norms and layer scales are multiplied, biases added.
        weight.copy_(0.25 * noise + (0.0 if "bias" in name else 1.0))
  return model.eval()
