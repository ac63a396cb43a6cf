# SPDX-License-Identifier: Apache-2.0
"""The wording that training and evaluation share."""

import pytest

from slowfast_jax.eval.tasks.prompts import choose_from_prompt, multiple_choice_prompt


def test_options_are_lettered_in_order():
  prompt = multiple_choice_prompt("What colour?", ["red", "green", "blue"])
  assert prompt == "What colour?\nA. red\nB. green\nC. blue\nAnswer with the letter."


def test_options_to_choose_from_stand_before_the_question():
  """So that what is asked about stands right before the answer."""
  prompt = choose_from_prompt("What colour was the cross?", ["red", "green", "blue"])
  assert prompt == "Choose from: red, green, blue.\nWhat colour was the cross?"


@pytest.mark.parametrize("count", [0, 1, 27])
@pytest.mark.parametrize("prompt", [multiple_choice_prompt, choose_from_prompt])
def test_impossible_numbers_of_options_are_named(prompt, count):
  with pytest.raises(ValueError, match=f"2 to 26 options, got {count}"):
    prompt("Which?", ["x"] * count)
