# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval finds through its entry point `lmms_eval.models`; nothing is imported before."""

from typing import Any


def manifests() -> Any:
  """The model `slowfast_jax`, for tasks of both kinds."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(
    model_id="slowfast_jax",
    simple_class_path="slowfast_jax.eval.lmms_model.Simple",
    chat_class_path="slowfast_jax.eval.lmms_model.Chat",
  )
