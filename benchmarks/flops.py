# SPDX-License-Identifier: Apache-2.0
"""What slow tokens cost the language model, by the programs that the TPU compiler makes.

Prefill of a question behind a video: slow-fast against the same decoder with a few frames, or with
all of them, in its sequence; and how the slow path grows with the frames. No TPU is needed.
"""

import argparse
import dataclasses
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = (
  "FLOPs of prefill, from compiled programs: slow-fast against the baselines; growth with frames"
)

PRESET = "slowfast-qwen2-7b-convnext-576-128f"
TOKENS, FAST, TEXT = 81, 1296, 100
FRAMES = (64, 256, 1024, 4096, 16384)
# One chip of it holds the decoder, and the slow tokens of 16,384 frames beside it.
TOPOLOGY = "v5p:2x2x1"


@dataclasses.dataclass(frozen=True)
class Case:
  """One prefill.

  Attributes:
    visual: visual tokens in the sequence.
    slow: slow tokens beside it; 0: a decoder without slow path.
    layers: of the decoder.
  """

  visual: int
  slow: int
  layers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--layers", type=int, default=28, help="decoder layers (default: all 28)")
  parser.add_argument("--json", metavar="FILE", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
  headline = headline_cases(args.layers)
  growth = [Case(FAST, frames * TOKENS, args.layers) for frames in FRAMES]
  found = measure([*headline.values(), *growth])
  flops = {name: one["flops"] for name, one in zip(headline, found)}
  base = flops["16 frames in the sequence"]
  print(f"decoder prefill, {TEXT} text tokens, Qwen2-7B, {args.layers} layers")
  for name, count in flops.items():
    print(f"  {name:<42}{count / 1e12:9.3f} TFLOP  {count / base:7.3f}x")
  print("with more frames beside the same sequence")
  growing = found[len(headline) :]
  for frames, one in zip(FRAMES, growing):
    print(f"  {frames:>6} frames {one['flops'] / 1e12:9.3f} TFLOP {one['memory'] / 2**30:9.2f} GiB")
  for key in ("flops", "memory"):
    print(f"  {key:<6} as frames^{growth_exponent(FRAMES, [one[key] for one in growing]):.3f}")
  if args.json:
    figures = {"headline": flops, "growth": dict(zip(FRAMES, growing))}
    Path(args.json).write_text(json.dumps(figures, indent=1))
  return 0


def headline_cases(layers: int) -> dict[str, Case]:
  """The paper's comparison, its own model first."""
  return {
    "128 frames, slow-fast": Case(FAST, 128 * TOKENS, layers),
    "16 frames in the sequence": Case(16 * TOKENS, 0, layers),
    "128 frames in the sequence": Case(128 * TOKENS, 0, layers),
  }


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
  """The power of size by which costs grow beyond those of the first, which have a constant part."""
  import numpy as np

  x, y = (np.log(np.subtract(values[1:], values[0])) for values in (sizes, costs))
  return float(np.polyfit(x, y, 1)[0])


def measure(cases: Sequence[Case]) -> list[dict[str, float]]:
  """FLOPs of each case, and bytes of memory that it needs, parameters included.

  Raises:
    RuntimeError: the compiler failed; with its last words.
  """
  from slowfast_jax.compile.cost import cost_of
  from slowfast_jax.compile.hlo import parse
  from slowfast_jax.compile.worker import total_memory

  found = []
  for case in cases:
    text, report = _program(case)
    flops = cost_of(parse(text), {"data": 1}).flops
    found.append({"flops": flops, "memory": float(total_memory(report))})
  return found


def _program(case: Case) -> tuple[str, str]:
  """The optimised program and its use of memory, written down before the code is made.

  That would be most of the work, so it is stopped there; it runs in a process of its own.
  """
  from slowfast_jax.compile.worker import environment

  with tempfile.TemporaryDirectory(prefix="flops_") as folder:
    stem, log = f"{folder}/dump/*jit_answer*.after_optimizations", Path(folder, "log")
    command = [sys.executable, "-m", "benchmarks.flops", json.dumps(dataclasses.asdict(case))]
    root = Path(__file__).parent.parent
    with (
      log.open("w") as out,
      subprocess.Popen(
        command, cwd=root, env=environment(folder), stdout=out, stderr=out, start_new_session=True
      ) as worker,
    ):
      try:
        # What comes after both.
        while worker.poll() is None and not glob.glob(f"{stem}_after_buffer_assignment.txt"):
          time.sleep(0.2)
      finally:
        if worker.poll() is None:
          os.killpg(worker.pid, signal.SIGKILL)
    files = [*glob.glob(f"{stem}.txt"), *glob.glob(f"{stem}-memory-usage-report.txt")]
    if len(files) < 2:
      raise RuntimeError(f"the compiler failed:\n{log.read_text(errors='replace')[-2000:]}")
    text, report = (Path(file).read_text() for file in files)
    return text, report


# --- In the worker ---


def _compile(case: Case) -> None:
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec

  from slowfast_jax.generate import programs
  from slowfast_jax.models.presets import build_config
  from slowfast_jax.models.slowfast import SlowFast, graphdef_of
  from slowfast_jax.sharding import make_mesh

  changes: dict[str, Any] = {"decoder": {"num_layers": case.layers}}
  if not case.slow:
    changes["hybrid"] = None
  model = build_config(PRESET, changes)
  described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
  mesh = make_mesh({}, list(described.devices[:1]))

  def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  def answer(model: SlowFast, slow: jax.Array, fast: jax.Array, **arguments: Any):
    kv = model.slow_kv(slow)
    visual = programs.Visual(fast, kv, jnp.full(1, case.slow))
    return programs.prefill(model, visual=visual, max_new_tokens=1, **arguments)

  params = jax.eval_shape(lambda: nnx.state(SlowFast(model, rngs=nnx.Rngs(0))))
  params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), params)
  length, width = case.visual + TEXT, model.decoder.width
  prompts = programs.Prompts(
    array((1, length)),
    array((1, length), jnp.int8),
    array((1,)),
    array((1, TEXT)),
    array((1,), jnp.bool_),
  )
  sampling = programs.Sampling(
    array((1,), jnp.float32), array((1,), jnp.float32), array((1,)), array((1,))
  )
  jitted = programs.jit_program(graphdef_of(model), answer, ("cache_length",))
  with jax.set_mesh(mesh):
    lowered = jitted.lower(
      params,
      slow=array((1, max(case.slow // TOKENS, 1), TOKENS, width), jnp.bfloat16),
      fast=array((1, case.visual, width), jnp.bfloat16),
      prompts=prompts,
      sampling=sampling,
      stop_ids=array((2,)),
      cache_length=length + 1,
    )
    lowered.compile()


if __name__ == "__main__":
  _compile(Case(**json.loads(sys.argv[1])))
