# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used: counted and named; too many of them end the run."""

import collections
import dataclasses

from absl import logging

from slowfast_jax.errors import UserError

# So many bad samples in a row are no accident: the records do not fit the configuration.
IN_A_ROW = 32
# The rate is that of the latest so many samples: a disk that dies late is noticed too.
WINDOW = 1000
_KEPT = 100


@dataclasses.dataclass(frozen=True)
class Failure:
  """A sample that could not be used; its place in the batch is padding.

  Attributes:
    position: of its row in the endless stream, from 0 at step 0; of its bucket, if there are some.
    record: number of the record in its source.
    conversation: number of the conversation in the record.
    id: of the record; empty where it could not even be read.
    reason: the error's message.
    source: path of the records, if there are several.
  """

  position: int
  record: int
  conversation: int
  id: str
  reason: str
  source: str = ""

  @property
  def name(self) -> str:
    """The record, for messages."""
    source = f" of {self.source}" if self.source else ""
    return f"record {self.record} ({self.id or 'unreadable'}){source}"


class FailureCounter:
  """Counts what this process has handed out.

  Attributes:
    total: samples that could not be used.
    first: the first hundred of them.
    max_rate: the share of the latest thousand samples that may fail; 1 allows all but a long row.
  """

  def __init__(self, max_rate: float):
    if not 0 <= max_rate <= 1:
      raise UserError(f"max_failure_rate must lie between 0 and 1, got {max_rate}.")
    self.max_rate = max_rate
    self.total = 0
    self.first: list[Failure] = []
    self._in_a_row = 0
    self._latest: collections.deque[bool] = collections.deque(maxlen=WINDOW)

  def restart(self) -> None:
    """Forgets what came before, except the total: another iteration begins."""
    self._in_a_row = 0
    self._latest.clear()

  def add(self, failure: Failure | None) -> None:
    """Takes the next sample: None if it is good.

    Raises:
      UserError: too many failed.
    """
    self._latest.append(failure is not None)
    if failure is None:
      self._in_a_row = 0
      return
    self.total += 1
    self._in_a_row += 1
    if len(self.first) < _KEPT:
      self.first.append(failure)
      logging.warning(
        "Left out %s, conversation %d: %s", failure.name, failure.conversation, failure.reason
      )
    last = f"{failure.name}, conversation {failure.conversation}: {failure.reason}"
    if self._in_a_row == IN_A_ROW:
      raise UserError(f"{IN_A_ROW} samples in a row could not be used; the last was {last}")
    # Measured against a full window from the start: one bad sample of the first ten is no tenth.
    if sum(self._latest) > self.max_rate * WINDOW:
      raise UserError(
        f"{sum(self._latest)} of the latest {len(self._latest)} samples could not be used, more "
        f"than data.max_failure_rate = {self.max_rate:g} of {WINDOW}; `slowfast data validate` "
        f"lists what is wrong with records. The last was {last}"
      )
