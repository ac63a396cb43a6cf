# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name ("v5p:4x4x4"), as the compiler knows them, and what their chips can do.

Nothing here imports JAX: a name is judged before minutes are spent.
"""

import dataclasses
import difflib
import math
import os
import re

from slowfast_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One generation.

  Attributes:
    dims: axes of a slice's torus.
    largest: chips of the largest slice.
    peak: dense bfloat16 FLOPs a second.
    clock: cycles a second.
    hbm: bytes of memory that a program may use, as the compiler says.
    bandwidth: bytes a second between that memory and the chip.
    ici: bytes a second that leave the chip over all its links.
    options: what the compiler must be told of it besides its name.
  """

  dims: int
  largest: int
  peak: float
  clock: float
  hbm: float
  bandwidth: float
  ici: float
  options: tuple[tuple[str, str], ...] = ()


# A chip's two cores work as one device, as they do on the machines.
_ONE_DEVICE = (("chip_config_name", "megacore"),)
# As published, but for memory: a link of v5p carries 90e9 bytes a second each way, and so on.
CHIPS = {
  "v4": Chip(3, 4096, 275e12, 1.05e9, 30.75 * GIB, 1.23e12, 6 * 4.5e10, _ONE_DEVICE),
  "v5e": Chip(2, 256, 197e12, 1.5e9, 15.75 * GIB, 0.82e12, 4 * 4.5e10),
  "v5p": Chip(3, 6144, 459e12, 1.75e9, 95.74 * GIB, 2.46e12, 6 * 9e10),
  "v6e": Chip(2, 256, 918e12, 1.75e9, 31.25 * GIB, 1.64e12, 4 * 9e10),
}
# Between slices: bytes a second of a chip, of a host of four chips with 200 Gbit/s.
DCN = 6.25e9
# What a slice of two axes may be; one of three is made of cubes of four, or fits into one.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16")


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of TPU chips that run one program.

  Attributes:
    generation: a name of CHIPS.
    shape: chips along each axis of a slice.
    slices: how many, joined by the data centre's network.
  """

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """As the compiler calls it."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def __str__(self) -> str:
    return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Reads a name such as "v5e:16x16".

  Raises:
    UserError: there is no such slice; names some that there are.
  """
  match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
  generation = match[1] if match else name.split(":")[0]
  if match is None or generation not in CHIPS:
    near = difflib.get_close_matches(generation, CHIPS, n=1)
    choices = known_names(near[0]) if near else [known_names(one)[4] for one in CHIPS]
    raise UserError(
      f"--topology={name}: expected GENERATION:SHAPE with a generation of {', '.join(CHIPS)}; "
      f"for instance {', '.join(choices)}."
    )
  topology = Topology(generation, tuple(map(int, match[2].split("x"))), slices)
  if not _exists(topology):
    raise UserError(
      f"--topology={name}: there is no such slice of {generation}; "
      f"choose from {', '.join(known_names(generation))}."
    )
  if slices < 1:
    raise UserError(f"--slices must be at least 1, got {slices}.")
  return topology


def known_names(generation: str) -> list[str]:
  """Usual slices of a generation, the smallest first."""
  return [f"{generation}:{shape}" for shape in (_FLAT if CHIPS[generation].dims == 2 else _DEEP)]


def _exists(topology: Topology) -> bool:
  shape, chip = topology.shape, topology.chip
  if chip.dims == 2:
    return topology.name in known_names(topology.generation)
  # Any box of whole cubes is a slice, besides the small ones.
  cubes = math.prod(shape) if len(shape) == 3 and not any(size % 4 for size in shape) else 0
  return topology.name in known_names(topology.generation) or 0 < cubes <= chip.largest


def compiler_environment() -> dict[str, str]:
  """This process's environment for another in which libtpu compiles: no TPU is looked for.

  Flags of XLA's CPU backend stay behind: libtpu ends a process for a flag that it does not know.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": " ".join(flag for flag in flags if not flag.startswith("--xla_cpu_")),
  }
