# SPDX-License-Identifier: Apache-2.0
"""Where a run's arrays lie changes no loss: every mesh gives the curve of one device."""

import json
import math
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
def found():
  """Of every mesh, one after the other."""
  command = [sys.executable, "-m", "tests.train.mesh_curves", str(STEPS), json.dumps(MESHES)]
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(1, len(MESHES)), ids=lambda i: str(MESHES[i]))
def test_thirty_steps_are_those_of_one_device(found, index):
  one, other = np.array(found[0]["losses"]), np.array(found[index]["losses"])
  assert len(one) == STEPS
  assert np.ptp(one) > 0.1, "nothing was learned"
  # float32 sums in another order, carried through thirty updates.
  np.testing.assert_allclose(other, one, rtol=0, atol=1e-4)


ROWS, FRAMES, TOKENS_PER_FRAME, KEY_HEADS = 8, 10, 4, 2


@pytest.mark.parametrize("index", range(len(MESHES)), ids=lambda i: str(MESHES[i]))
def test_a_device_encodes_its_part_of_all_frames_whatever_the_axes_are(found, index):
  devices = math.prod(MESHES[index].values())
  assert found[index]["products"]["patches"] == [[ROWS * FRAMES * TOKENS_PER_FRAME // devices, 8]]


# Of the other meshes the compiler simplifies the product: a device has one row, or one head.
@pytest.mark.parametrize("index", [0, 4], ids=lambda i: str(MESHES[i]))
def test_a_device_reads_its_part_of_the_slow_tokens(found, index):
  (shape,) = found[index]["products"]["reads"]
  assert shape[:2] == [ROWS // MESHES[index]["data"], KEY_HEADS]
  assert shape[-1] == FRAMES * TOKENS_PER_FRAME // MESHES[index].get("context", 1)
