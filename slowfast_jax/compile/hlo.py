# SPDX-License-Identifier: Apache-2.0
"""Reads a compiled program: its instructions, and how often each runs.

The compiler's own sums count the body of a loop once. Here every instruction has the product of the
trip counts of the loops around it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([^\s,(){}]+)")
# "ROOT %name = type op(operands), attributes"; a type may be a tuple with comments in it.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([^\s=]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) .*\{\s*$")

Array = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: its own.
    op: what it does, e.g. "fusion".
    arrays: element types and shapes of its result.
    operands: names of the instructions that it reads.
    attributes: the rest of the line.
  """

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str

  def called(self, attribute: str) -> str:
    """The computation that an attribute names, or nothing."""
    match = re.search(rf"\b{attribute}=%?([^\s,}}]+)", self.attributes)
    return match[1] if match else ""

  @functools.cached_property
  def source(self) -> str:
    """Where in the model it comes from."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ""

  @property
  def size(self) -> float:
    """Bytes of the result."""
    return sum(bytes_of(array) for array in self.arrays)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Executed:
  """An instruction where it stands.

  Attributes:
    instruction: itself.
    scope: the instructions that its operands name.
    times: how often it runs.
    fused: it is a part of the instruction of that name; None: it stands alone.
  """

  instruction: Instruction
  scope: Computation
  times: int
  fused: Instruction | None


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, and the one that is the whole."""

  computations: dict[str, Computation]
  entry: str

  def walk(self) -> Iterator[Executed]:
    """Everything that runs; a fusion comes before its parts."""
    yield from self._walk(self.entry, 1, None)

  def _walk(self, name: str, times: int, fused: Instruction | None) -> Iterator[Executed]:
    scope = self.computations.get(name, {})
    for instruction in scope.values():
      yield Executed(instruction, scope, times, fused)
      if instruction.op == "while":
        count = times * self.trip_count(instruction)
        yield from self._walk(instruction.called("body"), count, fused)
        continue
      # Of a conditional every branch counts: the training loss skips chunks only of short answers.
      for branch in _branches(instruction):
        yield from self._walk(branch, times, fused)
      inner = instruction.called("calls") or (
        instruction.called("to_apply") if instruction.op == "call" else ""
      )
      if inner:
        whole = fused or (None if instruction.op == "call" else instruction)
        yield from self._walk(inner, times, whole)

  def trip_count(self, loop: Instruction) -> int:
    """How often a loop runs; 1 where that is not a constant of the program."""
    known = re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    return max(self._constants(loop.called("condition")), default=1)

  def _constants(self, name: str) -> list[int]:
    """Integers that a loop's counter may be compared with."""
    found = []
    for instruction in self.computations.get(name, {}).values():
      if instruction.op == "constant" and instruction.arrays == (("s32", ()),):
        value = re.match(r"constant\((\d+)\)", instruction.attributes)
        found += [int(value[1])] if value else []
      inner = instruction.called("calls")
      found += self._constants(inner) if inner else []
    return found


def parse(text: str) -> Module:
  """Reads the text of an optimised HLO module."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in _joined(text):
    if line == "}":
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      instruction = _instruction(found[1], found[2])
      current[instruction.name] = instruction
    elif (header := _HEADER.match(line)) and not line.startswith("HloModule"):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
  return Module(computations, entry)


def _joined(text: str) -> Iterator[str]:
  """Lines, each instruction whole: the names of kernels may hold line breaks."""
  parts: list[str] = []
  for line in text.splitlines():
    if parts and not line.startswith((" ", "%", "ENTRY")) and line not in ("}", ""):
      parts.append(line)
      continue
    if parts:
      yield "".join(parts)
    parts = [line]
  yield "".join(parts)


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  op, inside = rest[:opening], rest[opening + 1 : closing]
  arrays = tuple(
    (dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(kind)
  )
  # The value of a constant stands where operands do.
  attributes = rest if op == "constant" else rest[closing + 1 :]
  return Instruction(name, op, arrays, tuple(_NAME.findall(inside)), attributes)


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens there is closed."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  return len(text) - 1


def _branches(instruction: Instruction) -> list[str]:
  if instruction.op != "conditional":
    return []
  several = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if several:
    return [name.strip().lstrip("%") for name in several[1].split(",")]
  return [instruction.called(f"{value}_computation") for value in ("true", "false")]


def bytes_of(array: Array) -> float:
  dtype, shape = array
  if dtype not in _BYTES:
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) / 8 if bits else 0)
  return math.prod(shape) * _BYTES[dtype]
