# SPDX-License-Identifier: Apache-2.0
"""Sequence to sequence: nothing of the text is lost, and shapes are fixed."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax.cost import lengths as lengths_lib
from tfjax.data import batches
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.objectives import loss

TOKENIZER = tokenizers.byte_level()
SEPARATOR = START = PAD = TOKENIZER.separator_id
MASK = 257
T = 128
TEXT = ("Thank you for inviting me. It was 3.14 times better! Was it? " * 60
        ).encode()
WINDOWS = np.frombuffer(TEXT[:20 * (T + 1)], np.uint8).astype(
    np.int32).reshape(20, T + 1)
WINDOWS[:, 60] = SEPARATOR
SPANS = {"model.family": "t5"}
INFILLING = {"model.family": "bart", "objective.corruption": "infilling",
             "objective.noise_density": 0.3}
NONE = {"model.family": "bart", "objective.corruption": "none",
        "objective.permute_sentences": True}


def make(make_config, changes: dict[str, Any]) -> tuple[
    objectives.Objective, lengths_lib.Lengths]:
  config = make_config({"model.context_length": T, **changes})
  vocabulary = vocabulary_lib.of(config, TOKENIZER)
  return objectives.create(config, vocabulary), lengths_lib.of(config)


def batch(objective: objectives.Objective, windows=WINDOWS,
          step: int = 0) -> loss.Batch:
  rows = range(len(windows) if isinstance(windows, np.ndarray)
               else len(windows.source))
  return objective.batch(windows, np.ones(len(rows), np.float32),
                         objectives.Generators(0, step, rows))


def check_shapes(made: loss.Batch, lengths: lengths_lib.Lengths) -> None:
  """What was computed from the config is what there is."""
  source, target = made.inputs.source.tokens, made.inputs.tokens
  assert source.shape[1] == lengths.encoder
  assert target.shape[1] == lengths.decoder
  assert made.targets.shape[1] == lengths.predicted
  assert {x.dtype for x in (source, target, made.targets)} == {
      np.dtype(np.int32)}
  np.testing.assert_array_equal(target[:, 0], START)
  np.testing.assert_array_equal(target[:, 1:], made.targets[:, :-1])


def joined(source: np.ndarray, target: np.ndarray) -> list[int]:
  """The text of a source whose sentinels stand for spans of a target."""
  spans: dict[int, list[int]] = {}
  for token in target:
    if token > SEPARATOR:
      span = spans.setdefault(int(token), [])
    else:
      span.append(int(token))
  return [t for token in source for t in (
      spans[int(token)] if token > SEPARATOR else [int(token)])]


def test_sources_and_targets_of_spans_join_to_the_text(make_config) -> None:
  objective, lengths = make(make_config, SPANS)
  made = batch(objective)
  check_shapes(made, lengths)
  assert lengths.encoder == T - 19 + 6 + 1 and lengths.decoder == 19 + 6 + 1
  for source, target, window in zip(
      made.inputs.source.tokens, made.targets, WINDOWS):
    assert source[-1] == target[-1] == SEPARATOR
    sentinels = list(range(257, 263))
    assert [t for t in source if t > SEPARATOR] == sentinels
    assert [t for t in target if t > SEPARATOR] == sentinels
    assert joined(source[:-1], target[:-1]) == window[:-1].tolist()
  assert made.weights.sum() == made.targets.size == 20 * lengths.expected
  assert made.inputs.segments is made.inputs.source.segments is None


def test_infilling_predicts_the_whole_text(make_config) -> None:
  objective, lengths = make(make_config, INFILLING)
  made = batch(objective)
  check_shapes(made, lengths)
  assert lengths.encoder == lengths.decoder == T
  np.testing.assert_array_equal(made.targets, WINDOWS[:, :-1])
  np.testing.assert_array_equal(made.weights, 1)
  np.testing.assert_array_equal(made.inputs.segments, 1)
  source, real = made.inputs.source.tokens, made.inputs.source.segments == 1
  assert (np.diff(real.astype(int)) <= 0).all()  # padding is at the end
  assert (source[~real] == PAD).all() and 50 < real.sum() / 20 < 120
  kept = (real & (source != MASK)).sum(1)
  np.testing.assert_array_equal(kept, T - round(.3 * T))


def sentences(tokens: np.ndarray) -> list[list[str]]:
  """Sorted sentences of each document."""
  documents = "".join(
      "|" if t == SEPARATOR else chr(t) for t in tokens).split("|")
  for stop in (". ", "! ", "? "):
    documents = [d.replace(stop, stop[0] + "\n ") for d in documents]
  return [d.split("\n") for d in documents]


def test_sentences_are_permuted_in_the_source_only(make_config) -> None:
  objective, lengths = make(make_config, NONE)
  made = batch(objective)
  check_shapes(made, lengths)
  np.testing.assert_array_equal(made.targets, WINDOWS[:, :-1])
  source = made.inputs.source.tokens
  assert (source[:, 60] == SEPARATOR).all()  # documents stay where they are
  np.testing.assert_array_equal(np.sort(source), np.sort(WINDOWS[:, :-1]))
  moved = 0
  for row, window in zip(source, WINDOWS[:, :-1]):
    moved += not np.array_equal(row, window)
    text = bytes(row[:60].tolist()).decode()
    assert all(sentence in text for sentence in sentences(window)[0])
  assert moved > 15


def test_permutation_comes_before_corruption(make_config) -> None:
  """Of spans, source and target join to the permuted text; infilling still
  has the text in its own order to predict (Lewis et al. 2020, §2.2)."""
  permute = {"objective.permute_sentences": True}
  made = batch(make(make_config, SPANS | permute)[0])
  found = [joined(s[:-1], t[:-1]) for s, t in zip(
      made.inputs.source.tokens, made.targets)]
  assert found != WINDOWS[:, :-1].tolist()
  np.testing.assert_array_equal(np.sort(found), np.sort(WINDOWS[:, :-1]))
  made = batch(make(make_config, INFILLING | permute)[0])
  np.testing.assert_array_equal(made.targets, WINDOWS[:, :-1])


@pytest.mark.parametrize("changes", [SPANS, INFILLING, NONE])
def test_a_function_of_the_step(make_config, changes: dict) -> None:
  objective, _ = make(make_config, changes)
  first, again, later = (
      batch(objective, step=step).inputs.source.tokens for step in (5, 5, 6))
  np.testing.assert_array_equal(first, again)
  assert (first != later).any(1).sum() > 10


def test_pairs(make_config) -> None:
  objective, lengths = make(make_config, {
      "model.family": "t5", "objective.corruption": "pairs",
      "data.corpus": "files", "data.files": ("unread.jsonl",),
      "data.target_field": "target", "model.context_length": 3,
      "objective.source_length": 4})
  pairs = batches.Pairs(
      np.array([[5, 6, SEPARATOR, -1], [5, 6, 7, 8]], np.int32),
      np.array([[9, SEPARATOR, -1], [1, 2, 3]], np.int32))
  made = batch(objective, pairs)
  check_shapes(made, lengths)
  source = made.inputs.source
  np.testing.assert_array_equal(
      source.tokens, [[5, 6, SEPARATOR, PAD], [5, 6, 7, 8]])
  np.testing.assert_array_equal(source.segments, [[1, 1, 1, 0], [1] * 4])
  np.testing.assert_array_equal(
      made.inputs.tokens, [[START, 9, SEPARATOR], [START, 1, 2]])
  np.testing.assert_array_equal(made.inputs.segments, [[1, 1, 0], [1] * 3])
  np.testing.assert_array_equal(
      made.targets, [[9, SEPARATOR, PAD], [1, 2, 3]])
  np.testing.assert_array_equal(made.weights, [[1, 1, 0], [1] * 3])


def test_sentences_of_a_source_are_permuted_before_its_end(
    make_config) -> None:
  objective, _ = make(make_config, {
      "model.family": "t5", "objective.corruption": "pairs",
      "data.corpus": "files", "data.files": ("unread.jsonl",),
      "data.target_field": "target", "objective.permute_sentences": True})
  text = list(b"One. Two. Three.")
  row = text + [SEPARATOR] + [-1] * (T - len(text) - 1)
  source = np.array([row] * 30, np.int32)
  made = batch(objective, batches.Pairs(source, source)).inputs.source
  np.testing.assert_array_equal(made.tokens[:, 16], SEPARATOR)
  np.testing.assert_array_equal(made.segments.sum(1), 17)
  assert len({bytes(r[:16].astype(np.uint8)) for r in made.tokens}) == 6


def test_permutation_needs_a_tokenizer_that_tells_sentences(
    make_config) -> None:
  config = make_config(NONE)
  vocabulary = dataclasses.replace(
      vocabulary_lib.of(config, TOKENIZER), sentence_ends=None)
  with pytest.raises(config_lib.ConfigError, match="where a sentence ends"
                     ) as info:
    objectives.create(config, vocabulary)
  assert info.value.key == "objective.permute_sentences"
