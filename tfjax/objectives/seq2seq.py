# SPDX-License-Identifier: Apache-2.0
"""Sequence to sequence: a target is predicted from a source and from itself.

Shape letters: B batch, T window, S source, R target, N random numbers.
"""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Float, Int
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import batches
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import corruption
from tfjax.objectives import loss


_COUNTS = {
    "spans": "the tokens of corrupted spans ({noise_density:g} of the text, "
             "{mean_span:g} long), their sentinels and the end",
    "infilling": "every token of the text, {noise_density:g} of them masked "
                 "in the source in spans of {mean_span:g}",
    "none": "every token of the text",
    "pairs": "every token of the target and its end",
}


class Seq2Seq:
  """What objective.corruption makes of a window's first T tokens, or a pair.

  spans: the source has a sentinel for each corrupted span, the target lists
    sentinels and spans; both have an end. Documents may end within a span.
  infilling: the source has one mask for each corrupted span, padded to T; the
    target is the text.
  none: source and target are the text.
  pairs: the two texts of the data with their ends, padded.

  With permute_sentences the text is permuted first; infilling and none still
  have the text in its own order as the target. The decoder's inputs are the
  start, then the targets but for the last.

  Attributes:
    counts: in words, what its loss counts.

  Raises:
    ConfigError: permute_sentences, and the tokenizer does not tell sentences.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               vocabulary: vocabulary_lib.Vocabulary):
    self._config = config.objective
    self._vocabulary = vocabulary
    self.counts = _COUNTS[self._config.corruption].format(
        **dataclasses.asdict(self._config))
    if self._config.permute_sentences:
      self.counts += ", sentences permuted in the source"
    self._length = length = config.model.context_length
    if self._config.corruption == "spans":
      self._noise, self._spans = lengths_lib.noise_spans(self._config, length)
    else:
      self._noise = max(1, round(length * self._config.noise_density))
    if self._config.permute_sentences and vocabulary.sentence_ends is None:
      raise config_lib.ConfigError(
          "objective.permute_sentences", "the tokenizer does not tell where a "
          "sentence ends; it must be of ByteLevel, Metaspace or WordPiece kind")

  def batch(self, windows: Int[np.ndarray, "B W"] | batches.Pairs,
            weights_B: Float[np.ndarray, "B"],
            generators: Sequence[np.random.Generator]) -> loss.Batch:
    """The examples of windows of W = T + 1 tokens; weight 0 is padding."""
    if isinstance(windows, batches.Pairs):
      source_BS, target_BR = windows
    else:
      source_BS = target_BR = windows[:, :-1]
    if self._config.permute_sentences:
      source_BS = self._permuted(source_BS, generators)
    if self._config.corruption == "spans":
      source_BS, target_BR = self._spans_of(source_BS, generators)
    elif self._config.corruption == "infilling":
      source_BS = self._infilled(source_BS, generators)
    return self._batch(source_BS, target_BR, weights_B)

  def _batch(self, source_BS: np.ndarray, target_BR: np.ndarray,
             weights_B: np.ndarray) -> loss.Batch:
    """From sources and targets in which -1 is padding."""
    vocabulary = self._vocabulary
    target_real_BR = target_BR >= 0
    target_BR = np.where(target_real_BR, target_BR, vocabulary.pad)
    input_BR = np.roll(target_BR, 1, axis=1)
    input_BR[:, 0] = vocabulary.start
    source_real_BS = source_BS >= 0
    source_BS = np.where(source_real_BS, source_BS, vocabulary.pad)
    source_segments = target_segments = None
    if self._config.corruption in ("infilling", "pairs"):  # what has padding
      source_segments = source_real_BS.astype(np.int32)
      target_segments = target_real_BR.astype(np.int32)
    source = inputs_lib.Inputs(source_BS.astype(np.int32),
                               segments=source_segments)
    return loss.Batch(
        inputs_lib.Inputs(input_BR.astype(np.int32), source=source,
                          segments=target_segments),
        target_BR.astype(np.int32),
        (target_real_BR * weights_B[:, None]).astype(np.float32))

  def _permuted(self, tokens_BT, generators):
    vocabulary = self._vocabulary
    scores_BT = corruption.uniforms(generators, tokens_BT.shape[1])
    # Padding has no sentences: it goes along with the end before it.
    real_BT = tokens_BT >= 0
    permuted_BT = corruption.permuted_sentences(
        np.where(real_BT, tokens_BT, vocabulary.separator), scores_BT,
        vocabulary.sentence_ends, vocabulary.word_starts, vocabulary.separator)
    return np.where(real_BT, permuted_BT, -1)

  def _spans_of(self, tokens_BT, generators):
    vocabulary = self._vocabulary
    noise_BT = corruption.random_spans(
        corruption.uniforms(generators, self._length - 2), self._length,
        self._noise, self._spans)
    end_B1 = np.full((len(tokens_BT), 1), vocabulary.separator)
    return tuple(
        np.append(corruption.with_sentinels(
            tokens_BT, replaced_BT, vocabulary.sentinels), end_B1, axis=1)
        for replaced_BT in (noise_BT, ~noise_BT))

  def _infilled(self, tokens_BT, generators):
    source_BT = np.full(tokens_BT.shape, -1, np.int32)
    for source_T, tokens_T, generator in zip(
        source_BT, tokens_BT, generators, strict=True):
      source = corruption.infilled(
          tokens_T, self._noise, self._config.mean_span,
          self._vocabulary.mask, generator)
      source_T[:len(source)] = source
    return source_BT
