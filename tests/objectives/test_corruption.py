# SPDX-License-Identifier: Apache-2.0
"""Corruption: published statistics and examples, and nothing lost."""

import collections
import math

import numpy as np
import pytest

from tfjax.objectives import corruption

# The vocabulary of the examples: words, then X, Y, Z.
WORDS = "Thank you for inviting me to your party last week . X Y Z".split()
X, Y, Z = (WORDS.index(name) for name in "XYZ")


def ids(text: str) -> np.ndarray:
  return np.array([[WORDS.index(word) for word in text.split()]])


def words(tokens: np.ndarray) -> str:
  return " ".join(WORDS[i] for i in tokens)


def generator(seed: int) -> np.random.Generator:
  return np.random.default_rng(seed)


# --- Single tokens -----------------------------------------------------------


def test_chosen_tokens_are_the_eligible_of_least_score() -> None:
  scores = np.array([[.1, .5, .2, .9], [.1, .5, .2, .9], [.1, .5, .2, .9]])
  eligible = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)
  np.testing.assert_array_equal(
      corruption.chosen_tokens(scores, eligible, 2),
      [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])


def test_a_word_that_is_too_long_is_passed_over() -> None:
  starts = np.array([[0, 0, 1, 0, 0, 0, 1, 1]], bool)  # 2, 4, 1, 1 tokens
  eligible = np.ones((1, 8), bool)
  def chosen(scores: list[float], count: int) -> list[int]:
    scores_BT = np.array([scores + [0.0] * 4])
    return np.flatnonzero(corruption.chosen_words(
        scores_BT, eligible, starts, count)).tolist()
  assert chosen([.4, .1, .2, .3], 4) == [2, 3, 4, 5]
  assert chosen([.4, .1, .2, .3], 3) == [6, 7]
  assert chosen([.2, .1, .4, .3], 3) == [0, 1, 7]
  eligible[0, 7] = False  # a special token
  assert chosen([.2, .1, .4, .3], 3) == [0, 1, 6]


# --- Spans -------------------------------------------------------------------


def test_the_example_of_the_t5_paper() -> None:
  """Raffel et al. 2020, Figure 2, the final sentinel included."""
  text = ids("Thank you for inviting me to your party last week .")
  noise = np.isin(text, ids("for inviting last"))
  assert words(corruption.with_sentinels(text, noise, (X, Y, Z))[0]) == (
      "Thank you X me to your party Y week .")
  assert words(corruption.with_sentinels(text, ~noise, (X, Y, Z))[0]) == (
      "X for inviting Y last Z")


def test_the_published_noise_of_t5() -> None:
  """Raffel et al. 2020, §3.1.4: 15% in spans of 3 on average; here 100,000
  tokens in the 568 that their code takes for inputs of 512."""
  rows = 177
  assert rows * 568 > 100_000
  noise = corruption.random_spans(
      generator(0).random((rows, 566)), 568, 85, 28)
  assert (noise.sum(1) == 85).all()
  starts = noise & ~np.roll(noise, 1, axis=1)
  assert (starts.sum(1) == 28).all()
  assert not noise[:, 0].any() and noise[:, -1].all()
  assert abs(noise.mean() - .15) < 5e-4
  assert abs(noise.sum() / starts.sum() - 3) < .04
  # Of uniform divisions of n into k parts a part is 1 with probability
  # (k - 1) / (n - 1), and longer than m with C(n - m - 1, k - 1) / C(n - 1, k
  # - 1).
  lengths = np.diff(np.flatnonzero(np.diff(
      np.pad(noise, ((0, 0), (0, 1))).astype(int).ravel())))[::2]
  assert len(lengths) == 28 * rows and lengths.sum() == 85 * rows
  for more_than in (1, 3, 6):
    share = (math.comb(85 - more_than - 1, 27) / math.comb(84, 27))
    error = math.sqrt(share * (1 - share) / len(lengths))
    assert abs((lengths > more_than).mean() - share) < 4 * error


def test_every_division_is_as_likely() -> None:
  noise = corruption.random_spans(generator(1).random((6000, 6)), 8, 4, 2)
  found = collections.Counter(map(bytes, noise))
  # 3 ways to divide 4 tokens in 2 on either side.
  assert len(found) == 9
  assert all(abs(n - 6000 / 9) < 5 * math.sqrt(6000 / 9)
             for n in found.values())


def test_one_span() -> None:
  noise = corruption.random_spans(generator(0).random((1, 6)), 8, 3, 1)
  np.testing.assert_array_equal(noise, [[0] * 5 + [1] * 3])


