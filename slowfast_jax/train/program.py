# SPDX-License-Identifier: Apache-2.0
"""The steps as compiled programs, one for each shape that batches have.

All are compiled ahead, before the first step: every step takes as long as any other, what does not
fit into memory is found out at once, and nothing can be lost meanwhile.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.models.lora import LORA
from slowfast_jax.shapes import Batch
from slowfast_jax.train.flops import model_flops, training_flops
from slowfast_jax.train.metrics import Step, instrument
from slowfast_jax.train.optimizer import split_frozen
from slowfast_jax.train.plan import Plan
from slowfast_jax.train.setup import Setup, place_batch
from slowfast_jax.train.step import TrainState

Say = Callable[[str], Any]
Shapes = tuple[tuple[int, ...], ...]

_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Options of the compiler by the start of a device's kind. Left to itself it stops a v6e for every
# exchange; its SparseCores can run them beside the products. And it gives products 32 MiB of VMEM;
# with 64 they run faster, and half as long again is compiled. Not where frames come in chunks: 7B
# with ConvNeXt, whose program is the longest, would take 12.5 GiB of host memory, instead of 9.5.
_OPTIONS = {
  "TPU v6": {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    _VMEM: 65536,
  }
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A step that is ready to run.

  Attributes:
    run: the compiled step; it donates the state.
    flops: of the model in one step, on all devices together.
  """

  run: Step
  flops: float


def shapes_of(batch: Batch) -> Shapes:
  """By which the program of a batch is found."""
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def compile_steps(setup: Setup, state: TrainState, say: Say) -> dict[Shapes, Program]:
  """The program of every shape that steps have."""
  batches = [place_batch(batch, setup.mesh) for batch in setup.pipeline.empty_batches()]
  return {
    shapes_of(batch): Program(compile_step(setup, state, batch, say), step_flops(setup, batch))
    for batch in batches
  }


def compile_step(setup: Plan, state: TrainState, batch: Batch, say: Say) -> Step:
  """The step for batches of this one's shape; the state is donated to it."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    instrument(setup.train_step(), setup.model, setup.optimizer),
    out_shardings=(shardings, NamedSharding(setup.mesh, PartitionSpec())),
    donate_argnums=0,
    compiler_options=compiler_options(setup),
  )
  say("compiling")
  began = time.monotonic()
  with jax.set_mesh(setup.mesh):
    compiled = jitted.lower(state, batch).compile()
  say(f"compiled in {time.monotonic() - began:.1f} s")
  return compiled


def compiler_options(plan: Plan) -> dict[str, Any]:
  """Those of the devices, and those of train.compiler_options, which win."""
  kind = plan.mesh.devices.flat[0].device_kind
  known = next((options for name, options in _OPTIONS.items() if kind.startswith(name)), {})
  if plan.config.train.frame_chunk:
    known = {name: value for name, value in known.items() if name != _VMEM}
  return known | dict(plan.config.train.compiler_options)


def step_flops(setup: Plan, batch: Batch) -> float:
  """Model FLOPs of a step on such a batch."""
  B, F = batch.frames.shape[:2]
  forward = model_flops(
    setup.model,
    num_frames=F,
    decoder_length=batch.tokens.shape[1],
    text_bound=batch.text_index.shape[1],
    fast_frames=batch.pooling.shape[1],
  )
  learning, _ = split_frozen(setup.abstract_state().params, setup.optimizer)
  parts = {"lora" if LORA in name else name.split(".")[0] for name in flatten(learning)}
  return B * sum(training_flops(forward, parts).values())
