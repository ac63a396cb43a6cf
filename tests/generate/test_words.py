# SPDX-License-Identifier: Apache-2.0
"""What each word of a reply read: attention at the position before it, weighed by its gate."""

import numpy as np

from slowfast_jax.generate.attention import SlowAttention
from slowfast_jax.generate.words import MOST_WORDS, Word, below, draw_words, words_of
from tests.generate.tiny import TOKENIZER

# One layer, one head; four positions, the last two of which are the reply; three frames.
WEIGHTS = np.array([[0.2, 0.3, 0.5], [1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]], np.float32)


def attention(gates):
  mark = np.array([False, False, True, True])
  return SlowAttention(
    WEIGHTS[None, None],
    np.array([gates], np.float32),
    np.arange(4),
    ~mark,
    mark,
    (0,),
    WEIGHTS[None, None],
  )


def test_a_token_is_written_from_what_the_position_before_it_read():
  np.testing.assert_allclose(attention([1, 0.5, 2, 1]).read_by_reply(), WEIGHTS[1:3])


def test_a_shut_gate_reads_nothing_in_particular():
  read = attention([1, 0, 2, 1]).read_by_reply()
  np.testing.assert_allclose(read[0], np.full(3, 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(read[1], WEIGHTS[2])


def test_words_are_tokens_from_space_to_space():
  ids = TOKENIZER.encode("The circle was red.")
  read = np.random.default_rng(0).dirichlet(np.ones(4), len(ids)).astype(np.float32)
  words = words_of(TOKENIZER, ids, read)
  assert [word.text for word in words] == ["The", "circle", "was", "red."]
  count = len(TOKENIZER.encode("The"))
  np.testing.assert_allclose(words[0].profile, read[:count].mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose([word.profile.sum() for word in words], 1, rtol=1e-5)
  assert words_of(TOKENIZER, [], read[:0]) == []


def test_a_word_is_darkest_where_it_read():
  words = [Word("left", np.array([1, 0, 0.0])), Word("right", np.array([0, 0, 1.0]))]
  picture = np.asarray(draw_words(words, np.array([0, 1, 2.0])).convert("L"), float)
  first, second = picture[50, 250:1390], picture[80, 250:1390]
  assert first[10] < first[-10] - 100
  assert second[-10] < second[10] - 100


def test_long_replies_make_no_endless_picture():
  word = Word("word" * 20, np.ones(2) / 2)
  picture = draw_words([word] * 500, np.array([0, 1.0]))
  assert picture.height == draw_words([word] * MOST_WORDS, np.array([0, 1.0])).height
  assert below(picture, picture).height == 2 * picture.height
