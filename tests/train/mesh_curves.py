# SPDX-License-Identifier: Apache-2.0
"""Losses of the same steps on every mesh; a process of its own, with eight CPU devices.

Usage: python -m tests.train.mesh_curves STEPS MESHES, where MESHES is JSON, a list of axis sizes.
Prints, in JSON, for each mesh the losses, and shapes of what one device computes.
"""

import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from slowfast_jax.sharding import make_mesh, sharded_init
from slowfast_jax.train.optimizer import OptimizerConfig
from slowfast_jax.train.setup import place_batch
from slowfast_jax.train.step import init_state, make_train_step
from tests.models.tiny import ROWS, batch_of, config, geometry_of

CONFIG = config(
  vision={"num_layers": 1, "select_layer": -1},
  decoder={"num_layers": 2},
  hybrid={"every": 2, "max_depth": 2},
)
OPTIMIZER = OptimizerConfig(3e-3, 3, 30, weight_decay=0.1)
# Programs are small: optimising them takes longer than running them.
QUICKLY = {"xla_backend_optimization_level": 0}


def batches(count):
  """Packed rows, texts and videos, with other words and pictures at every step."""
  batch, _ = batch_of(ROWS[:8], geometry_of(CONFIG))
  batch = jax.tree.map(np.asarray, batch)
  rng = np.random.default_rng(0)
  for _ in range(count):
    words = rng.integers(1, 24, (2, *batch.tokens.shape))
    pixels = rng.integers(0, 256, batch.frames.shape)
    yield dataclasses.replace(
      batch,
      tokens=words[0].astype(np.int32),
      targets=words[1].astype(np.int32),
      frames=pixels.astype(np.uint8),
    )


# Products whose shapes tell who does what: of patches, and of queries with slow keys.
PRODUCTS = {"patches": "...hwC,hwCE->...E", "reads": "BKGTH,BSKH->BKGTS"}


def shapes_of_products(program):
  """What one device computes of them in the forward pass, as the compiler has laid it out."""
  found = {name: set() for name in PRODUCTS}
  for line in program.splitlines():
    for name, equation in PRODUCTS.items():
      if " dot(" in line and equation in line and "transpose(jvp" not in line:
        shape = re.search(r"= \w+\[([\d,]*)\]", line)[1]
        found[name].add(tuple(map(int, shape.split(","))))
  return {name: sorted(shapes) for name, shapes in found.items()}


def run_on(sizes, steps):
  """Losses of every step on a mesh of these sizes, and the shapes of some products."""
  mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
  init = functools.partial(init_state, CONFIG, OPTIMIZER)
  state = sharded_init(init, mesh, jax.random.key(0), compiler_options=QUICKLY)
  step = make_train_step(CONFIG, OPTIMIZER, dtype=jnp.float32, remat="none")
  with jax.set_mesh(mesh):
    jitted = jax.jit(step, donate_argnums=0, compiler_options=QUICKLY)
    run = jitted.lower(state, place_batch(next(batches(1)), mesh)).compile()
    found = []
    for batch in batches(steps):
      state, metrics = run(state, place_batch(batch, mesh))
      found.append(metrics["loss"])
  losses = np.asarray(jax.device_get(found), float).tolist()
  return {"losses": losses, "products": shapes_of_products(run.as_text())}


def main(steps, meshes):
  print(json.dumps([run_on(sizes, steps) for sizes in meshes]))


if __name__ == "__main__":
  main(int(sys.argv[1]), json.loads(sys.argv[2]))
