# SPDX-License-Identifier: Apache-2.0
"""What was found out about a program, in numbers and in words."""

import dataclasses
from typing import Any

from slowfast_jax.compile.topology import DCN, GIB, Topology

# Share of the chip's peak at which kernels run, by the compiler's schedule of their inner loops
# (docs/kernels.md). A matrix unit of v6e is half used by heads of 128; depthwise convolutions have
# no use for one, and v6e has no more vector units than the others.
_KERNEL_SHARE = {
  "slow_cross_attention": (0.9, 0.5),
  "splash": (0.7, 0.3),
  "depthwise": (0.015, 0.004),
}

_REST = "activations and temporaries"
TRUST = (
  "This is the compiler's estimate, not a measured time: the cycles of every instruction, kernels "
  "at the pace of their inner loops, and links at their published speed; nothing waits for memory "
  "or for the host. The lower MFU has every exchange that the schedule does not overlap in full. "
  "Plain text models of known speed come out about a tenth too slow by this count, so trust it to "
  "a fifth, and comparisons of two configs more."
)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """How long one run takes, by the compiler.

  Attributes:
    compute: seconds of instructions.
    kernels: seconds of hand-written kernels.
    links: seconds of exchanges that nothing runs beside.
    seconds: all of it: the longest that is expected.
    shortest: if every exchange ran beside something.
    mfu: model FLOPs a second over the chips' peak, of `seconds` and of `shortest`.
  """

  compute: float
  kernels: float
  links: float
  seconds: float
  shortest: float
  mfu: tuple[float, float]


def estimate(program: dict[str, Any], topology: Topology) -> Estimate:
  """The estimate of one compiled program; see worker.py for its facts."""
  chip, cost = topology.chip, program["cost"]
  peak = chip.peak
  compute = cost["cycles"] / chip.clock
  kernels = sum(
    flops / peak / _share(name, topology.generation) for name, flops in cost["kernel_flops"].items()
  )
  waited, sent = (
    sum(one[key] / _speed(one["axes"], topology) for one in cost["collectives"])
    for key in ("waited", "sent")
  )
  shortest = max(compute + kernels, sent)
  seconds = max(compute + kernels + waited, sent)
  least = program["model_flops"] / (peak * topology.num_chips)
  return Estimate(compute, kernels, waited, seconds, shortest, (least / seconds, least / shortest))


def _share(kernel: str, generation: str) -> float:
  shares = next((s for name, s in _KERNEL_SHARE.items() if name in kernel), (0.5, 0.5))
  return shares[generation == "v6e"]


def _speed(axes: str, topology: Topology) -> float:
  """Bytes a second of an exchange; between slices only the axis `data` reaches."""
  across = topology.slices > 1 and "data" in axes
  return DCN if across else topology.chip.ici


def used_hbm(program: dict[str, Any]) -> float:
  """Bytes that a device needs, whether it has them or not."""
  return program["over"]["used"] if "over" in program else program["hbm"]["total"]


def hbm_by_part(program: dict[str, Any]) -> dict[str, float]:
  """Bytes on a device: what the arguments are, and what the program needs beside them."""
  parts = dict(program["memory"])
  if "hbm" in program:
    parts["new results"] = program["hbm"]["new results"]
  return parts | {_REST: max(used_hbm(program) - sum(parts.values()), 0.0)}


def summarize(
  result: dict[str, Any], topology: Topology, what: str, samples: int
) -> dict[str, Any]:
  """All figures of a result, for people and for --json."""
  programs = []
  for program in result["programs"]:
    limit = topology.chip.hbm
    used = used_hbm(program)
    facts = {
      **program,
      "fits": "over" not in program,
      "hbm_used": used,
      "hbm_limit": limit,
      "hbm_by_part": hbm_by_part(program),
    }
    if "cost" in program:
      guess = estimate(program, topology)
      facts["estimate"] = dataclasses.asdict(guess)
      facts["model_flops_per_device"] = program["model_flops"] / topology.num_chips
      facts["frames_per_second"] = program["frames"] / guess.seconds
      if what == "train":
        steps = samples / program["rows"]
        facts["epoch_chip_hours"] = steps * guess.seconds * topology.num_chips / 3600
    programs.append(facts)
  return {
    "topology": str(topology),
    "chips": topology.num_chips,
    "what": what,
    "samples": samples,
    "programs": programs,
    "host_memory": result["host_memory"],
    "fits": all(program["fits"] for program in programs),
  }


def describe(summary: dict[str, Any]) -> str:
  """The figures as text."""
  lines = []
  for program in summary["programs"]:
    mesh = " x ".join(f"{axis} {n}" for axis, n in program["mesh"].items() if n > 1)
    lines += [
      f"{program['name']} on {summary['topology']} ({summary['chips']} chips; {mesh or 'one'}), "
      f"compiled in {program['seconds']:.0f} s, {gib(summary['host_memory'])} of host memory",
      _memory(program),
    ]
    if "cost" in program:
      lines += _costs(program, summary)
    elif program["over"]["largest"]:
      lines.append(f"  largest arrays: {', '.join(program['over']['largest'])}")
  if summary["fits"]:
    lines.append(TRUST)
  return "\n".join(lines)


def gib(count: float) -> str:
  return f"{count / GIB:.2f} GiB"


def _memory(program: dict[str, Any]) -> str:
  used, limit = program["hbm_used"], program["hbm_limit"]
  verdict = "fits" if program["fits"] else "does NOT fit"
  room = f"{gib(limit - used)} free" if program["fits"] else f"{gib(used - limit)} too much"
  # Temporaries last: what is known of them follows.
  parts = sorted(program["hbm_by_part"].items(), key=lambda part: (part[0] == _REST, -part[1]))
  parts += [(f"  of that {name}", size) for name, size in program["inside"].items()]
  rows = "\n".join(f"    {name:<46}{gib(size):>12}" for name, size in parts if size >= 2**20)
  return f"  {verdict}: {gib(used)} of {gib(limit)} HBM a device, {room}\n{rows}"


def _costs(program: dict[str, Any], summary: dict[str, Any]) -> list[str]:
  cost, guess = program["cost"], program["estimate"]
  model = program["model_flops_per_device"]
  lines = [
    f"  FLOPs a device: {cost['flops'] / 1e12:.2f} T compiled, {model / 1e12:.2f} T of the model "
    f"({cost['flops'] / model:.2f}x: recomputation, padding)"
  ]
  lines += [
    f"  {one['kind']} over {one['axes']}: {one['count']} times, {gib(one['sent'])} sent"
    f", {gib(one['waited'])} of it waited for"
    for one in sorted(cost["collectives"], key=lambda one: -one["sent"])
    if one["sent"] >= 2**20
  ]
  kernels = ", ".join(f"{name} x {count}" for name, count in cost["kernels"].items())
  low, high = guess["mfu"]
  lines += [
    f"  kernels: {kernels or 'none'}",
    f"  largest arrays: {', '.join(cost['largest'][:4])}",
    f"  estimate: {guess['seconds']:.3g} s ({guess['compute']:.3g} instructions, "
    f"{guess['kernels']:.3g} kernels, {guess['links']:.3g} waiting for links), "
    f"MFU {low:.3f} to {high:.3f}",
  ]
  if program["frames"]:
    lines.append(f"  {program['frames_per_second']:,.0f} frames a second")
  if "epoch_chip_hours" in program:
    lines.append(
      f"  an epoch of {summary['samples']:,} samples: {program['epoch_chip_hours']:,.0f} chip-hours"
    )
  return lines
