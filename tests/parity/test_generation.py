# SPDX-License-Identifier: Apache-2.0
"""The Python interface on text, against a Qwen2 of Hugging Face that answers each text alone."""

import numpy as np
import pytest
import torch

from slowfast_jax.api import VLM
from slowfast_jax.checkpoints.hf_parts import load_parts
from tests.parity import oracles

NEW = 12
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, oracles.VOCAB_SIZE, n).tolist() for n in (3, 29, 1, 8)]
# A video in the same batch, whose fast tokens make it the longest.
VIDEO = ([5, -200, 6], RNG.normal(0, 1, (4, *[oracles.IMAGE_SIZE] * 2, 3)).astype(np.float32))
MIXED = ([*PROMPTS[:2], VIDEO[0], *PROMPTS[2:]], [None, None, VIDEO[1], None, None])


def greedy(model, ids, stop):
  with torch.no_grad():
    out = model.generate(
      torch.tensor([ids]),
      attention_mask=torch.ones(1, len(ids), dtype=torch.long),
      do_sample=False,
      max_new_tokens=NEW,
      eos_token_id=stop,
    )
  return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """Their model and ours; both stop at a token that a reply comes to halfway."""
  llm, vision = tmp_path_factory.mktemp("qwen2"), tmp_path_factory.mktemp("siglip")
  model = oracles.decoder("qwen2", llm)
  oracles.tower("siglip", vision)
  reply = greedy(model, PROMPTS[2], stop=None)
  model.generation_config.eos_token_id = next(t for t in reply[4:] if t not in reply[:4])
  model.save_pretrained(llm)
  return model, VLM(load_parts(llm, vision))


def test_greedy_replies_in_a_mixed_batch_are_those_of_each_alone(pair):
  model, vlm = pair
  stop = model.generation_config.eos_token_id
  expected = [greedy(model, ids, stop) for ids in PROMPTS]
  assert 4 < len(expected[2]) < NEW
  assert max(len(reply) for reply in expected) == NEW
  replies = vlm.generate_ids(*MIXED, max_new_tokens=NEW)
  assert replies.pop(2)
  assert replies == expected


def test_logits_of_a_mixed_batch_are_those_of_each_alone(pair):
  model, vlm = pair
  scores = vlm.logits(*MIXED)
  assert np.isfinite(scores.pop(2)).all()
  for ids, ours in zip(PROMPTS, scores):
    with torch.no_grad():
      theirs = model(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
