# SPDX-License-Identifier: Apache-2.0
"""Steps, tokens, epochs and FLOPs, each from any one of them."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import batches as batches_lib

# By hand for this model: D 16, F 64, 1 layer, T 16, V 257, biases.
#   block 4 D^2 + 4 D + 2 D F + F + D + 4 D = 3280; last norm 32;
#   embeddings 257 * 16 + 16 * 16 = 4368; together 7680.
#   FLOPs a token: 6 (4 D^2 + 2 D F) + 12 T D + 6 D V
#   = 18,432 + 3,072 + 24,672 = 46,176.
PARAMS, FLOPS = 7680, 46_176
BATCH = 8 * 16
TRAIN_TOKENS = 12_805  # 800 windows of 16 and 5 tokens that none holds


def make(changes: dict[str, Any]) -> config_lib.ExperimentConfig:
  config = config_lib.default()
  config_lib.override(config, {
      "model.size": "3k", "model.context_length": 16, "model.vocab_size": 257,
      "train.batch_size": 8} | changes)
  return config_lib.resolve(config)


def plan(changes: dict[str, Any], tokens: int = TRAIN_TOKENS
         ) -> budget_lib.Budget:
  return budget_lib.plan(make(changes), batches_lib.TextWindows(
      np.zeros(tokens, np.uint16), 16))


@pytest.mark.parametrize("duration", [
    {"steps": 60}, {"tokens": 7680}, {"tokens": 7553}, {"epochs": 0.6},
    {"tokens_per_parameter": 1.0}, {"flops": 7680.0 * FLOPS}],
    ids=lambda d: "-".join(map(str, *d.items())))
def test_each_duration_gives_the_others(duration: dict[str, Any]) -> None:
  (key, value), = duration.items()
  assert plan({f"duration.{key}": value}) == budget_lib.Budget(
      params_total=PARAMS, params_embedding=4368, params_non_embedding=3312,
      params_head=0, steps=60, batch_tokens=BATCH, tokens=7680,
      predicted_tokens=7680,
      unique_tokens=7680, epochs=0.6, tokens_per_parameter=1.0,
      flops=plan({"duration.steps": 60}).flops)
  got = plan({f"duration.{key}": value})
  assert got.flops_total == 7680 * FLOPS == 354_631_680
  assert got.flops_per_token == FLOPS


def test_what_was_derived_derives_the_same_steps() -> None:
  """No step is gained where a quotient and a product round apart."""
  choose = random.Random(0)
  for _ in range(40):
    steps = choose.randrange(1, 10**choose.randrange(1, 7))
    size = choose.choice(("3k", "25k", "1.8M", "85M"))
    base = {"model.size": size, "data.max_epochs": 1e9}
    first = plan(base | {"duration.steps": steps})
    for key, value in (("tokens", first.tokens), ("epochs", first.epochs),
                       ("tokens_per_parameter", first.tokens_per_parameter),
                       ("flops", first.flops_total)):
      again = plan(base | {f"duration.{key}": value})
      assert again.steps == steps, (size, key, value)


def test_a_duration_is_rounded_up_to_whole_steps() -> None:
  assert plan({"duration.tokens": 1}).steps == 1
  assert plan({"duration.tokens": BATCH}).steps == 1
  assert plan({"duration.tokens": BATCH + 1}).steps == 2


def test_a_whole_epoch_is_one() -> None:
  whole = plan({"duration.epochs": 1.0})
  assert (whole.steps, whole.tokens, whole.epochs) == (100, 12_800, 1.0)
  assert whole.unique_tokens == 12_800
  # 801 windows need 101 steps; the last one's overhang is no repetition.
  over = plan({"duration.epochs": 1.0}, TRAIN_TOKENS + 16)
  assert over.steps == 101 and over.tokens == 12_928
  assert over.unique_tokens == 12_816


@pytest.mark.parametrize("duration", [
    {"steps": 101}, {"tokens": 12_801}, {"epochs": 1.01},
    {"tokens_per_parameter": 2.0}, {"flops": 12_900.0 * FLOPS}],
    ids=lambda d: str(next(iter(d))))
def test_more_than_the_corpus_needs_an_allowance(
    duration: dict[str, Any]) -> None:
  (key, value), = duration.items()
  with pytest.raises(config_lib.ConfigError) as error:
    plan({f"duration.{key}": value})
  assert error.value.key == f"duration.{key}"
  assert "at most 12,800 tokens" in str(error.value)
  assert "data.max_epochs=2" in str(error.value)
  allowed = plan({f"duration.{key}": value, "data.max_epochs": 2.0})
  assert allowed.tokens >= 12_801
  assert allowed.unique_tokens == 12_800
  assert allowed.epochs == allowed.tokens / 12_800


def test_a_subset_is_what_epochs_count() -> None:
  half = {"data.unique_tokens": 6400}
  got = plan(half | {"duration.epochs": 1.0})
  assert (got.steps, got.unique_tokens) == (50, 6400)
  with pytest.raises(config_lib.ConfigError, match="6,400 that there are"):
    plan(half | {"duration.steps": 51})
  twice = plan(half | {"duration.steps": 100, "data.max_epochs": 2.0})
  assert (twice.epochs, twice.unique_tokens) == (2.0, 6400)


def test_a_subset_larger_than_the_corpus_is_refused() -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    plan({"data.unique_tokens": 13_000, "duration.steps": 1})
  assert error.value.key == "data.unique_tokens"
  assert "13,000 is more than the 12,800" in str(error.value)


def test_pairs_count_the_tokens_that_they_have() -> None:
  # Separator, source, separator, target: 3 pairs, with ends 3 + 2, 2 + 5 and
  # 9 + 3 tokens, of which the sides take at most 6 and 4: 5 + 6 + 9 = 20.
  sides = [(2, 1), (1, 4), (8, 2)]
  stream = np.concatenate([[0] + [7] * size for pair in sides for size in pair])
  windows = batches_lib.PairWindows(stream, 0, 6, 4)
  config = make({
      "model.family": "t5", "objective.corruption": "pairs",
      "objective.source_length": 6, "model.context_length": 4,
      "data.target_field": "target", "data.corpus": "files",
      "data.files": ("a.jsonl",), "train.batch_size": 3,
      "duration.steps": 4, "data.max_epochs": 4.0})
  got = budget_lib.plan(config, windows)
  assert (got.steps, got.batch_tokens, got.tokens) == (4, 20, 80)
  assert (got.unique_tokens, got.epochs) == (20, 4.0)
  assert got.predicted_tokens is None
  # What is computed is padded.
  computed = flops_lib.training_flops_per_token(
      config.model, lengths_lib.of(config)).total * (6 + 4)
  assert got.flops_total == pytest.approx(4 * 3 * computed, rel=1e-12)


def test_the_vocabulary_comes_from_the_tokenizer() -> None:
  config = make({"model.vocab_size": None, "duration.steps": 1})
  assert config.model.vocab_size is None
  assert budget_lib.with_vocabulary(config, 300).model.vocab_size == 300
  wide = make({"model.vocab_size": 512, "duration.steps": 1})
  assert budget_lib.with_vocabulary(wide, 300).model.vocab_size == 512
  with pytest.raises(config_lib.ConfigError, match="model.vocab_size: 512 is "
                     "less than the 513 ids.*at least 513"):
    budget_lib.with_vocabulary(wide, 513)


def test_without_the_data_what_depends_on_them_is_unknown() -> None:
  known = plan({"duration.steps": 60})
  got = budget_lib.plan(make({"duration.steps": 60}), None)
  assert (got.unique_tokens, got.epochs) == (None, None)
  assert got == dataclasses.replace(known, unique_tokens=None, epochs=None)
  # More than there is of data is nothing that can be seen.
  assert budget_lib.plan(make({"duration.tokens": 10**9}), None).steps == (
      -(-10**9 // BATCH))


@pytest.mark.parametrize("changes, key", [
    ({"duration.epochs": 0.5}, "duration.epochs"),
    ({"model.family": "t5", "objective.corruption": "pairs",
      "data.target_field": "target", "data.corpus": "files",
      "data.files": ("a.jsonl",), "duration.steps": 1}, "data.target_field")],
    ids=["epochs", "pairs"])
def test_some_budgets_take_the_data(changes: dict[str, Any], key: str) -> None:
  with pytest.raises(config_lib.ConfigError, match="not looked at") as error:
    budget_lib.plan(make(changes), None)
  assert error.value.key == key
