# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for real TPUs, and what the compiled programs hold in memory.

libtpu compiles on any machine; it reads its settings once a process, hence the subprocess.
"""

import json
import os
import subprocess
import sys

import pytest

TPU = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5e-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
SEGMENTS = ["q_segments", "kv_segments"]
FORWARD = "slow_cross_attention_forward"
BACKWARD = "slow_cross_attention_backward"


def compile_for(topology, *cases):
  """What tests/kernels/compile_for_tpu.py prints."""
  command = [sys.executable, "-m", "tests.kernels.compile_for_tpu", topology, json.dumps(cases)]
  # Compiled programs for a TPU have no place in the cache of the machine's own.
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  done = subprocess.run(command, env={**env, **TPU}, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_qwen2_7b_heads(topology):
  """Also proves that a mesh of a described topology selects the kernel where no TPU is."""
  trained, decoded = compile_for(
    topology,
    ["backward", {"queries": 64, "keys": 5184}, SEGMENTS],
    ["forward", {"queries": 1, "keys": 5184, "batch": 4}, ["kv_lengths"]],
  )
  assert [any(n in k for k in trained["kernels"]) for n in (FORWARD, BACKWARD)] == [True, True]
  assert len(decoded["kernels"]) == 1


def test_projected_keys_are_not_copied_and_scores_never_reach_memory():
  """Keys and values leave the projection in the layout that the kernel reads."""
  shape = {"queries": 64, "keys": 5184}
  (found,) = compile_for("v5e:2x2", ["projected", shape, []])
  one = 5184 * 4 * 128 * 2
  assert found["memory"]["temp_size_in_bytes"] <= 2.1 * one
  assert not [x for x in found["arrays"] if x.startswith("f32") and "5184" in x]


def test_memory_is_linear_in_the_keys():
  """Forward and backward hold nothing of the size of queries x keys (large: none is in VMEM)."""
  sizes = (41_472, 82_944)
  found = compile_for("v5e:2x2", *(["backward", {"queries": 64, "keys": s}, []] for s in sizes))
  total = [sum(x["memory"].values()) for x in found]
  assert total[1] <= 2.02 * total[0]
  for size, x in zip(sizes, found):
    scores = [a for a in x["arrays"] if str(size) in a and ("64," in a or "448" in a)]
    assert not scores
