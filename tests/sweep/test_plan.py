# SPDX-License-Identifier: Apache-2.0
"""The specs that are made of cells, of one sweep and of several."""

import pathlib
import time
from typing import Any

import ml_collections
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.train import records


def test_specs_carry_config_and_budget_in_order(
    base: ml_collections.ConfigDict) -> None:
  before = base.to_json()
  cells = sweep.product(sweep.axis("model.size", ["6k", "3k"]),
                        sweep.axis("duration.steps", [20, 10]))
  specs = sweep.plan(base, cells)
  assert [spec.overrides for spec in specs] == cells
  assert [spec.config.model.num_layers for spec in specs] == [2, 2, 1, 1]
  # steps x 4 sequences x 32 tokens
  assert [spec.budget.tokens for spec in specs] == [2560, 1280, 2560, 1280]
  assert len({spec.run_id for spec in specs}) == 4
  assert base.to_json() == before
  assert [spec.run_id for spec in sweep.plan(base, cells)] == [
      spec.run_id for spec in specs]


def test_all_bad_cells_are_named_and_no_store_is_built(
    base: ml_collections.ConfigDict) -> None:
  cells = [{"seed": 1}, {"model.sise": "3k"}, {"train.batch_size": "4"},
           {"model.num_heads": 3}]
  with pytest.raises(sweep.PlanError) as caught:
    sweep.plan(base, cells)
  problems = caught.value.problems
  assert [problem.partition(" (")[0] for problem in problems] == [
      "cell 2", "cell 3", "cell 4"]
  assert "model.sise" in problems[0] and "did you mean 'size'" in problems[0]
  assert "train.batch_size=4" in problems[1] and "must be int" in problems[1]
  assert "config.model.num_heads" in problems[2]
  assert all(problem in str(caught.value) for problem in problems)
  assert not pathlib.Path(base.data.cache_dir).exists()


@pytest.mark.parametrize("cell, said", [
    ({"cost.region": "mars"}, "config.cost.region: 'mars'"),
    ({"cost.pue": 11.0}, "config.cost.pue"),
    ({"cost.hardware": "h1000"}, "did you mean h100"),
    ({"cost.hardware_file": "absent.toml"}, "absent.toml cannot be read")])
def test_what_a_machine_costs_is_checked_before_any_run(
    base: ml_collections.ConfigDict, cell: dict[str, Any],
    said: str) -> None:
  with pytest.raises(sweep.PlanError, match="cell 1") as caught:
    sweep.plan(base, [cell])
  assert said in str(caught.value)


def test_more_tokens_than_the_data_names_the_cell(
    base: ml_collections.ConfigDict) -> None:
  with pytest.raises(sweep.PlanError) as caught:
    sweep.plan(base, sweep.axis("duration.steps", [10, 1000]))
  problem, = caught.value.problems
  assert "cell 2 (duration.steps=1000)" in problem
  assert "data.max_epochs" in problem


def test_the_same_cell_twice_is_one_run(
    base: ml_collections.ConfigDict) -> None:
  by_shape = {"model.size": None, "model.d_model": 16, "model.num_layers": 1,
              "model.num_heads": 1}
  specs = sweep.plan(base, [{"seed": 1}, {}, {"seed": 1}, by_shape])
  assert [spec.overrides for spec in specs] == [{"seed": 1}, {}]


def test_cells_that_differ_in_no_result_are_refused(
    base: ml_collections.ConfigDict) -> None:
  with pytest.raises(sweep.PlanError, match="only in train.log_every_steps"):
    sweep.plan(base, sweep.axis("train.log_every_steps", [5, 10]))


def test_an_empty_sweep_is_refused(base: ml_collections.ConfigDict) -> None:
  with pytest.raises(sweep.PlanError, match="empty"):
    sweep.plan(base, [])


def test_of_a_frozen_config_derived_values_follow(
    base: ml_collections.ConfigDict) -> None:
  cells = sweep.axis("model.size", ["3k", "14k"])
  frozen = sweep.plan(config_lib.resolve(base), cells)
  assert frozen == sweep.plan(base, cells)
  assert [spec.config.model.d_ff for spec in frozen] == [64, 96]

  config_lib.override(base, {"model.d_ff": 40})
  chosen = sweep.plan(config_lib.resolve(base), cells)
  assert [spec.config.model.d_ff for spec in chosen] == [40, 40]


