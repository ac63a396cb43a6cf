# SPDX-License-Identifier: Apache-2.0
"""The model `slowfast_jax` of lmms-eval: a checkpoint, or a replay of predictions.

  python -m lmms_eval --model slowfast_jax --model_args pretrained=CHECKPOINT --tasks ...
  python -m lmms_eval --model slowfast_jax --model_args predictions=FILE --tasks ...

Only lmms-eval imports this module.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from slowfast_jax.errors import UserError
from slowfast_jax.eval.lmms_answers import Answers, FromCheckpoint, FromPredictions, Request

# What lmms-eval passes to every model, and means nothing here.
_IGNORED = {"device", "max_batch_size"}


class Simple(lmms):
  """For tasks that give a text and the visuals that belong to it.

  Args:
    pretrained: a checkpoint, as `slowfast eval` takes it.
    predictions: or a predictions.jsonl to take the replies from.
    batch_size: questions at once.
    dtype: of the computation.
    decode_cross_attention: new tokens read slow tokens; False as in the paper's scores.

  Raises:
    UserError: neither or both are given, or something unknown is.
  """

  is_simple = True

  def __init__(
    self,
    pretrained: str = "",
    predictions: str = "",
    batch_size: int | str = 1,
    dtype: str = "bfloat16",
    decode_cross_attention: bool = True,
    **others: Any,
  ):
    super().__init__()
    if unknown := sorted(set(others) - _IGNORED):
      raise UserError(f"--model_args: there is no {', '.join(unknown)}.")
    if bool(pretrained) == bool(predictions):
      raise UserError("--model_args: give either pretrained=CHECKPOINT or predictions=FILE.")
    self.answers: Answers
    if predictions:
      self.answers = FromPredictions(predictions)
    else:
      size = 1 if batch_size == "auto" else int(batch_size)
      self.answers = FromCheckpoint(pretrained, size, dtype, decode_cross_attention)

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The replies, in order. Where a video cannot be read they are empty, and the log says why."""
    return self.answers.answer([self.read(request.args) for request in requests])

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(loss, greedy) of each continuation: its scorer of options takes the smallest."""
    found = []
    for request in requests:
      context, continuation, doc_to_visual, doc_id, task, split = request.args
      visuals = doc_to_visual(self.task_dict[task][split][doc_id])
      found.append(self.answers.loss(Request(context, tuple(visuals or ())), continuation))
    return found

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    raise UserError("slowfast_jax does not take part in tasks of several rounds.")

  def read(self, args: tuple) -> Request:
    """What lmms-eval asks, in our words."""
    context, settings, doc_to_visual, doc_id, task, split = args
    visuals = doc_to_visual(self.task_dict[task][split][doc_id])
    return Request(context, tuple(visuals or ()), settings)


class Chat(Simple):
  """For tasks that give messages; pictures and videos go before the text."""

  is_simple = False

  def read(self, args: tuple) -> Request:
    _, doc_to_messages, settings, doc_id, task, split = args
    messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
    if [message.role for message in messages.messages] != ["user"]:
      raise UserError(f"Task {task}: expected one message, of the user.")
    images, videos, audios = messages.extract_media()
    if audios:
      raise UserError(f"Task {task}: this model does not listen.")
    contents = messages.messages[0].content
    text = "\n".join(part.text for part in contents if part.type == "text")
    return Request(text, (*images, *videos), settings)
