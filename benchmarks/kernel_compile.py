# SPDX-License-Identifier: Apache-2.0
"""Compiles slow cross-attention for a described TPU; a process of its own, as libtpu wants.

Usage: python -m benchmarks.kernel_compile TOPOLOGY CASES, where CASES is JSON, a list of
[what, sizes of a Shape, masks]. Prints, in JSON, memory figures and the HLO's operations by case.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from slowfast_jax.kernels.cross_attention import cross_attention
from slowfast_jax.kernels.cross_attention.shapes import Shape

MEMORY = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")


def program(what, masks):
  def forward(q, k, v, *arrays):
    given = dict(zip(masks, arrays))
    return cross_attention(q, k, v, **given)

  def backward(q, k, v, do, dlse, *arrays):
    _, transpose = jax.vjp(lambda *x: forward(*x, *arrays), q, k, v)
    return transpose((do, dlse))

  def projected(q, x, k_kernel, v_kernel):
    k, v = (jnp.einsum("BSD,DKH->BSKH", x, kernel) for kernel in (k_kernel, v_kernel))
    return forward(q, k, v)

  programs: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "backward": backward,
    "projected": projected,
  }
  return programs[what]


def arguments(what, shape, masks):
  q, k, v = shape.arrays()
  if what == "projected":
    x = jax.ShapeDtypeStruct((shape.batch, shape.keys, 3584), q.dtype)
    kernel = jax.ShapeDtypeStruct((3584, *k.shape[2:]), q.dtype)
    return q, x, kernel, kernel
  lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
  sizes = {
    "kv_lengths": (shape.batch,),
    "q_segments": (shape.batch, shape.queries),
    "kv_segments": (shape.batch, shape.keys),
  }
  arrays = [jax.ShapeDtypeStruct(sizes[name], jnp.int32) for name in masks]
  return (q, k, v, *((q, lse) if what == "backward" else ()), *arrays)


def main(topology, cases):
  device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  mesh = jax.sharding.Mesh([device], "x")
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  found = []
  with jax.set_mesh(mesh):
    for what, sizes, masks in cases:
      inputs = arguments(what, Shape(**sizes), masks)
      inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in inputs]
      compiled = jax.jit(program(what, masks)).lower(*inputs).compile()
      memory = compiled.memory_analysis()
      text = compiled.as_text() or ""
      found.append(
        {
          "memory": {name: getattr(memory, name) for name in MEMORY},
          "kernels": re.findall(r"%(\S*slow_cross_attention\S*) = .* custom-call", text),
          "arrays": sorted(set(re.findall(r"\b(?:bf16|f32|s32|pred)\[[\d,]+\]", text))),
        }
      )
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
