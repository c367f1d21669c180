# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: some tokens are predicted from all others.

Shape letters: B batch, T length, P predicted tokens.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import causal
from tfjax.objectives import corruption
from tfjax.objectives import loss


class Masked:
  """The first T tokens of each window, P of them predicted.

  P is mask_rate T, rounded. Of the predicted, each becomes the mask with
  probability mask_share, a random token with random_share, and else stays
  (Devlin et al. 2019, §3.1). Special tokens are neither predicted nor drawn.
  Windows are a stream's: no token is added at either end, as in the
  FULL-SENTENCES setting of Liu et al. 2019, and there is one segment.

  Attributes:
    counts: in words, what its loss counts.

  Raises:
    ConfigError: whole_words, and the tokenizer does not tell words apart.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               vocabulary: vocabulary_lib.Vocabulary):
    self._config = config.objective
    self._vocabulary = vocabulary
    self._count = lengths_lib.of(config).predicted
    kind = "in whole words, " if self._config.whole_words else ""
    self.counts = (f"{self._config.mask_rate:.3g} of the tokens, {kind}"
                   f"predicted from the others, {self._config.mask_share:.3g} "
                   f"of them masked, {self._config.random_share:.3g} random")
    self._ordinary = np.flatnonzero(~vocabulary.special).astype(np.int32)
    if self._config.whole_words and vocabulary.word_starts is None:
      raise config_lib.ConfigError(
          "objective.whole_words", "the tokenizer does not tell where a word "
          "starts; it must be of ByteLevel, Metaspace or WordPiece kind")

  def batch(self, windows: Int[np.ndarray, "B W"],
            weights_B: Float[np.ndarray, "B"],
            generators: Sequence[np.random.Generator]) -> loss.Batch:
    """The examples of windows of W = T + 1 tokens; weight 0 is padding."""
    vocabulary, count = self._vocabulary, self._count
    tokens_BT = windows[:, :-1]
    length = tokens_BT.shape[1]
    scores_BT, kind_BP, other_BP = np.split(
        corruption.uniforms(generators, length + 2 * count),
        [length, length + count], axis=1)
    chosen_BT = self._chosen(tokens_BT, scores_BT)
    # The chosen in order, then padding, which is position 0.
    predicted_BP = np.argsort(~chosen_BT, axis=1, kind="stable")[:, :count]
    real_BP = np.take_along_axis(chosen_BT, predicted_BP, axis=1)
    predicted_BP = np.where(real_BP, predicted_BP, 0).astype(np.int32)
    targets_BP = np.take_along_axis(tokens_BT, predicted_BP, axis=1)
    drawn_BP = self._ordinary[
        (other_BP * len(self._ordinary)).astype(np.int64)]
    masked = self._config.mask_share
    seen_BP = np.select(
        [kind_BP < masked, kind_BP < masked + self._config.random_share],
        [np.int32(vocabulary.mask), drawn_BP], targets_BP)
    seen_BT = tokens_BT.copy()
    seen_BT[chosen_BT] = seen_BP[real_BP]
    segments_BT = None
    if self._config.separate_documents:
      segments_BT = causal.segments(tokens_BT, vocabulary.separator)
    return loss.Batch(
        inputs_lib.Inputs(seen_BT, segments=segments_BT), targets_BP,
        (real_BP * weights_B[:, None]).astype(np.float32), predicted_BP)

  def _chosen(self, tokens_BT: np.ndarray,
              scores_BT: np.ndarray) -> np.ndarray:
    """Which tokens are predicted: [B, T], at most P in a row."""
    special_BT = self._vocabulary.special[tokens_BT]
    if not self._config.whole_words:
      return corruption.chosen_tokens(scores_BT, ~special_BT, self._count)
    starts_BT = self._vocabulary.word_starts[tokens_BT]
    starts_BT[:, 1:] |= special_BT[:, :-1]
    return corruption.chosen_words(
        scores_BT, ~special_BT, starts_BT, self._count)
