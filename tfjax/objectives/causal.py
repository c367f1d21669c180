# SPDX-License-Identifier: Apache-2.0
"""Causal language modelling: every token is predicted from those before it.

Shape letters: B batch, T length.
"""

from typing import Sequence

import numpy as np

from tfjax import config as config_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.models import inputs as inputs_lib
from tfjax.objectives import loss


class Causal:
  """Windows of T + 1 tokens: T inputs, and T targets one place on.

  Attributes:
    counts: in words, what its loss counts.
  """

  def __init__(self, config: config_lib.ExperimentConfig,
               vocabulary: vocabulary_lib.Vocabulary):
    self._config = config.objective
    self._separator = vocabulary.separator
    self.counts = ("the tokens behind a random prefix"
                   if self._config.prefix_lm else "every token")

  def batch(self, windows: np.ndarray, weights_B: np.ndarray,
            generators: Sequence[np.random.Generator]) -> loss.Batch:
    """The examples of int32 [B, T + 1]; a window of weight 0 is padding."""
    tokens_BT, targets_BT = windows[:, :-1], windows[:, 1:]
    weights_BT = np.repeat(weights_B[:, None], targets_BT.shape[1], 1)
    weights_BT = weights_BT.astype(np.float32)
    segments_BT = prefix_B = None
    if self._config.separate_documents:
      segments_BT = segments(tokens_BT, self._separator)
    if self._config.prefix_lm:
      length = tokens_BT.shape[1]
      prefix_B = np.array([g.integers(1, length) for g in generators],
                          np.int32)
      # The target at place t is token t + 1: the first one that counts is the
      # one that follows the prefix.
      weights_BT *= np.arange(1, length + 1) >= prefix_B[:, None]
    return loss.Batch(
        inputs_lib.Inputs(tokens_BT, segments=segments_BT, prefix=prefix_B),
        targets_BT, weights_BT)


def segments(tokens_BT: np.ndarray, separator: int) -> np.ndarray:
  """1 for a window's first document, 2 for the next, ...; each begins with
  its separator."""
  return 1 + np.cumsum(tokens_BT == separator, axis=1, dtype=np.int32)
