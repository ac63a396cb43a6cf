# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for real TPUs, and what the compiled programs hold in memory.

libtpu compiles on any machine; it reads its settings once a process, hence the subprocess.
"""

import pytest

from benchmarks.kernel_programs import compile_cases, fit_exponent, scores_in_memory

SEGMENTS = ["q_segments", "kv_segments"]
FORWARD = "slow_cross_attention_forward"
BACKWARD = "slow_cross_attention_backward"


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_qwen2_7b_heads(topology):
  """Also proves that a mesh of a described topology selects the kernel where no TPU is."""
  cases = [
    ["backward", {"queries": 64, "keys": 5184}, SEGMENTS],
    ["forward", {"queries": 1, "keys": 5184, "batch": 4}, ["kv_lengths"]],
  ]
  trained, decoded = compile_cases(topology, cases)
  assert [any(n in k for k in trained["kernels"]) for n in (FORWARD, BACKWARD)] == [True, True]
  assert len(decoded["kernels"]) == 1


def test_projected_keys_are_not_copied_and_scores_never_reach_memory():
  """Keys and values leave the projection in the layout that the kernel reads."""
  shape = {"queries": 64, "keys": 5184}
  (found,) = compile_cases("v5e:2x2", [["projected", shape, []]])
  one = 5184 * 4 * 128 * 2
  assert found["memory"]["temp_size_in_bytes"] <= 2.1 * one
  assert not [x for x in found["arrays"] if x.startswith("f32") and "5184" in x]


def test_memory_is_linear_in_the_keys():
  """Forward and backward hold nothing of the size of queries x keys (large: none is in VMEM).

  Two sizes here, and few queries, which compile soonest; `slowfast bench kernel --static` fits four
  sizes with 64.
  """
  sizes = (40_960, 81_920)
  cases = [["backward", {"queries": 16, "keys": s}, []] for s in sizes]
  found = compile_cases("v5e:2x2", cases)
  assert fit_exponent(sizes, [sum(x["memory"].values()) for x in found]) <= 1.02
  for size, x in zip(sizes, found):
    assert not scores_in_memory(x["arrays"], size, (16, 112))
