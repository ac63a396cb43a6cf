# SPDX-License-Identifier: Apache-2.0
"""What a compiled program costs each device: FLOPs, cycles, bytes over links, kernels.

All sums are over what runs, loops included (see `hlo`). Cycles are the compiler's own estimate of
each instruction; it knows nothing of links between chips, and little of memory.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from slowfast_jax.compile.hlo import Array, Executed, Instruction, Module, bytes_of
from slowfast_jax.kernels.self_attention import CAUSAL

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# Matrix products of JAX's splash attention, which tells no FLOPs: scores and output; and with the
# gradient, scores again, then the gradients of weights, v, k and q.
_SPLASH = {"fwd": 2, "dkv": 5}

# Sizes of the axes of a mesh, the order of its devices if it is not their own, and those axes along
# which devices exchange.
_NAMED_GROUPS = re.compile(
  r"replica_groups=mesh\[([^\]]*)\]"
  r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes.

  Attributes:
    kind: one of COLLECTIVES.
    axes: the mesh axes that exchange, with commas between.
    count: how many run.
    sent: bytes that a device sends.
    waited: those of them that nothing else runs beside.
  """

  kind: str
  axes: str
  count: int
  sent: float
  waited: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, on one device.

  Attributes:
    flops: of matrix products and convolutions, those inside of kernels too. As in model FLOPs,
      every pair of positions counts, also those that a causal mask hides.
    cycles: the compiler's estimate.
    cycles_by_part: the same, by what the instructions do.
    collectives: what is exchanged.
    kernels: calls of hand-written kernels, by name.
    kernel_flops: what each kernel's calls run of them; the compiler estimates no cycles of it.
    largest: shapes of the largest arrays that are written, the largest first.
  """

  flops: float
  cycles: float
  cycles_by_part: dict[str, float]
  collectives: tuple[Collective, ...]
  kernels: dict[str, int]
  kernel_flops: dict[str, float]
  largest: tuple[str, ...]


def cost_of(module: Module, mesh: dict[str, int]) -> Cost:
  """
  Args:
    module: the program.
    mesh: sizes of the mesh's axes, in order.
  """
  flops = 0.0
  cycles: collections.Counter[str] = collections.Counter()
  kernels: collections.Counter[str] = collections.Counter()
  in_kernels: dict[str, float] = collections.defaultdict(float)
  exchanged: dict[tuple[str, str], list[float]] = {}
  arrays: dict[Array, float] = {}
  seen: set[str] = set()
  for item in module.walk():
    one, times = item.instruction, item.times
    flops += times * flops_of(item)
    if item.fused is None:
      cycles[_part(one, module)] += times * _cycles(one)
      arrays |= {array: bytes_of(array) for array in one.arrays}
    if name := kernel_name(one):
      kernels[name] += times
      in_kernels[name] += times * flops_of(item) * _share_that_runs(one, item)
    kind = _kind(one)
    if kind and not _repeated(one, seen):
      _add(exchanged, kind, item, mesh)
  largest = sorted(arrays, key=lambda array: -arrays[array])[:8]
  return Cost(
    flops,
    float(sum(cycles.values())),
    dict(cycles.most_common()),
    tuple(Collective(*key, int(n), *sums) for key, (n, *sums) in exchanged.items()),
    dict(kernels.most_common()),
    dict(in_kernels),
    tuple(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in largest),
  )


def flops_of(item: Executed) -> float:
  """FLOPs of one run of an instruction itself."""
  one = item.instruction
  if one.op == "convolution":
    return _convolution(one, item)
  if one.op == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    sizes = _shape(item, 0)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(one.arrays[0][1]) * math.prod(sizes[axis] for axis in axes)
  if one.op == "custom-call":
    declared = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', one.attributes)
    return float(declared[1]) if declared and int(declared[1]) else _splash(one, item)
  return 0.0


def kernel_name(instruction: Instruction) -> str:
  """The name of the hand-written kernel that an instruction calls, or nothing."""
  if instruction.op != "custom-call" or '"tpu_custom_call"' not in instruction.attributes:
    return ""
  return re.sub(r"[.\d]+$", "", instruction.name)


def _shape(item: Executed, operand: int) -> tuple[int, ...]:
  name = item.instruction.operands[operand]
  return item.scope[name].arrays[0][1]


def _convolution(one: Instruction, item: Executed) -> float:
  """Products of a window's taps that lie inside of the (dilated) input, times channels."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  if labels is None:
    return 0.0
  image, kernel, out = labels.groups()
  sizes = (_shape(item, 0), _shape(item, 1), one.arrays[0][1])
  window = dict(re.findall(r"(\w+)=([\w-]+)", _inside(one.attributes, "window")))
  taps = 1.0
  for i, axis in enumerate(sorted(letter for letter in image if letter.isdigit())):
    spans = [size[text.index(axis)] for size, text in zip(sizes, (image, kernel, out))]
    taps *= _taps(spans, {name: text.split("x")[i] for name, text in window.items()})
  groups = [_number(one.attributes, f"{kind}_group_count") for kind in ("feature", "batch")]
  channels = sizes[0][image.index("f")] / groups[0] * sizes[2][out.index("f")]
  return 2.0 * channels * sizes[0][image.index("b")] / groups[1] * taps


