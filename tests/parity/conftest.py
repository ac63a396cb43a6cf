# SPDX-License-Identifier: Apache-2.0
"""PyTorch, ready before any test imports what needs it."""

import pytest

try:
  import torch
  import transformers
except ModuleNotFoundError as error:
  raise pytest.UsageError(
    "tests/parity compares with PyTorch and transformers: install them with "
    "pip install -e '.[parity]', or leave these tests out with pytest --ignore=tests/parity."
  ) from error


def pytest_collection_modifyitems(items):
  for item in items:
    if "parity" in item.path.parts:
      item.add_marker(pytest.mark.torch)


@pytest.fixture(scope="session", autouse=True)
def quiet_and_on_one_thread():
  """Models this small only wait for one another on more threads."""
  transformers.utils.logging.disable_progress_bar()
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)
