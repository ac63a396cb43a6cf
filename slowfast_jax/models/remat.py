# SPDX-License-Identifier: Apache-2.0
"""What the backward pass finds in memory of a layer, and what it computes again.

Each layer of the decoder and each block of the encoder is wrapped by `remat`. A policy changes
memory and time, never results.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from slowfast_jax.errors import UserError
from slowfast_jax.kernels.self_attention import RESULT

T = TypeVar("T")

# The inputs of attention, which `keep` marks, and its output, which attention does. They are a
# tenth of what a layer computes, and cost the most to compute again.
KEPT = ("queries", "keys", "values", RESULT)
# Results of products with weights. JAX's own policy for them does not look into `layers.linear`.
PRODUCT = "product"

_policies = jax.checkpoint_policies

# By name, from most memory to least:
#   none     everything is kept;
#   dots     results of matrix products with weights and of attention are kept, the rest is computed
#            again;
#   minimal  inputs and outputs of attention are kept, norms and MLPs are computed again;
#   offload  the same, and what is kept waits in the host's memory;
#   full     nothing is kept but the layers' inputs.
_POLICIES = {
  "none": None,
  "dots": _policies.save_only_these_names(PRODUCT, RESULT),
  "minimal": _policies.save_only_these_names(*KEPT),
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(KEPT),
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "full": _policies.nothing_saveable,
}
REMAT = tuple(_POLICIES)


def remat(function: Callable[..., T], policy: str) -> Callable[..., T]:
  """The function, of which the backward pass finds what the policy keeps; one of REMAT.

  Raises:
    UserError: there is no such policy.
  """
  if policy not in _POLICIES:
    raise UserError(f"train.remat must be one of {REMAT}, got {policy!r}.")
  if policy == "none":
    return function
  return jax.checkpoint(function, policy=_POLICIES[policy])


def keep(x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
  """Marks an array for the policies that keep it; the name is PRODUCT or one of KEPT."""
  return checkpoint_name(x, name)
