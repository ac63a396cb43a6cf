# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files as the parameters of a model: matched by name, read one at a time.

What does not fit is found in the headers, before anything is read, and told all at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import einops
import numpy as np

from slowfast_jax.checkpoints.layout import contiguous
from slowfast_jax.checkpoints.parts import PART_BYTES, Cut, Piece
from slowfast_jax.checkpoints.safetensors_files import DTYPES, SafetensorsFiles
from slowfast_jax.checkpoints.tables import Slot
from slowfast_jax.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Names of each kind that an error shows.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Tensors:
  """The tensors of a checkpoint that are a model's, and the rest.

  Attributes:
    files: where they are.
    slots: by parameter, in the order of its layers.
    names: by slot, the name that the files have for it.
    unused: names of tensors that the model does not run.
    head_copy: the embeddings are stored a second time, as the head.
  """

  files: SafetensorsFiles
  slots: Mapping[str, Sequence[Slot]]
  names: Mapping[Slot, str]
  unused: Sequence[str]
  head_copy: bool

  @property
  def num_bytes(self) -> int:
    """Of the model's tensors."""
    return sum(self.files.tensors[name].num_bytes for name in self.names.values())

  def dtypes(self) -> dict[str, tuple[np.dtype, ...]]:
    """Of every parameter, that of each of its layers."""
    return {
      param: tuple(DTYPES[self.files.tensors[self.names[slot]].dtype] for slot in slots)
      for param, slots in self.slots.items()
    }

  def read(self, slot: Slot, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A tensor in our layout, or its rows start..stop; not always contiguous."""
    array, sizes = self.files.read(self.names[slot], start, stop), slot.sizes
    if stop is not None:
      del sizes[slot.pattern.split()[0]]  # That of the rows.
    return einops.rearrange(array, slot.pattern, **sizes)

  def pieces(self, cuts_of: Callable[[str, int], list[Cut]]) -> Iterator[Piece]:
    """All parameters; a stack is whole where it is small and of one dtype."""
    dtypes = self.dtypes()
    for param, slots in self.slots.items():
      itemsize = dtypes[param][0].itemsize
      if slots[0].layer is None:
        for cut in cuts_of(param, itemsize):
          stop = None if cut.axis is None else cut.start + cut.size
          array = self.read(slots[0], cut.start, stop)
          yield Piece(param, contiguous(array), cut.axis, cut.start)
      elif len(set(dtypes[param])) == 1 and cuts_of(param, itemsize)[0].axis is None:
        yield Piece(param, self._stack(slots))
      else:
        for i, slot in enumerate(slots):
          yield Piece(param, contiguous(self.read(slot))[None], 0, i)

  def _stack(self, slots: Sequence[Slot]) -> np.ndarray:
    first = self.read(slots[0])
    stack = np.empty((len(slots), *first.shape), first.dtype)
    stack[0] = contiguous(first)
    for i, slot in enumerate(slots[1:], 1):
      stack[i] = contiguous(self.read(slot))
    return stack


def match(
  files: SafetensorsFiles, slots: Sequence[Slot], is_unused: Callable[[str], bool]
) -> Tensors:
  """Finds every tensor of a model.

  Args:
    files: the checkpoint.
    slots: the tensors that the model has.
    is_unused: of a name that has no slot: whether the tensor is known not to be run.

  Raises:
    UserError: lists all tensors that are missing, unknown, of another shape, or of a dtype that
      weights do not have.
  """
  stored = files.tensors
  names, missing, shapes, kinds = {}, [], [], []
  for slot in slots:
    name = slot.also if slot.also in stored and slot.source not in stored else slot.source
    if name not in stored:
      missing.append(f"{slot.source} {list(slot.shape)}")
      continue
    names[slot] = name
    tensor = stored[name]
    if tensor.shape != slot.shape:
      shapes.append(f"{name} (expected {list(slot.shape)}, got {list(tensor.shape)})")
    if tensor.dtype not in DTYPES:
      kinds.append(f"{name} {tensor.dtype}")
  taken = set(names.values())
  rest = [name for name in stored if name not in taken]
  head_copy = HEAD in rest and _is_copy(files)
  rest = [name for name in rest if not (name == HEAD and head_copy)]
  unused = [name for name in rest if is_unused(name)]
  unknown = [f"{name} {list(stored[name].shape)}" for name in rest if name not in set(unused)]
  groups = {
    "missing": missing,
    "unknown": unknown,
    "of another shape": shapes,
    f"of a dtype other than {', '.join(DTYPES)}": kinds,
  }
  _raise_if_any(files, groups)
  by_param: dict[str, list[Slot]] = {}
  for slot in slots:
    by_param.setdefault(slot.param, []).append(slot)
  return Tensors(files, by_param, names, unused, head_copy)


def _raise_if_any(files: SafetensorsFiles, groups: Mapping[str, Sequence[str]]) -> None:
  lines = []
  for what, names in groups.items():
    if names:
      more = f"\n    and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
      listed = "".join(f"\n    {name}" for name in names[:_SHOWN])
      lines.append(f"\n  {len(names)} {what}:{listed}{more}")
  if lines:
    raise UserError(
      f"{files.path}: the tensors do not fit its config.json:{''.join(lines)}\n"
      "Correct config.json, or take the checkpoint that it belongs to."
    )


def _is_copy(files: SafetensorsFiles) -> bool:
  """Whether the head repeats the embeddings, compared a piece at a time."""
  head, embedding = files.tensors.get(HEAD), files.tensors.get(EMBEDDING)
  if head is None or embedding is None:
    return False
  if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or head.dtype not in DTYPES:
    return False
  step = max(1, PART_BYTES * head.shape[0] // max(head.num_bytes, 1))
  for start in range(0, head.shape[0], step):
    stop = min(start + step, head.shape[0])
    one, other = (files.read(name, start, stop) for name in (HEAD, EMBEDDING))
    # As bytes: no number equals itself if it is NaN.
    if not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
      return False
  return True
