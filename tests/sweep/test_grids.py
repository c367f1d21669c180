# SPDX-License-Identifier: Apache-2.0
"""Computed sweeps, by numbers worked out by hand."""

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep

# Of "3k" (d_model 16, 1 layer) with windows of 32 and 257 bytes, forward FLOPs
# a token: projections 2 x 4 x 16^2, feed-forward 2 x 8 x 16^2, scores and
# values 2 x 32 x 16 each, head 2 x 16 x 257; training takes three times that.
PER_TOKEN_3K = 3 * (2048 + 4096 + 1024 + 1024 + 8224)
# "14k": d_model 24, 2 layers.
PER_TOKEN_14K = 3 * (2 * (2 * 12 * 24**2 + 2 * 2 * 32 * 24) + 2 * 24 * 257)
STEP = 4 * 32  # tokens


def test_isoflop_cells_cost_their_budget_to_a_step(
    base: ml_collections.ConfigDict) -> None:
  budgets = [1e8, 4e8]
  cells = sweep.grids.isoflop(
      base, budgets, ["3k", "14k"], tokens_per_parameter=(0.01, 10),
      least_steps=1)
  assert cells == [
      {"model.size": size, "duration.steps": None, "duration.flops": budget}
      for budget in budgets for size in ("3k", "14k")]
  base.data.max_epochs = 100.0
  specs = sweep.plan(base, cells)
  for spec, (budget, per_token) in zip(specs, [
      (budget, per_token) for budget in budgets
      for per_token in (PER_TOKEN_3K, PER_TOKEN_14K)]):
    steps = -(-budget // (per_token * STEP))
    assert spec.budget.steps == steps
    assert spec.budget.flops_total == steps * STEP * per_token
    assert 0 <= spec.budget.flops_total - budget < STEP * per_token
  # 1e8 / (49,248 x 128) = 15.9 steps
  assert specs[0].budget.steps == 16
  assert specs[0].budget.flops_total == 100_859_904


def test_isoflop_leaves_out_what_is_beyond_its_bounds(
    base: ml_collections.ConfigDict) -> None:
  def sizes(**bounds: float) -> list[str]:
    return [cell["model.size"] for cell in sweep.grids.isoflop(
        base, [1e9], **({"least_steps": 1} | bounds))]
  # D / N of 3k is 1e9 / 49,248 / 7,936 = 2.56, of 6k 1.21, of 14k
  # 0.34, of 25k 0.13.
  assert sizes(tokens_per_parameter=(0.3, 10)) == ["3k", "6k", "14k"]
  assert sizes(tokens_per_parameter=(0.3, 2.5)) == ["6k", "14k"]
  assert sizes(tokens_per_parameter=(2.5, 2.6)) == ["3k"]
  # 20,305 tokens are 158.6 steps.
  assert sizes(tokens_per_parameter=(2.5, 2.6), least_steps=158) == ["3k"]
  assert sizes(tokens_per_parameter=(2.5, 2.6), most_tokens=20_306) == ["3k"]
  for bounds in (dict(least_steps=159), dict(most_tokens=20_305)):
    with pytest.raises(sweep.PlanError, match="20,305 tokens") as caught:
      sizes(tokens_per_parameter=(2.5, 2.6), **bounds)
    assert "1e+09 FLOPs" in str(caught.value)


def test_models_may_be_cells_and_replace_the_configs_shape(
    base: ml_collections.ConfigDict) -> None:
  shape = {"model.size": None, "model.d_model": 16, "model.num_layers": 1,
           "model.num_heads": 1}
  cells = sweep.grids.isoflop(base, [1e8], [shape], least_steps=1,
                              tokens_per_parameter=(0.01, 10))
  assert cells == [{**shape, "duration.steps": None, "duration.flops": 1e8}]
  config_lib.override(base, shape)
  (cell,) = sweep.grids.tokens_per_parameter(base, [2], ["3k"])
  (spec,) = sweep.plan(base, [cell])
  assert spec.config.model.size == "3k"
  assert spec.budget.tokens == 2 * 7936  # and 124 whole steps


def test_tokens_per_parameter_counts_what_it_is_told(
    base: ml_collections.ConfigDict) -> None:
  assert sweep.grids.tokens_per_parameter(base, [1, 1.5], ["3k"]) == [
      {"model.size": "3k", "duration.steps": None,
       "duration.tokens_per_parameter": ratio} for ratio in (1.0, 1.5)]
  # 12 x 16^2, the biases 9 x 16, and three norms of 2 x 16.
  assert sweep.grids.tokens_per_parameter(
      base, [1.5], ["3k"], count="params_non_embedding") == [
          {"model.size": "3k", "duration.steps": None,
           "duration.tokens": round(1.5 * (3072 + 144 + 96))}]


def test_learning_rates_fall_with_the_width_unless_mup_says_how(
    base: ml_collections.ConfigDict) -> None:
  cells = sweep.axis("model.size", ["3k", "55k", "98k"])  # 16, 48, 64 wide
  def rates(exponent: float) -> list[float]:
    return [cell["optimizer.learning_rate"] for cell in
            sweep.grids.learning_rates(base, cells, 0.02, d_model=16,
                                       exponent=exponent)]
  assert rates(-1.0) == [0.02, 0.00666667, 0.005]
  assert rates(-0.5) == [0.02, 0.011547, 0.01]
  config_lib.override(base, {
      "model.parametrization": "mup", "model.base_d_model": 16,
      "model.base_head_dim": 16})
  assert rates(-1.0) == [0.02] * 3
  base.model.base_d_model = 32
  with pytest.raises(ValueError, match="base_d_model is 32"):
    rates(-1.0)
  with pytest.raises(ValueError, match="both set optimizer.learning_rate"):
    sweep.grids.learning_rates(
        base, [{"optimizer.learning_rate": 0.1, "model.base_d_model": 16}],
        0.02, d_model=16)


@pytest.mark.parametrize("arguments, said", [
    (dict(budgets=[0.0]), "budgets: 0.0"),
    (dict(budgets=[1e8], tokens_per_parameter=(3, 2)), "the least comes first"),
    (dict(budgets=[1e8], models=[]), "models must be a list"),
    (dict(budgets=[1e8], models="3k"), "models must be a list"),
    (dict(budgets=[1e8], models=["3k"], count="params"), "params_total"),
    (dict(budgets=[1e8], models=["3q"]), "config.model.size")])
def test_grids_that_cannot_be_say_why(
    base: ml_collections.ConfigDict, arguments: dict, said: str) -> None:
  with pytest.raises(ValueError, match=said):
    sweep.grids.isoflop(base, **arguments)
