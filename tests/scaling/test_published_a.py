# SPDX-License-Identifier: Apache-2.0
"""Published fits come out of this library: Epoch, Gemstones, datablations.

Where the studies' tables are absent, small made-up ones test the same code.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest

from tfjax.scaling import laws
from tfjax.scaling import published
from tfjax.scaling.published import datablations
from tfjax.scaling.published import epoch
from tfjax.scaling.published import gemstones

def assert_all_ok(rows: list[published.Row]) -> None:
  assert rows
  missed = [f"{r.quantity}: published {r.published}, ours {r.ours} ({r.note})"
            for r in rows if not r.ok]
  assert not missed, "\n".join(missed)


# --- Rows and studies --------------------------------------------------------


@pytest.mark.parametrize("target, ours, tolerance, relative, at_most, ok", [
    (200.0, 201.9, 0.01, True, False, True),
    (200.0, 202.1, 0.01, True, False, False),
    (-200.0, -198.1, 0.01, True, False, True),
    (200.0, 200.02, 0.01, False, False, False),
    (200.0, 199.995, 0.01, False, False, True),
    (200.0, 150.0, 0.01, False, True, True),
    (200.0, 200.02, 0.01, False, True, False),
    (np.float64(200.0), np.float64(210.0), 0.01, True, False, False),
    (200.0, math.nan, 0.01, True, False, False),
    (200.0, math.nan, 0.01, True, True, False),
    (None, 3.0, 0.01, True, False, None),
])
def test_a_row_is_ok_within_its_tolerance(
    target, ours, tolerance, relative, at_most, ok):
  row = published.Row("s", "q", target, ours, tolerance, relative, "", at_most)
  assert row.ok is ok


def test_a_study_without_its_tables_says_so(tmp_path):
  rows = published.run(tmp_path)
  assert [row.study for row in rows] == list(published.STUDIES)
  for row in rows:
    assert row.ok is None
    assert math.isnan(row.ours)
    assert str(tmp_path / row.study) in row.note


def test_an_unknown_study_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no study 'epoch'; known: epoch_chin"):
    published.run(tmp_path, ["epoch"])


def test_the_objective_is_a_sum_of_hubers_of_log_residuals():
  law = laws.get("kaplan_params")
  frame = pd.DataFrame({"params": [4.0, 4.0], "loss": [
      3 * math.exp(0.001), 3 * math.exp(-0.5)]})
  # A / N^alpha is 6 / 2 = 3; residuals 0.001 within delta and -0.5 beyond.
  expected = 0.001**2 / 2 + 0.01 * (0.5 - 0.01 / 2)
  assert published.huber_of(law, np.array([6.0, 0.5]), frame,
                            0.01) == pytest.approx(expected, rel=1e-12)


# --- Epoch -------------------------------------------------------------------


def test_epoch_takes_tokens_from_flops_and_drops_the_five_largest(tmp_path):
  losses = [2.0, 9.0, 3.0, 8.0, 4.0, 7.0, 6.0, 5.0]
  pd.DataFrame({"Model Size": 1e6, "Training FLOP": 1.2e14, "loss": losses,
                "x": 0.0}).to_csv(tmp_path / "svg_extracted_data.csv")
  frame = epoch.load(tmp_path)
  assert frame["loss"].tolist() == losses
  assert frame["tokens"].tolist() == [2e7] * 8
  assert epoch.kept(frame)["loss"].tolist() == [2.0, 3.0, 4.0]


def test_epoch_resamples_are_numpy_s_global_stream():
  state = np.random.get_state()
  try:
    np.random.seed(42)
    indices = np.arange(240)
    expected = [np.random.choice(indices, 240) for _ in range(3)]
  finally:
    np.random.set_state(state)
  np.testing.assert_array_equal(epoch.resamples(240, 3), expected)


def test_the_grid_of_starts_is_hoffmann_s(tables):
  path = tables("published_constants") / "hoffmann2022.json"
  recipe = json.loads(path.read_text())["recipe_D2"]
  assert math.prod(map(len, epoch.GRID.values())) == recipe["n_inits"]
  for name, key in {"E": "e", "A": "a", "B": "b"}.items():
    np.testing.assert_allclose(np.log(epoch.GRID[name]), recipe["grid"][key],
                               atol=1e-12)
  for name in ("alpha", "beta"):
    assert list(epoch.GRID[name]) == recipe["grid"][name]


@pytest.mark.slow
def test_epoch_reproduces(tables):
  rows = epoch.reproduce(tables("epoch_chinchilla"))
  assert len(rows) == 6 + 10 + 8 + 6 + 6
  assert_all_ok(rows)


# --- Gemstones ---------------------------------------------------------------


def test_gemstones_flops_by_hand():
  # Width 256, depth 2. Forward, a token and layer: 6 x 65536 projections,
  # 3.5 x 384 rotary, 2048 x (256 + 3 x 2 + 512) attention, 24 x 65536 + 10240
  # GEGLU, 512 + 3584 the rest.
  linear = 393216 + 1344 + 1572864 + 10240 + 4096
  attention = 2048 * 774
  once = 7 * 256 + 2 * 256 * 50304
  expected = 2 * (3 * linear + 3.5 * attention) + 3 * once
  assert gemstones.flops_per_token(256, 2) == expected


def write_checkpoints(directory, frame):
  (directory / "wandb_dfs").mkdir()
  frame.to_json(directory / "wandb_dfs" / "wandb_df_for_fitting_few.jsonl",
                orient="records", lines=True)


def checkpoints():
  """On the hull params = flops^0.4; a row above it and a step 0 below."""
  flops = np.geomspace(1e15, 1e17, 6)
  tokens = flops / gemstones.flops_per_token(256, 2)
  params, loss = flops**0.4, 1 + 1e3 * flops**-0.2
  frame = pd.DataFrame({
      "params_active_precise": params, "tokens": tokens, "final_loss": loss,
      "width": 256, "depth": 2, "step": 10})
  above = frame.iloc[[2]].assign(final_loss=loss[2] + 0.1, tokens=tokens[2] * 2,
                                 params_active_precise=1.0)
  before = frame.iloc[[0]].assign(step=0, final_loss=0.5)
  return pd.concat([frame, above, before], ignore_index=True)


def test_gemstones_approach_1_follows_the_lower_hull(tmp_path):
  write_checkpoints(tmp_path, checkpoints())
  found = gemstones.approach_1(gemstones.load(tmp_path, "few"))
  assert found["params"] == pytest.approx(0.4, abs=1e-9)
  assert found["tokens"] == pytest.approx(1.0, abs=1e-9)


def test_gemstones_without_embeddings_is_smaller_by_the_input_s(tmp_path):
  write_checkpoints(tmp_path, checkpoints())
  whole = gemstones.load(tmp_path, "few")
  bare = gemstones.load(tmp_path, "few", embeddings=False)
  np.testing.assert_allclose(whole["params"] - bare["params"], 50304 * 256)


def test_gemstones_optima_are_read_in_the_law_s_order(tmp_path):
  (tmp_path / "parameters_delta-4").mkdir()
  (tmp_path / "parameters_delta-4" / (
      "approach_3_width_depth_grid_search_0_few_no_embeds.json")).write_text(
          json.dumps({"loss": {"0": 0.25}, "success": {"0": True},
                      "exponents": {"0": [0.1, 0.2, 0.3]},
                      "coefficients": {"0": [1.0, 2.0, 3.0]},
                      "irreducible_error": {"0": 0.5}}))
  optimum, = gemstones.optima(tmp_path)
  assert (optimum.subset, optimum.embeddings, optimum.delta) == (
      "few", False, 1e-4)
  assert dict(zip(optimum.law.parameters, optimum.natural)) == pytest.approx({
      "E": math.exp(0.5), "A_w": math.exp(1), "A_d": math.exp(2),
      "B": math.exp(3), "a_w": 0.1, "a_d": 0.2, "beta": 0.3})


def test_gemstones_published_optima_and_approach_1(tables):
  directory = tables("gemstones")
  known = list(gemstones.optima(directory))
  assert len(known) == 42
  assert_all_ok(gemstones._evaluated(directory, known))
  rows = gemstones._approach_1(directory)
  assert len(rows) == 10
  assert_all_ok(rows)


@pytest.mark.slow
def test_gemstones_refits(tables):
  directory = tables("gemstones")
  # Two of the smaller tables: scripts/fit.py --reproduce fits all.
  chosen = [o for o in gemstones.optima(directory) if o.name in (
      "chinchilla, slim_chinchilla", "chinchilla, hot")]
  rows = gemstones._refitted(directory, chosen)
  assert len(rows) == 2 * 3 + 2
  assert_all_ok(rows)


# --- datablations ------------------------------------------------------------


def test_datablations_published_point(tables):
  rows = datablations._at_published(
      datablations.load(tables("datablations")))
  assert len(rows) == 3
  assert_all_ok(rows)


@pytest.mark.slow
def test_datablations_lowest_optimum_and_the_published_one(tables):
  rows = datablations._fitted(datablations.load(tables("datablations")))
  assert len(rows) == 1 + 2 + 3 + 1
  assert_all_ok(rows)


def test_datablations_finds_what_a_made_up_table_was_made_with(tmp_path):
  truth = {"R_D": 12.0, "R_N": 4.0}
  params, tokens, unique = map(np.ravel, np.meshgrid(
      [1e8, 1e9, 8e9], [1e9, 1e10, 1e11], [1e8, 1e9]))
  keep = tokens >= unique
  axes = {"params": params[keep], "tokens": tokens[keep],
          "unique_tokens": unique[keep]}
  frame = pd.DataFrame(axes)
  frame["val_loss"] = laws.get("data_constrained").predict(
      datablations.natural(truth), axes)
  frame.to_csv(tmp_path / "runs_fit_182.csv")
  rows = {row.quantity: row for row in datablations.reproduce(tmp_path)}
  assert rows["lowest optimum, R_D"].ours == pytest.approx(12.0, rel=1e-5)
  assert rows["lowest optimum, R_N"].ours == pytest.approx(4.0, rel=1e-5)
  assert rows["lowest optimum, objective"].ours < 1e-12
  # Not the study's numbers: the rows must say so.
  assert not rows["objective at the published point"].ok
  assert not rows["reported as multiple optima (1: yes)"].ok
