# SPDX-License-Identifier: Apache-2.0
"""How text is corrupted: choices of tokens, spans and orders, in NumPy.

Every row's outcome depends on its own tokens and random numbers alone, so that
it is the same in whatever batch and on whatever host.

Shape letters: B rows, T tokens of a window, N noise tokens, K spans.
"""

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
import numpy as np


def uniforms(generators: Sequence[np.random.Generator],
             count: int) -> Float[np.ndarray, "B count"]:
  """`count` random numbers in [0, 1) from each row's own generator."""
  return np.stack([generator.random(count) for generator in generators])


# --- Single tokens (masked) --------------------------------------------------


def chosen_tokens(
    scores_BT: Float[np.ndarray, "B T"], eligible_BT: Bool[np.ndarray, "B T"],
    count: int) -> Bool[np.ndarray, "B T"]:
  """The `count` eligible tokens of least score; all, where there are fewer."""
  scores_BT = np.where(eligible_BT, scores_BT, np.inf)
  chosen_BT = np.zeros(scores_BT.shape, bool)
  least = np.argpartition(scores_BT, count - 1, axis=1)[:, :count]
  np.put_along_axis(chosen_BT, least, True, axis=1)
  return chosen_BT & eligible_BT


def chosen_words(
    scores_BT: Float[np.ndarray, "B T"], eligible_BT: Bool[np.ndarray, "B T"],
    starts_BT: Bool[np.ndarray, "B T"], count: int
) -> Bool[np.ndarray, "B T"]:
  """Tokens of whole words, at most `count`.

  Words come in the order of their scores, and one that would exceed what is
  left of `count` is passed over, as in the code released with Devlin et al.
  2019. A word is a token of `starts` and those up to the next; the score of
  the n-th word is the n-th score, and one with ineligible tokens is left out.
  """
  chosen_BT = np.zeros(scores_BT.shape, bool)
  for chosen_T, scores_T, eligible_T, starts_T in zip(
      chosen_BT, scores_BT, eligible_BT, starts_BT, strict=True):
    starts_T = starts_T.copy()
    starts_T[0] = True
    start_K = np.flatnonzero(starts_T)
    whole_K = np.logical_and.reduceat(eligible_T, start_K)
    sizes = np.diff(start_K, append=len(starts_T)).tolist()
    order = np.argsort(np.where(whole_K, scores_T[:len(sizes)], np.inf))
    left = count
    for word in order[:whole_K.sum()].tolist():
      if sizes[word] <= left:
        chosen_T[start_K[word]:start_K[word] + sizes[word]] = True
        left -= sizes[word]
        if not left:
          break
  return chosen_BT


# --- Spans that become sentinels (T5) ----------------------------------------


def random_spans(
    uniforms_BU: Float[np.ndarray, "B T-2"], length: int, noise: int,
    spans: int) -> Bool[np.ndarray, "B T"]:
  """Which tokens are noise: `noise` of `length`, in `spans` spans.

  Kept and noise spans alternate, a kept one first. Their lengths are uniform
  over all ways to divide the tokens among them, one at least to each, as in
  `random_spans_noise_mask` of the code released with Raffel et al. 2020.
  """
  kept_BK = _divided(uniforms_BU[:, noise - 1:], length - noise, spans)
  noise_BK = _divided(uniforms_BU[:, :noise - 1], noise, spans)
  ends_BK = np.cumsum(np.stack([kept_BK, noise_BK], 2).reshape(
      len(uniforms_BU), 2 * spans), axis=1)
  border_BT = np.zeros((len(uniforms_BU), length), bool)
  np.put_along_axis(border_BT, ends_BK[:, :-1], True, axis=1)
  return np.cumsum(border_BT, axis=1) % 2 == 1


def _divided(uniforms_BU: np.ndarray, total: int, parts: int) -> np.ndarray:
  """Lengths [B, parts] of a random division of `total` into positive parts."""
  cuts_BK = np.sort(np.argsort(uniforms_BU, axis=1)[:, :parts - 1], axis=1) + 1
  return np.diff(cuts_BK, axis=1, prepend=0, append=total)