@pytest.mark.parametrize("changes", [
    {"model.family": "bert", "model.architecture": "decoder",
     "objective.prefix_lm": True},
    {"model.family": "t5", "model.architecture": "encoder",
     "objective.whole_words": True},
    {"model.family": "llama", "model.size": None, "model.d_model": 15,
     "model.num_layers": 1, "model.num_heads": 3,
     "model.positions": "learned"},
    {"model.size": None, "model.d_model": 20, "model.num_layers": 1,
     "model.num_heads": 3, "model.head_dim": 8}])
def test_a_frozen_config_stays_what_it_is(
    base: ml_collections.ConfigDict, changes: dict[str, Any]) -> None:
  config_lib.override(base, changes)
  spec, = sweep.plan(config_lib.resolve(base), [{"seed": 1}])
  config_lib.override(base, {"seed": 1})
  assert spec.config == config_lib.resolve(base)


# --- Several sweeps ----------------------------------------------------------


def test_the_same_cell_in_two_sweeps_is_one_run(
    base: ml_collections.ConfigDict) -> None:
  planned = sweep.plan_all(base, {
      "seeds": sweep.axis("seed", [0, 1]),
      "rates": sweep.axis("optimizer.learning_rate", [1e-3, 2e-3])})
  assert list(planned) == ["seeds", "rates"]
  assert [len(specs) for specs in planned.values()] == [2, 2]
  assert planned["rates"][0] is planned["seeds"][0]  # 1e-3 is the default
  assert len({spec.run_id for specs in planned.values()
              for spec in specs}) == 3


def test_sweeps_whose_common_run_differs_in_no_result_are_refused(
    base: ml_collections.ConfigDict) -> None:
  with pytest.raises(sweep.PlanError) as caught:
    sweep.plan_all(base, {"a": [{}], "b": [{"train.log_every_steps": 3}],
                          "c": [{"seed": 2}]})
  (problem,) = caught.value.problems
  assert problem.startswith("b: cell 1 (train.log_every_steps=3): differs from "
                            "a: cell 1 (no overrides) only in")


def test_an_empty_sweep_among_others_is_named(
    base: ml_collections.ConfigDict) -> None:
  with pytest.raises(sweep.PlanError, match="the sweep b is empty"):
    sweep.plan_all(base, {"a": [{}], "b": []})


def test_runs_of_one_trunk_have_the_shortest_ones_warmup(
    base: ml_collections.ConfigDict) -> None:
  config_lib.override(base, {
      "optimizer.schedule": "wsd", "sweep.share_trunk": True,
      "optimizer.warmup_fraction": 0.2})
  specs = sweep.plan(base, [
      *sweep.axis("duration.steps", [20, 10, 40]),
      # What the second comes to: one run.
      {"duration.steps": 10, "optimizer.warmup_steps": 2}])
  assert [spec.config.optimizer.warmup_steps for spec in specs] == [2, 2, 2]
  assert [spec.run_id for spec in specs] == [
      records.run_id(spec.config) for spec in specs]
  base.optimizer.schedule = "cosine"
  with pytest.raises(config_lib.ConfigError, match="optimizer.schedule"):
    sweep.plan(base, sweep.axis("duration.steps", [20, 10]))


def test_numbers_of_numpy_are_the_configs(
    base: ml_collections.ConfigDict) -> None:
  (spec,) = sweep.plan(base, [{"seed": np.int64(4)}])
  assert spec.config.seed == 4 and type(spec.overrides["seed"]) is int


def test_two_hundred_cells_are_planned_within_seconds(
    base: ml_collections.ConfigDict) -> None:
  cells = sweep.product(
      sweep.axis("model.size", ["3k", "6k"]), sweep.axis("seed", range(100)))
  sweep.plan(base, cells[::100])  # builds the store
  begun = time.process_time()
  assert len(sweep.plan(base, cells)) == 200
  assert time.process_time() - begun < 4  # 0.5 s where this was written
