# SPDX-License-Identifier: Apache-2.0
"""A file is replaced as a whole, or stays as it was."""

import os

import pytest

from slowfast_jax.files import replace_json, replace_text


def test_a_file_is_replaced(tmp_path):
  path = tmp_path / "a.json"
  replace_text(path, "old")
  replace_json(path, {"naïve": 1})
  assert path.read_text(encoding="utf-8") == '{\n  "naïve": 1\n}\n'
  assert os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  replace_text(path, "old")
  with pytest.raises(TypeError):
    replace_json(path, {"a": object()})
  with pytest.raises(UnicodeEncodeError):
    replace_text(path, "\ud800")
  assert path.read_text() == "old"
