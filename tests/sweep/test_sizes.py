# SPDX-License-Identifier: Apache-2.0
"""Sizes are those of real configs, and wished-for runs become cells of them."""

import ml_collections
import pytest

from tfjax import sweep

RATES = {"3k": 0.02, "6k": 0.01, "14k": 0.005}
CELLS = [{"model.size": size, "optimizer.learning_rate": rate,
          "duration.tokens": tokens, "seed": seed}
         for size, rate in reversed(RATES.items())
         for tokens in (2_000, 4_000) for seed in (0, 1)]


def test_sizes_are_the_distinct_models_of_a_sweep(
    base: ml_collections.ConfigDict) -> None:
  found = sweep.sizes(base, CELLS)
  assert [one.overrides for one in found] == [
      {"model.size": size, "optimizer.learning_rate": rate}
      for size, rate in RATES.items()]
  # A block of width 16 has 4 x 16^2 in attention and 8 x 16^2 in the
  # feed-forward, 9 x 16 in biases and 4 x 16 in norms; one norm is last.
  block, last = 12 * 16**2 + 13 * 16, 2 * 16
  vocabulary, positions = 257 * 16, 32 * 16
  assert found[0].params == {
      "params_non_embedding": block + last,
      "params_total": block + last + vocabulary + positions}
  assert found[1].params["params_non_embedding"] == 2 * block + last


def test_runs_become_cells_of_the_nearest_size(
    base: ml_collections.ConfigDict) -> None:
  known = sweep.sizes(base, CELLS)
  small, middle = (one.params["params_total"] for one in known[:2])
  between = (small * middle) ** 0.5
  placed = sweep.place(base, [
      {"params": 0.99 * between, "tokens": 1500.2, "seeds": 2},
      {"params": 1.01 * between, "tokens": 3000},
      {"params": small, "tokens": 1501, "seeds": 1}], known, first_seed=5)
  assert [one.overrides for one in placed] == [
      {"model.size": size, "optimizer.learning_rate": RATES[size],
       "duration.steps": None, "duration.tokens": tokens, "seed": seed}
      for size, tokens, seed in (("3k", 1501, 5), ("3k", 1501, 6),
                                 ("6k", 3000, 5), ("3k", 1501, 7))]
  assert [one.params for one in placed] == [small, small, middle, small]
  assert placed[2].wanted == 1.01 * between
  specs = sweep.plan(base, [one.overrides for one in placed])
  assert len(specs) == 4
  for spec, one in zip(specs, placed):
    assert spec.budget.params_total == one.params
    # Up to a whole step of 4 x 32 tokens.
    assert 0 <= spec.budget.tokens - one.tokens < 128
    assert spec.budget.flops_per_token * one.tokens == pytest.approx(one.flops)


def test_parameters_are_counted_as_asked(
    base: ml_collections.ConfigDict) -> None:
  known = sweep.sizes(base, CELLS)
  run = [{"params": known[1].params["params_non_embedding"], "tokens": 1000}]
  placed, = sweep.place(base, run, known, count="params_non_embedding")
  assert placed.overrides["model.size"] == "6k"
  assert placed.params == run[0]["params"]
  # In a total of that many, the smallest is nearest.
  assert sweep.place(base, run, known)[0].overrides["model.size"] == "3k"
  with pytest.raises(ValueError, match="count is 'N'; must be one of params_t"):
    sweep.place(base, run, known, count="N")


def test_a_size_that_is_trained_in_two_ways_is_refused(
    base: ml_collections.ConfigDict) -> None:
  other = {**CELLS[0], "optimizer.learning_rate": 0.1}
  with pytest.raises(sweep.PlanError, match="cell 2: .* with another "
                     "optimizer.learning_rate before"):
    sweep.sizes(base, [CELLS[0], other])
  with pytest.raises(sweep.PlanError, match="no cells"):
    sweep.sizes(base, [])
  with pytest.raises(sweep.PlanError, match="cell 1: config.model.sizs"):
    sweep.sizes(base, [{"model.sizs": "3k"}])
