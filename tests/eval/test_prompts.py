# SPDX-License-Identifier: Apache-2.0
"""The wording that training and evaluation share."""

import pytest

from slowfast_jax.eval.tasks.prompts import multiple_choice_prompt


def test_options_are_lettered_in_order():
  prompt = multiple_choice_prompt("What colour?", ["red", "green", "blue"])
  assert prompt == "What colour?\nA. red\nB. green\nC. blue\nAnswer with the letter."


@pytest.mark.parametrize("count", [0, 1, 27])
def test_impossible_numbers_of_options_are_named(count):
  with pytest.raises(ValueError, match=f"2 to 26 options, got {count}"):
    multiple_choice_prompt("Which?", ["x"] * count)
