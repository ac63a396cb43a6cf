# SPDX-License-Identifier: Apache-2.0
"""Compiles context-parallel slow cross-attention, for this machine's devices or a described TPU.

Usage: python -m benchmarks.kernel_mesh TOPOLOGY CASES, where CASES is JSON, a list
of sizes of a Shape; a process of its own, as libtpu wants. Prints, in JSON, for each case bytes of
memory on a device, bytes that collectives send, and the names of kernels.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from slowfast_jax.kernels.cross_attention.context_parallel import Layout, cross_attention_on_mesh
from slowfast_jax.kernels.cross_attention.shapes import Shape
from slowfast_jax.sharding import make_mesh

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def gradients(layout, implementation=None):
  """Output, log-sum-exp, dq, dk and dv as a function of q, k, v, their cotangents and segments."""

  def run(q, k, v, do, dlse, q_segments, kv_segments):
    def attention(q, k, v):
      return cross_attention_on_mesh(
        q,
        k,
        v,
        q_segments=q_segments,
        kv_segments=kv_segments,
        layout=layout,
        implementation=implementation,
      )

    primal, transpose = jax.vjp(attention, q, k, v)
    return *primal, *transpose((do, dlse))

  return run


def compile_on(layout, shape, dtype=jnp.bfloat16, implementation=None):
  """The program of `gradients`, with everything where the layout says."""
  q, k, v = shape.arrays(dtype)
  of_q, of_k = (NamedSharding(layout.mesh, s) for s in layout.specs(shape.batch, shape.kv_heads))

  def placed(shape, dtype, sharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[: len(shape)])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, spec))

  arguments = (
    *(placed(x.shape, dtype, sharding) for x, sharding in ((q, of_q), (k, of_k), (v, of_k))),
    placed(q.shape, dtype, of_q),
    placed(q.shape[:3], jnp.float32, of_q),
    placed(q.shape[:2], jnp.int32, of_q),
    placed(k.shape[:2], jnp.int32, of_k),
  )
  with jax.set_mesh(layout.mesh):
    run = jax.jit(gradients(layout, implementation), out_shardings=(of_q, of_q, of_q, of_k, of_k))
    return run.lower(*arguments).compile()


def collectives(program):
  """(operation, bytes of its result on a device) of every collective of a program."""
  found = []
  for shapes, operation in COLLECTIVE.findall(program.as_text()):
    arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shapes)
    size = sum(BYTES[t] * math.prod(map(int, filter(None, s.split(",")))) for t, s in arrays)
    found.append((operation, size))
  return found


def main(topology, cases):
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  layout = Layout(make_mesh({"context": len(devices)}, list(devices)), "context")
  found = []
  for sizes in cases:
    program = compile_on(layout, Shape(**sizes))
    memory = program.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    found.append({
      "memory": sum(getattr(memory, name) for name in names),
      "temporary": memory.temp_size_in_bytes,
      "collectives": collectives(program),
      "kernels": sorted(set(re.findall(r"slow_cross_attention_\w+", program.as_text()))),
    })  # fmt: skip
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1], json.loads(sys.argv[2]))
