# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench`: its table, and wrong usage."""

import pytest

from benchmarks import kernel_cache, kernel_grid, kernel_static
from benchmarks.kernel_static import Row
from benchmarks.tpu_schedule import Kernel
from slowfast_jax.cli.main import main
from slowfast_jax.kernels.cross_attention.shapes import Shape


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "add --static or --blocks"),
    (["--static", "--chips=v5e,v9"], "v9 unknown; choose from v4, v5e, v5p, v6e"),
    (["--static", "--queries=some"], "expected numbers as in 1,64,512, got 'some'"),
  ],
)
def test_wrong_usage(capsys, flags, words):
  assert main(["bench", "kernel", *flags]) == 2
  assert words in capsys.readouterr().err


def test_share_is_the_bound_over_the_cycles_of_further_keys(monkeypatch):
  """On a chip with one core, twice the least number of cycles for each key, plus a constant."""
  flops_of_a_query = 4 * 7 * 128

  def schedule(kernel, sizes, chip, profile, timeout):
    assert kernel == "ours"
    cycles = 1000 + 2 * sizes["keys"] * sizes["queries"] * flops_of_a_query // 131_072
    return [Kernel("slow_cross_attention_forward", cycles, 100, 2 << 20, 1 << 20, 10**9)]

  monkeypatch.setattr(kernel_static, "cached_schedule", schedule)
  row = kernel_static.compute_row("ours", "v5e", 512, 1.0)
  assert row.share == pytest.approx(0.5)
  assert row.cycles == pytest.approx(2 * 4 * 7 * 512 * 128 * 1024 / 131_072)
  assert (row.vmem_mib, row.spill_mib) == (2, 1)


def test_what_does_not_compile_is_a_line_of_the_table(monkeypatch, capsys, tmp_path):
  def schedule(kernel, sizes, chip, profile, timeout):
    raise RuntimeError("too large\nfor VMEM")

  monkeypatch.setattr(kernel_static, "cached_schedule", schedule)
  path = tmp_path / "table.json"
  flags = ["--static", "--tables=steady", "--chips=v4", "--queries=1", f"--json={path}"]
  assert main(["bench", "kernel", *flags]) == 0
  assert "for VMEM" in capsys.readouterr().out
  assert path.read_text().count("for VMEM") == len(kernel_static.FORWARD)


def test_what_was_compiled_is_not_compiled_again(monkeypatch, tmp_path):
  """Failures too; another timeout is another question."""
  asked = []

  def schedule(target, options, chip, profile, timeout):
    asked.append(timeout)
    if chip == "v4":
      raise RuntimeError("too large")
    return [Kernel("slow_cross_attention_forward", None, 100, 2 << 20, 0)]

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(kernel_cache, "schedule", schedule)
  once, twice = (kernel_cache.cached_schedule("ours", {}, "v5e", False, 1.0) for _ in range(2))
  assert once == twice
  for timeout in (2.0, 2.0, 3.0):
    with pytest.raises(RuntimeError, match="too large"):
      kernel_cache.cached_schedule("ours", {}, "v4", False, timeout)
  assert asked == [1.0, 2.0, 3.0]


def test_the_grid_counts_a_tile_of_the_table_for_its_chip(monkeypatch):
  def schedule(kernel, sizes, chip, profile, timeout):
    return [Kernel("slow_cross_attention_forward", None, 32_768, 2 << 20, 0)]

  monkeypatch.setattr(kernel_grid, "cached_schedule", schedule)
  row = kernel_grid.compute_row("ours", "v5e", Shape(64, 10_368), 1.0)
  # 64 x 7 rows are one chunk; three blocks of 3,456 keys.
  assert row.share == pytest.approx(4 * 448 * 3_456 * 128 / 131_072 / 32_768)


def test_a_dash_stands_for_what_the_compiler_does_not_say():
  assert kernel_static.line(Row("ours", "v4", 1)).split()[3:] == ["-"] * 5