def with_sentinels(
    tokens_BT: Int[np.ndarray, "B T"], noise_BT: Bool[np.ndarray, "B T"],
    sentinels: Sequence[int]) -> Int[np.ndarray, "B S"]:
  """The tokens, each run of noise replaced by the next sentinel.

  All rows must keep equally many tokens. The target is this of the complement
  (Raffel et al. 2020, Figure 2): sentinels for what was kept, then the noise.
  """
  first_BT = noise_BT.copy()
  first_BT[:, 1:] &= ~noise_BT[:, :-1]
  number_BT = np.cumsum(first_BT, axis=1) - 1
  marked_BT = np.where(first_BT, np.asarray(sentinels)[number_BT], tokens_BT)
  return marked_BT[~noise_BT | first_BT].reshape(len(tokens_BT), -1)


# --- Spans that become one mask (BART) ---------------------------------------


def infilled(tokens_T: Int[np.ndarray, "T"], noise: int, mean_span: float,
             mask: int, generator: np.random.Generator
             ) -> Int[np.ndarray, "S"]:
  """Text infilling (Lewis et al. 2020, §2.2): S <= T tokens.

  Span lengths are drawn from Poisson(mean_span) until they sum to `noise`
  tokens, the last one cut so that they do exactly; each span lies at a random
  place between kept tokens, and becomes one mask. Two may touch. A span of
  length 0 inserts a mask; insertions beyond the places that the other spans
  free are left out, so that the text does not grow.
  """
  lengths_K = np.zeros(0, np.int64)
  while lengths_K.sum() < noise:
    lengths_K = np.append(lengths_K, generator.poisson(
        mean_span, 1 + int(2 * noise / mean_span)))
  ends_K = np.cumsum(lengths_K)
  last = np.searchsorted(ends_K, noise)
  lengths_K = lengths_K[:last + 1]
  lengths_K[-1] -= ends_K[last] - noise
  empty = np.flatnonzero(lengths_K == 0)
  freed = noise - (len(lengths_K) - len(empty))
  lengths_K = np.delete(lengths_K, empty[freed:])
  # How many kept tokens come before each span.
  place_K = generator.integers(
      0, len(tokens_T) - noise, len(lengths_K), endpoint=True)
  order_K = np.argsort(place_K)
  place_K, lengths_K = place_K[order_K], lengths_K[order_K]
  start_K = place_K + np.cumsum(lengths_K) - lengths_K
  change_T = np.zeros(len(tokens_T) + 1, np.int64)
  np.add.at(change_T, start_K, 1)
  np.add.at(change_T, start_K + lengths_K, -1)
  kept = tokens_T[np.cumsum(change_T[:-1]) == 0]
  return np.insert(kept, place_K, mask)


# --- Sentences (BART) --------------------------------------------------------


def permuted_sentences(
    tokens_BT: Int[np.ndarray, "B T"], scores_BT: Float[np.ndarray, "B T"],
    ends: Bool[np.ndarray, "V"], word_starts: Bool[np.ndarray, "V"],
    separator: int) -> Int[np.ndarray, "B T"]:
  """Each document's sentences in random order; separators stay in place.

  A sentence ends with a token of `ends` that a token of `word_starts` follows,
  so not within "3.14"; the score of the n-th sentence is the n-th score.
  """
  is_separator_BT = tokens_BT == separator
  starts_BT = is_separator_BT.copy()
  starts_BT[:, 1:] |= is_separator_BT[:, :-1] | (
      ends[tokens_BT[:, :-1]] & word_starts[tokens_BT[:, 1:]])
  starts_BT[:, 0] = True
  sentence_BT = np.cumsum(starts_BT, axis=1) - 1
  score_BT = np.take_along_axis(scores_BT, sentence_BT, axis=1)
  score_BT[is_separator_BT] = -1
  order_BT = np.lexsort((score_BT, np.cumsum(is_separator_BT, axis=1)))
  return np.take_along_axis(tokens_BT, order_BT, axis=1)
