# SPDX-License-Identifier: Apache-2.0
"""A model of the demo's size can learn a handful of samples by heart."""

import jax
import jax.numpy as jnp
import numpy as np

from slowfast_jax.data.packing import Geometry, Sample, build_row, collate
from slowfast_jax.models.presets import PRESETS
from slowfast_jax.train.optimizer import OptimizerConfig
from slowfast_jax.train.plan import geometry_of
from slowfast_jax.train.step import init_state, make_train_step

STEPS = 80


def samples(geometry: Geometry) -> list[Sample]:
  """32 videos of random pictures: the same question, 32 answers of three random words."""
  rng = np.random.default_rng(0)
  videos = rng.integers(0, 256, (32, geometry.num_frames, *geometry.image_size, 3), dtype=np.uint8)
  answers = rng.integers(10, 448, (32, 3)).tolist()
  return [
    Sample([1, -200, 2, 3, *answer], [0] * 4 + [1] * 3, (geometry.num_frames,), video)
    for video, answer in zip(videos, answers)
  ]


def test_the_demo_model_learns_32_samples_by_heart():
  model = PRESETS["demo"]
  geometry = geometry_of(model, {"num_frames": 4, "decoder_length": 16, "text_bound": 8})
  batch = jax.tree.map(
    jnp.asarray, collate([build_row([sample], geometry) for sample in samples(geometry)])
  )
  optimizer = OptimizerConfig(3e-3, 20, STEPS, groups=(("adapters.warm_up", 20.0),))
  state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
  step = make_train_step(model, optimizer, dtype=jnp.float32, remat="none")
  run = jax.jit(step, donate_argnums=0)
  for _ in range(STEPS):
    state, metrics = run(state, batch)
  assert metrics["loss"] < 0.02
  assert metrics["token_accuracy"] == 1
