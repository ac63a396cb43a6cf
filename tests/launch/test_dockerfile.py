# SPDX-License-Identifier: Apache-2.0
"""The image's definition is clean, and takes what a checkout has.

`python tests/launch/dockerfile.py FOLDER` carries its steps out, which takes some minutes.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from launch.dockerfile import ROOT, steps


def test_dockerfile_is_clean():
  subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], check=True)


def test_what_is_copied_is_in_the_checkout_and_not_ignored():
  allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
  copied = [
    source
    for word, rest in steps()
    if word == "COPY" and "--from" not in rest
    for source in rest.split()[:-1]
  ]
  assert len(copied) == 6
  for source in copied:
    assert (ROOT / source).exists()
    assert f"!{source}" in allowed


def test_every_dependency_has_a_pinned_version_that_pyproject_allows():
  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name

  lines = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
  pins = {}
  for line in lines:
    if not line.startswith("#"):
      name, version = re.fullmatch(r"([-\w.]+)==([\w.+]+)", line).groups()
      pins[canonicalize_name(name)] = version
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  for text in project["dependencies"] + project["optional-dependencies"]["tpu"]:
    wanted = Requirement(text)
    assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text
  assert pins["jax"] == pins["jaxlib"]
  assert "libtpu" in pins
