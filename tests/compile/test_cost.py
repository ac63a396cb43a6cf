# SPDX-License-Identifier: Apache-2.0
"""Programs are read as they run: loops by their trip counts, collectives by their mesh axes."""

import jax
import jax.numpy as jnp
import pytest

from slowfast_jax.compile.cost import axes_of, cost_of, first_group
from slowfast_jax.compile.hlo import parse

MESH = {"data": 2, "fsdp": 4}

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[16,16]{1,0} constant({...})
  %gathered = bf16[64,16]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8]
  %dot.1 = bf16[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, metadata={
}, backend_config={"estimated_cycles":"100"}
  %splash.7 = bf16[8,16]{1,0} custom-call(%dot.1), custom_call_target="tpu_custom_call", x={y={
"x":"{}"
}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"5000","transcendentals":"0"}}}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%p, %splash.7)
}

%condition (p.1: (s32[], bf16[8,16])) -> pred[] {
  %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %a = (s32[], bf16[8,16]{1,0}) parameter(0)
  %sum = bf16[64,16]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %while.1 = (s32[], /*index=1*/bf16[8,16]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_counts_as_often_as_it_runs():
  cost = cost_of(parse(PROGRAM), MESH)
  assert cost.flops == 3 * (2 * 8 * 16 * 16 + 5000)
  assert cost.cycles == 300
  assert cost.kernels == {"splash": 3}
  assert cost.kernel_flops == {"splash": 15000.0}


@pytest.mark.parametrize(("mask", "share"), [("full", 16 / 16), ("causal", 10 / 16)])
def test_splash_attention_counts_the_blocks_that_run(mask, share):
  text = f"""\
HloModule jit_step

ENTRY %main (m: s8[1,4,4], q: bf16[28,4096,128]) -> bf16[28,4096,128] {{
  %m = s8[1,4,4] parameter(0)
  %q = bf16[28,4096,128] parameter(1)
  %splash_mha_fwd.1 = bf16[28,4096,128] custom-call(%m, %m, %q, %q, %q), custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/{mask}/splash"}}
}}
"""  # noqa: E501
  cost, pairs = cost_of(parse(text), MESH), 2 * 2 * 28 * 4096**2 * 128
  assert cost.flops == pairs
  assert sum(cost.kernel_flops.values()) == share * pairs


def test_collectives_are_told_by_axis_and_bytes():
  found = {one.kind: one for one in cost_of(parse(PROGRAM), MESH).collectives}
  gather, reduce = found["all-gather"], found["all-reduce"]
  assert (gather.axes, gather.count, gather.sent) == ("fsdp", 3, 3 * 3 * 16 * 16 * 2)
  assert (reduce.axes, reduce.count) == ("data", 1)
  assert reduce.waited == reduce.sent


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("replica_groups=[2,4]<=[8]", "fsdp"),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
    ("replica_groups=[1,8]<=[8]", "data, fsdp"),
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp"),
    ("source_target_pairs={{0,4},{4,0}}", "data"),
    ("replica_groups=mesh['a'=8,'b'=1] {'a'}, x", "data, fsdp"),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", "fsdp"),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", "data"),
    ("replica_groups=mesh['a'=8] {'a':(1)2}, x", "data"),
  ],
)
def test_groups_in_all_notations(groups, axes):
  assert axes_of(first_group(groups, 8), MESH) == axes


def test_flops_of_a_real_program_are_those_that_were_written():
  def program(x, kernel):
    def layer(x, _):
      return jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(layer, x, length=7)
    image = x.reshape(1, 8, 8, 4)
    window = jnp.ones((3, 3, 4, 5))
    return jax.lax.conv_general_dilated(
      image, window, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  shapes = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
  text = jax.jit(program).lower(*shapes).compile().as_text()
  flops = cost_of(parse(text), {"data": 1}).flops
  assert flops == 7 * 2 * 16**3 + 2 * 6 * 6 * 9 * 4 * 5
