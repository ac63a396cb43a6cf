# SPDX-License-Identifier: Apache-2.0
"""Names of TPU slices: what exists is read, what does not is told with what does."""

import pytest

from slowfast_jax.compile.topology import CHIPS, compiler_environment, known_names, parse_topology
from slowfast_jax.errors import UserError


@pytest.mark.parametrize(
  ("name", "chips"), [("v5e:16x16", 256), ("v5p:4x4x8", 128), ("v6e:2x4", 8), ("v4:8x12x16", 1536)]
)
def test_slices_have_their_chips(name, chips):
  assert parse_topology(name).num_chips == chips
  assert parse_topology(name, slices=2).num_chips == 2 * chips


def test_every_known_name_is_one():
  for generation in CHIPS:
    for name in known_names(generation):
      assert parse_topology(name).name == name


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5q:4x4", "v4, v5e, v5p, v6e"),
    ("v5e", "v5e:4x4"),
    ("v5p:4x4", "there is no such slice of v5p; choose from v5p:2x2x1"),
    ("v5e:3x5", "choose from v5e:1x1"),
    ("v5p:0x4x4", "expected GENERATION:SHAPE"),
    ("v5p:64x64x64", "there is no such slice"),
    ("", "expected GENERATION:SHAPE"),
  ],
)
def test_what_does_not_exist_is_told_with_what_does(name, words):
  with pytest.raises(UserError, match=words):
    parse_topology(name)


def test_there_is_at_least_one_slice():
  with pytest.raises(UserError, match="--slices must be at least 1, got 0"):
    parse_topology("v5e:2x2", slices=0)


def test_flags_that_libtpu_does_not_know_stay_behind(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_dump_to=/tmp/a")
  assert compiler_environment()["XLA_FLAGS"] == "--xla_dump_to=/tmp/a"
