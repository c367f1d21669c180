# SPDX-License-Identifier: Apache-2.0
"""The causal objective: what is predicted from what, and what counts."""

from typing import Any

import numpy as np

from tfjax import objectives
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import loss

T = 16
WINDOWS = np.random.default_rng(0).integers(0, 256, (40, T + 1), np.int32)
WEIGHTS = np.array([0] + [1] * 39, np.float32)


def batch(make_config, changes: dict[str, Any],
          windows: np.ndarray = WINDOWS) -> loss.Batch:
  config = make_config({"model.context_length": T, **changes})
  objective = objectives.create(
      config, vocabulary_lib.of(config, tokenizers.byte_level()))
  return objective.batch(windows, WEIGHTS[:len(windows)],
                         objectives.Generators(0, 0, range(len(windows))))


def test_the_target_is_the_next_token(make_config) -> None:
  made = batch(make_config, {})
  np.testing.assert_array_equal(made.inputs.tokens, WINDOWS[:, :-1])
  np.testing.assert_array_equal(made.targets, WINDOWS[:, 1:])
  np.testing.assert_array_equal(
      made.weights, np.repeat(WEIGHTS[:, None], T, 1))
  assert made.predicted is made.inputs.segments is made.inputs.prefix is None


def test_documents_apart(make_config) -> None:
  windows = np.array([[5, 6, 256, 7, 8, 9, 256, 256] + [1] * 9], np.int32)
  made = batch(make_config, {"objective.separate_documents": True}, windows)
  np.testing.assert_array_equal(
      made.inputs.segments, [[1, 1, 2, 2, 2, 2, 3, 4] + [4] * 8])


def test_a_prefix_is_seen_and_not_predicted(make_config) -> None:
  made = batch(make_config, {"objective.prefix_lm": True})
  prefixes = made.inputs.prefix
  assert prefixes.min() >= 1 and prefixes.max() < T
  assert len(set(prefixes)) > 8
  assert not made.weights[0].any()
  for prefix, weights in zip(prefixes[1:], made.weights[1:]):
    # Tokens 0 to prefix - 1 are seen whole; the target at t is token t + 1.
    np.testing.assert_array_equal(weights, np.arange(T) + 1 >= prefix)
