# SPDX-License-Identifier: Apache-2.0
"""The masked objective: BERT's rates, whole words, fixed shapes."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import loss
from tfjax.objectives import masked

TOKENIZER = tokenizers.byte_level()
SEPARATOR = TOKENIZER.separator_id
# 196 windows of 512 tokens: 100,352, a separator every 97.
ROWS, T = 196, 512
STREAM = np.random.default_rng(0).integers(0, 256, ROWS * T + 1, np.int32)
STREAM[::97] = SEPARATOR
WINDOWS = STREAM[np.arange(ROWS)[:, None] * T + np.arange(T + 1)]


def make(make_config, changes: dict[str, Any] | None = None
         ) -> masked.Masked:
  config = make_config({"model.family": "bert", "model.context_length": T,
                        **(changes or {})})
  return objectives.create(config, vocabulary_lib.of(config, TOKENIZER))


def batch(objective: masked.Masked, windows: np.ndarray = WINDOWS,
          step: int = 0) -> loss.Batch:
  rows = range(len(windows))
  return objective.batch(windows, np.ones(len(windows), np.float32),
                         objectives.Generators(0, step, rows))


def near(found: float, share: float, count: int) -> bool:
  """Within four standard errors."""
  return abs(found / count - share) < 4 * math.sqrt(
      share * (1 - share) / count)


def test_the_published_rates_of_bert(make_config) -> None:
  """Devlin et al. 2019, §3.1, on 100,000 tokens."""
  made = batch(make(make_config))
  assert made.predicted.shape == made.targets.shape == (ROWS, 77)
  assert made.weights.sum() == ROWS * 77 and 77 == round(.15 * T)
  assert (np.diff(made.predicted) > 0).all()
  tokens = WINDOWS[:, :-1]
  np.testing.assert_array_equal(
      made.targets, np.take_along_axis(tokens, made.predicted, 1))
  assert not (made.targets == SEPARATOR).any()
  seen = np.take_along_axis(made.inputs.tokens, made.predicted, 1)
  count = seen.size
  assert near((seen == 257).sum(), .8, count)  # the mask
  other = seen[(seen != 257) & (seen != made.targets)]
  # A random token is the token itself once in 256.
  assert near(len(other), .1 * 255 / 256, count)
  assert other.max() < 256 and len(set(other)) > 250
  assert abs(other.mean() - 127.5) < 4 * 74 / math.sqrt(len(other))
  # Nothing else is touched.
  restored = made.inputs.tokens.copy()
  np.put_along_axis(restored, made.predicted, made.targets, 1)
  np.testing.assert_array_equal(restored, tokens)
  # Any place is as likely, but for the separators.
  thirds = np.histogram(made.predicted, 3, (0, T))[0]
  assert all(near(n, 1 / 3, count) for n in thirds)
  assert made.inputs.segments is None and made.inputs.source is None


@pytest.mark.parametrize("mask, random", [(1, 0), (0, 1), (0, 0), (.5, .5)])
def test_other_shares(make_config, mask: float, random: float) -> None:
  made = batch(make(make_config, {
      "objective.mask_rate": 0.4, "objective.mask_share": mask,
      "objective.random_share": random}))
  assert made.predicted.shape == (ROWS, round(.4 * T))
  seen = np.take_along_axis(made.inputs.tokens, made.predicted, 1)
  assert near((seen == 257).sum(), mask, seen.size) or mask in (0, 1)
  assert (seen == 257).all() == (mask == 1)
  assert (seen == made.targets).all() == (mask + random == 0)


def test_masks_change_with_the_step_only(make_config) -> None:
  objective = make(make_config)
  first, again, later = (batch(objective, step=step) for step in (3, 3, 4))
  np.testing.assert_array_equal(first.inputs.tokens, again.inputs.tokens)
  same = (first.predicted == later.predicted).all(1)
  assert not same.any()
  # Nor do two rows of one batch share theirs.
  assert len(np.unique(first.predicted, axis=0)) == ROWS


def test_windows_with_little_to_predict_are_padded(make_config) -> None:
  windows = np.full((3, T + 1), SEPARATOR, np.int32)
  windows[1, [5, 9]] = 7, 8
  windows[2, 0] = 9
  made = batch(make(make_config), windows)
  np.testing.assert_array_equal(made.weights.sum(1), [0, 2, 1])
  np.testing.assert_array_equal(made.predicted[1, :3], [5, 9, 0])
  np.testing.assert_array_equal(made.targets[1, :2], [7, 8])
  # Padding, which is position 0, does not touch what is there.
  np.testing.assert_array_equal(
      np.delete(made.inputs.tokens[1], [5, 9]), SEPARATOR)
  np.testing.assert_array_equal(made.predicted[2], 0)
  assert made.weights[2, 0] == 1


def test_windows_of_no_weight_do_not_count(make_config) -> None:
  made = make(make_config).batch(
      WINDOWS[:2], np.array([0, 1], np.float32),
      objectives.Generators(0, 0, range(2)))
  np.testing.assert_array_equal(made.weights.sum(1), [0, 77])
  assert made.weights.dtype == np.float32


def test_whole_words_are_never_split(make_config) -> None:
  text = ("One sentence of some words, and another-one; " * 300).encode()
  windows = np.frombuffer(text[:4 * (T + 1)], np.uint8).reshape(4, T + 1)
  windows = windows.astype(np.int32)
  windows[0, 100] = SEPARATOR
  objective = make(make_config, {"objective.whole_words": True})
  made = batch(objective, windows)
  counts = made.weights.sum(1)
  assert (counts <= 77).all() and (counts > 70).all()
  for tokens, predicted, weights in zip(
      windows[:, :-1], made.predicted, made.weights):
    chosen = np.zeros(T, bool)
    chosen[predicted[weights > 0]] = True
    word = np.cumsum((tokens == ord(" ")) | (tokens == SEPARATOR) |
                     np.roll(tokens == SEPARATOR, 1))
    shares = np.bincount(word, chosen) / np.maximum(np.bincount(word), 1)
    assert set(shares) == {0, 1}
  # A document's first word is one like any other.
  assert any(101 in batch(objective, windows[:1], step).predicted
             for step in range(40))
  # Without, words are split.
  plain = batch(make(make_config), windows)
  assert (np.diff(plain.predicted[0]) > 1).mean() > .8


def test_whole_words_need_a_tokenizer_that_tells_them(make_config) -> None:
  config = make_config({"model.family": "bert",
                        "objective.whole_words": True})
  vocabulary = dataclasses.replace(
      vocabulary_lib.of(config, TOKENIZER), word_starts=None)
  with pytest.raises(config_lib.ConfigError, match="where a word starts"
                     ) as info:
    objectives.create(config, vocabulary)
  assert info.value.key == "objective.whole_words"


def test_documents_apart(make_config) -> None:
  made = batch(make(make_config, {"objective.separate_documents": True}))
  np.testing.assert_array_equal(
      np.diff(made.inputs.segments), WINDOWS[:, 1:-1] == SEPARATOR)
  assert made.inputs.segments.min() == 1
