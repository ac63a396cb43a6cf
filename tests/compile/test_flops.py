# SPDX-License-Identifier: Apache-2.0
"""The paper's headline, from compiled programs: slow tokens cost the decoder two per cent."""

import pytest

from benchmarks.flops import FAST, TOKENS, Case, growth_exponent, headline_cases, measure

# Every seventh layer is hybrid, as of the 28 of the 7B decoder.
LAYERS = 7
FRAMES = (128, 1024, 16384)


@pytest.fixture(scope="module")
def found():
  growth = [Case(FAST, frames * TOKENS, LAYERS) for frames in FRAMES[1:]]
  return measure([*headline_cases(LAYERS).values(), *growth])


def test_slow_tokens_of_128_frames_add_two_per_cent_to_16_frames(found):
  ours, few, *_ = found
  # The arithmetic says 1.92%; the paper says 3%.
  assert 1.018 < ours["flops"] / few["flops"] <= 1.020


def test_all_frames_in_the_sequence_cost_nine_times_as_much(found):
  ours, _, every, *_ = found
  assert every["flops"] / ours["flops"] >= 9


def test_the_slow_path_is_linear_in_frames(found):
  ours, _, _, more, most = found
  flops = [one["flops"] for one in (ours, more, most)]
  assert growth_exponent(FRAMES, flops) == pytest.approx(1.0, abs=0.02)
  # Of few frames some arrays lie where others were, so memory has no exponent; but each slow token,
  # 3,584 numbers of two bytes, is there at most four times.
  tokens = (FRAMES[-1] - FRAMES[0]) * TOKENS
  assert (most["memory"] - ours["memory"]) / tokens <= 4 * 3584 * 2