def _taps(spans: list[int], window: dict[str, str]) -> int:
  """Pairs of an output and a kernel place along one axis that meet an element of the input."""
  size, kernel, out = spans
  stride, dilation, spread = (
    int(window.get(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate")
  )
  start = int(window.get("pad", "0_0").split("_")[0])
  # A product of matrices: one tap for each output.
  if kernel == 1 and start == 0 and spread == 1:
    return min(out, (size - 1) // stride + 1)
  places = np.arange(out)[:, None] * stride - start + np.arange(kernel) * dilation
  inside = (places >= 0) & (places <= (size - 1) * spread) & (places % spread == 0)
  return int(inside.sum())


def _inside(text: str, name: str) -> str:
  match = re.search(rf"\b{name}=\{{([^}}]*)\}}", text)
  return match[1] if match else ""


def _number(text: str, name: str) -> int:
  match = re.search(rf"\b{name}=(\d+)", text)
  return int(match[1]) if match else 1


def _splash(one: Instruction, item: Executed) -> float:
  """Every pair of positions counts."""
  match = re.search(r"splash_m[hq]a_(fwd|dkv)", one.name + one.source)
  shapes = [item.scope[name].arrays[0] for name in one.operands if name in item.scope]
  # Queries, keys and values are the operands with the most elements.
  tensors = [shape for dtype, shape in shapes if dtype in ("bf16", "f32") and len(shape) > 2]
  if match is None or len(tensors) < 3:
    return 0.0
  queries, keys = tensors[:2]
  # Heads are shorter than sequences, and may stand on either side of them.
  head, length = sorted(keys[-2:])
  # The matrix unit is 128 wide: a smaller head takes as long.
  padded = math.prod(queries) // head * max(head, 128)
  return 2.0 * _SPLASH[match[1]] * padded * length


def _share_that_runs(one: Instruction, item: Executed) -> float:
  """Of a kernel's blocks: splash attention skips those of later keys under a causal mask."""
  if "splash_m" not in one.name + one.source or CAUSAL not in one.source:
    return 1.0
  shapes = [item.scope[name].arrays[0] for name in one.operands if name in item.scope]
  # What to load and what the mask says, by block of queries and of keys.
  blocks = max((shape[-1] for dtype, shape in shapes if dtype == "s8"), default=1)
  return (blocks + 1) / (2 * blocks)


def _cycles(one: Instruction) -> int:
  match = re.search(r'"estimated_cycles":"?(-?\d+)', one.attributes)
  return max(int(match[1]), 0) if match else 0


def _part(one: Instruction, module: Module) -> str:
  """What an instruction's cycles go to."""
  inner = one.called("calls")
  ops = {i.op for i in module.computations.get(inner, {}).values()} | {one.op}
  if any(op.startswith(kind) for op in ops for kind in COLLECTIVES):
    return "collectives"
  if ops & {"convolution", "dot"}:
    return "matrix products"
  return "copies" if one.op.startswith("copy") else "everything else"


def _kind(one: Instruction) -> str:
  return next((k for k in COLLECTIVES if one.op in (k, f"{k}-start")), "")


def _repeated(one: Instruction, seen: set[str]) -> bool:
  """Whether it is a further piece of a collective that the compiler spread over several fusions."""
  channel = re.search(r"channel_id=(\d+)", one.attributes)
  if channel is None:
    return False
  known = channel[1] in seen
  seen.add(channel[1])
  return known


def _add(
  exchanged: dict[tuple[str, str], list[float]], kind: str, item: Executed, mesh: dict[str, int]
) -> None:
  one = item.instruction
  group = first_group(one.attributes, math.prod(mesh.values()))
  size = len(group)
  given = sum(item.scope[name].size for name in one.operands if name in item.scope)
  share = (size - 1) / size
  sent = {
    "all-gather": given * (size - 1),
    "all-reduce": 2 * given * share,
    "reduce-scatter": given * share,
    "all-to-all": given * share,
    "collective-permute": given,
  }[kind]
  # A fused reduce-scatter is written as an all-reduce whose result is cut.
  if kind == "all-reduce" and item.fused and "reduce-scatter" in item.fused.attributes:
    kind, sent = "reduce-scatter", sent / 2
  # A part of a fusion beside which the exchange runs, or what SparseCores do.
  beside = item.fused is not None and ("async" in item.fused.name or item.fused.op == "async-start")
  hidden = one.op.endswith("-start") or beside
  sums = exchanged.setdefault((kind, axes_of(group, mesh)), [0, 0.0, 0.0])
  sums[0] += item.times
  sums[1] += item.times * sent
  sums[2] += 0.0 if hidden else item.times * sent


def first_group(attributes: str, count: int) -> list[int]:
  """Devices that exchange with device 0, by their place on the mesh."""
  named = _NAMED_GROUPS.search(attributes)
  if named:
    return _group_of_axes(*named.groups())
  compact = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if compact:
    sizes = [int(n) for n in compact[3].split(",")]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    if compact[4]:
      order = order.transpose([int(n) for n in compact[4].split(",")])
    return order.reshape(int(compact[1]), int(compact[2]))[0].tolist()
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
  return [int(n) for n in listed[1].split(",")] if listed else list(range(count))


def _group_of_axes(sizes: str, shape: str | None, order: str | None, axes: str) -> list[int]:
  """The same, of groups that are written as axes of a mesh of the compiler's own."""
  dims = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
  devices = np.arange(math.prod(dims.values()))
  if shape:
    devices = devices.reshape([int(n) for n in shape.split(",")])
  if order:
    devices = devices.transpose([int(n) for n in order.split(",")])
  devices = devices.reshape(list(dims.values()))
  place = []
  for name, size in dims.items():
    # A part of an axis is written as 'axis':(devices before it)its size.
    part = re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", axes)
    first, count = (int(part[1]), int(part[2])) if part and part[1] else (1, size)
    step = size // first // count
    place.append(slice(0, step * count, step) if part else slice(0, 1))
  return devices[tuple(place)].flatten().tolist()


def axes_of(group: list[int], mesh: dict[str, int]) -> str:
  """The mesh axes along which the devices of a group differ."""
  places = np.array(np.unravel_index(group, tuple(mesh.values())))
  differ = (places != places[:, :1]).any(axis=1)
  return ", ".join(axis for axis, differs in zip(mesh, differ) if differs) or "none"