# --- Infilling ---------------------------------------------------------------

TEXT = np.arange(512, dtype=np.int32)
MASK = 1000


def removed_spans(source: np.ndarray) -> list[int]:
  """The lengths of the spans of TEXT that each run of masks stands for."""
  ends = [-1, *source, len(TEXT)]
  places = [i for i, token in enumerate(ends) if token != MASK]
  return [ends[b] - ends[a] - 1 for a, b in zip(places, places[1:])
          if b > a + 1]


def test_infilling_masks_so_many_tokens_and_keeps_the_others() -> None:
  for seed in range(20):
    source = corruption.infilled(TEXT, 154, 3.0, MASK, generator(seed))
    kept = source[source != MASK]
    assert len(kept) == 512 - 154 and (np.diff(kept) > 0).all()
    assert sum(removed_spans(source)) == 154
    assert len(source) < 512 and source.dtype == np.int32


def test_infilled_spans_are_poisson() -> None:
  """Lewis et al. 2020, §2.2: lambda = 3, on 100,000 tokens."""
  spans = []
  for seed in range(200):
    # Far apart, so that hardly any two touch.
    source = corruption.infilled(TEXT, 24, 3.0, MASK, generator(seed))
    masks = (source == MASK).sum()
    found = removed_spans(source)
    if masks == len(found):
      spans += found
  assert len(spans) > 1000
  counts = np.bincount(spans, minlength=8)
  assert counts[0] > 0  # insertions
  for length in range(7):
    share = math.exp(-3) * 3 ** length / math.factorial(length)
    # The last span of a row is cut, which moves a few to lesser lengths.
    assert abs(counts[length] / len(spans) - share) < .03
  assert abs(np.mean(spans) - 3) < .2


@pytest.mark.parametrize("length, noise", [(1, 1), (9, 9), (9, 8), (512, 500)])
def test_infilling_never_grows_the_text(length: int, noise: int) -> None:
  for seed in range(50):
    source = corruption.infilled(
        TEXT[:length], noise, 1.0, MASK, generator(seed))
    assert 1 <= len(source) <= length
    assert (source != MASK).sum() == length - noise


def test_the_last_span_is_not_always_the_cut_one() -> None:
  # A span of about 39, and one cut to what is missing of 40.
  first = [removed_spans(corruption.infilled(
      TEXT, 40, 39.0, MASK, generator(seed)))[0] for seed in range(200)]
  assert 20 < sum(length < 10 for length in first)


# --- Sentences ---------------------------------------------------------------

#         0    1    2    3    4     5      6      7
PIECES = ["|", "A", "b", ".", " C", ".3", " d!", " E?"]
ENDS = np.array([p[-1] in ".!?" for p in PIECES])
STARTS = np.array([p[0] in " |" for p in PIECES])


def permuted(tokens: list[int], scores: list[float]) -> str:
  scores_BT = np.pad(np.array([scores]), ((0, 0), (0, 9)))[:, :len(tokens)]
  return "".join(PIECES[i] for i in corruption.permuted_sentences(
      np.array([tokens]), scores_BT, ENDS, STARTS, separator=0)[0])


def test_sentences_are_permuted_within_their_documents() -> None:
  text = [1, 2, 3, 4, 5, 6, 7, 0, 1, 3, 4, 0]
  assert "".join(PIECES[i] for i in text) == "Ab. C.3 d! E?|A. C|"
  # Sentences in order, separators counted: Ab. / C.3 d! / E? / | / A. / C / |
  assert permuted(text, [.1, .2, .3, 0, .4, .5]) == "Ab. C.3 d! E?|A. C|"
  assert permuted(text, [.3, .2, .1, .9, .5, .4]) == " E? C.3 d!Ab.| CA.|"
  assert permuted(text, [.2, .9, .3, .0, .1, .7]) == "Ab. E? C.3 d!|A. C|"
  # A full stop that no word follows is none.
  assert permuted([1, 3, 2, 4, 3, 6], [.3, .1, .2]) == " d!A.b C."


def test_permutations_are_all_as_likely() -> None:
  text = np.tile([1, 3, 4, 3, 7], (6000, 1))  # three sentences
  found = collections.Counter(map(bytes, corruption.permuted_sentences(
      text, generator(0).random(text.shape), ENDS, STARTS, separator=0)))
  assert len(found) == 6
  assert all(abs(n - 1000) < 5 * math.sqrt(1000) for n in found.values())
