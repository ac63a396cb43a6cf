# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Qwen2 in PyTorch, with the sizes of one of our decoders, to compare with."""

from typing import Any

from slowfast_jax.errors import UserError
from slowfast_jax.models.decoder import DecoderConfig


def make_qwen2(sizes: DecoderConfig) -> Any:
  """A random Qwen2ForCausalLM.

  Raises:
    UserError: PyTorch or Transformers is missing.
  """
  try:
    import torch  # noqa: F401
    from transformers import Qwen2Config, Qwen2ForCausalLM
  except ImportError as error:
    raise UserError(
      f"The other side needs PyTorch and transformers ({error}); install them with "
      "`pip install -e .[parity]`."
    ) from error
  return Qwen2ForCausalLM(
    Qwen2Config(
      vocab_size=sizes.vocab_size,
      hidden_size=sizes.width,
      intermediate_size=sizes.mlp_width,
      num_hidden_layers=sizes.num_layers,
      num_attention_heads=sizes.num_heads,
      num_key_value_heads=sizes.num_kv_heads,
      tie_word_embeddings=sizes.tie_embeddings,
    )
  )
