# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench`: its table, and wrong usage."""

import pytest

from benchmarks import kernel_static
from benchmarks.kernel_static import Row
from benchmarks.tpu_schedule import Kernel
from slowfast_jax.cli.main import main


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

  def schedule(target, sizes, chip, profile, timeout):
    assert target == "benchmarks.kernel_cases:ours"
    cycles = 1000 + 2 * sizes["keys"] * sizes["queries"] * flops_of_a_query // 131_072
    return [Kernel("slow_cross_attention_forward", cycles, 100, 2 << 20, 1 << 20, 10**9)]

  monkeypatch.setattr(kernel_static, "schedule", schedule)
  row = kernel_static._row("ours", "v5e", 512, 1.0)
  assert row.share == pytest.approx(0.5)
  assert row.cycles == pytest.approx(2 * 4 * 7 * 512 * 128 * 1024 / 131_072)
  assert (row.vmem_mib, row.spill_mib) == (2, 1)


def test_what_does_not_compile_is_a_line_of_the_table(monkeypatch, capsys, tmp_path):
  def schedule(target, sizes, chip, profile, timeout):
    raise RuntimeError("too large\nfor VMEM")

  monkeypatch.setattr(kernel_static, "schedule", schedule)
  path = tmp_path / "table.json"
  assert main(["bench", "kernel", "--static", "--chips=v4", "--queries=1", f"--json={path}"]) == 0
  assert "for VMEM" in capsys.readouterr().out
  assert path.read_text().count("for VMEM") == len(kernel_static.FORWARD)


def test_a_dash_stands_for_what_the_compiler_does_not_say():
  assert kernel_static.line(Row("ours", "v4", 1)).split()[3:] == ["-"] * 5
