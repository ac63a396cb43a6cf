# SPDX-License-Identifier: Apache-2.0
"""Where a run's arrays lie changes no loss: every mesh gives the curve of one device."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

STEPS = 30
MESHES = [
  {"data": 1},
  {"data": 8},
  {"fsdp": 8},
  {"tensor": 2, "fsdp": 4},
  {"context": 4, "data": 2},
]


@pytest.fixture(scope="module")
def curves():
  command = [sys.executable, "-m", "tests.train.mesh_curves", str(STEPS), json.dumps(MESHES)]
  env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(1, len(MESHES)), ids=lambda i: str(MESHES[i]))
def test_thirty_steps_are_those_of_one_device(curves, index):
  one, found = np.array(curves[0]), np.array(curves[index])
  assert len(one) == STEPS
  assert np.ptp(one) > 0.1, "nothing was learned"
  # float32 sums in another order, carried through thirty updates.
  np.testing.assert_allclose(found, one, rtol=0, atol=1e-4)
