# SPDX-License-Identifier: Apache-2.0
"""The three approaches on one table, and what approach 2 gets wrong."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import approaches
from tfjax.scaling import isoflop
from tfjax.scaling import power

_REFDATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "refdata"
_A, _B, _E, _ALPHA, _BETA = 406.4, 410.7, 1.69, 0.465, 0.155
_SHARE = _BETA / (_ALPHA + _BETA)


def optimal_params(flops):
  return (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA)) * (
      flops / 6) ** _SHARE


def isoflop_table(noise=0.0):
  """Fifteen sizes from N*/16 to 16 N* at five budgets."""
  rng, rows = np.random.default_rng(0), []
  for flops in 10.0 ** np.arange(17, 22):
    params = optimal_params(flops) * np.geomspace(1 / 16, 16, 15)
    tokens = flops / 6 / params
    rows.append(pd.DataFrame({
        "params": params, "tokens": tokens, "flops": flops,
        "loss": (_E + _A / params**_ALPHA + _B / tokens**_BETA)
                * np.exp(noise * rng.standard_normal(len(params)))}))
  return pd.concat(rows, ignore_index=True)


@pytest.fixture(name="fit", scope="module")
def fit_fixture() -> scaling.Fit:
  return scaling.fit(isoflop_table(), bootstrap=100)


def test_side_by_side(fit):
  made = approaches.compare(fit, [1e22, 1e24], bootstrap=50)
  table = made.table.set_index(["approach", "flops"])
  assert not made.missing and len(table) == 6
  truth = optimal_params(1e24)
  third, second = table.loc[("3", 1e24)], table.loc[("2", 1e24)]
  assert third["params"] == pytest.approx(truth, rel=1e-4)
  assert third["exponent_params"] == pytest.approx(_SHARE, rel=1e-4)
  assert third["exponent_tokens"] == pytest.approx(1 - _SHARE, rel=1e-4)
  # Czech et al. 2026: D* 23.1163% too small on this grid, N* as much too big.
  assert second["tokens"] == pytest.approx(
      (1 - 0.23116308) * 1e24 / 6 / truth, rel=1e-4)
  assert second["params"] == pytest.approx(truth / (1 - 0.23116308), rel=1e-4)
  # The surface at the wrong N* is worse, and by the difference of N* alone.
  assert second["loss"] > third["loss"]
  assert second["loss"] == pytest.approx(
      _E + _A / second["params"]**_ALPHA
      + _B / (1e24 / 6 / second["params"])**_BETA, rel=1e-6)


def test_the_bias_is_printed_beside(fit):
  made = approaches.compare(fit, [1e24], bootstrap=0)
  assert made.bias.table["tokens_error"][0] == pytest.approx(
      -0.23116308, abs=1e-4)
  assert made.bias.table["params_error"][0] == pytest.approx(
      1 / (1 - 0.23116308) - 1, abs=1e-4)
  assert made.bias.exponent == pytest.approx(made.bias.true_exponent, abs=1e-4)
  text = made.text()
  assert "D* -23.1%" in text and "N* +30.1%" in text and "2603.22339" in text
  assert [line.split(" (")[0] for line in text.splitlines()] == [
      "approach 1", "approach 2", "approach 3", "known bias of approach 2"]


def test_what_an_approach_cannot_say_is_listed(fit):
  # One run a budget: no isoFLOP minimum, and nothing to work a bias out from.
  made = approaches.compare(fit, 1e24, tolerance=0.0, budget="run",
                            bootstrap=0)
  assert sorted(made.missing) == ["2"]
  assert "0 of 75 budgets show a minimum" in made.missing["2"]
  assert set(made.table["approach"]) == {"1", "3"} and made.bias is None
  assert "no approach 2: 0 of 75" in made.text()
  found = isoflop.fit(fit.runs, budget="run", bootstrap=0)
  with pytest.raises(power.NoLaw, match="0 of 75"):
    approaches.bias(fit, found, 1e24)


def test_bad_budgets_are_refused(fit):
  with pytest.raises(ValueError, match="flops must be positive"):
    approaches.compare(fit, [0.0])
  with pytest.raises(ValueError, match="known: hull"):
    approaches.compare(fit, [1e20], envelope="none")


def test_published_study():
  path = _REFDATA / "epoch_chinchilla" / "svg_extracted_data.csv"
  if not path.is_file():
    pytest.skip(f"the published table is not at {path}")
  frame = pd.read_csv(path).rename(
      columns={"Model Size": "params", "Training FLOP": "flops"})
  frame["tokens"] = frame["flops"] / (6 * frame["params"])
  # The study leaves out its five largest losses.
  frame = frame[frame["loss"] < np.sort(frame["loss"])[-5]]
  fit = scaling.fit(frame, bootstrap=400)
  rows = approaches.compare(fit, 5.76e23, bootstrap=200).table.set_index(
      "approach")
  # Besiroglu et al. 2024: a 0.5165 on average, 95% from 0.481 to 0.556, of
  # 4000 resamples; the point is beta / (alpha + beta) of its coefficients.
  third = rows.loc["3"]
  assert third["exponent_params"] == pytest.approx(
      0.3671724 / (0.3473105 + 0.3671724), abs=1e-4)
  assert third["exponent_params_low"] == pytest.approx(0.481, abs=0.012)
  assert third["exponent_params_high"] == pytest.approx(0.556, abs=0.012)
  # The loss is at what the budget buys, which N* and D* of two separate lines
  # need not spend.
  second = rows.loc["2"]
  assert 6 * second["params"] * second["tokens"] != pytest.approx(
      5.76e23, rel=1e-3)
  assert second["loss"] == pytest.approx(float(fit.predict(
      second["params"], fit.cost.tokens(second["params"], 5.76e23))), rel=1e-12)
  # Hoffmann's own: 0.50 and 0.49 by approaches 1 and 2.
  assert rows.loc["1", "exponent_params"] == pytest.approx(0.50, abs=0.03)
  assert rows.loc["2", "exponent_params"] == pytest.approx(0.49, abs=0.05)


@pytest.mark.parametrize("rows, columns, slope", [
    ("tableA3", ("N", "app2_FLOPs"), 0.490),
    ("tableA3", ("N", "app3_FLOPs"), 0.459),
    ("table3_approach1", ("N", "FLOPs"), 0.498)])
def test_published_slopes(rows, columns, slope):
  path = _REFDATA / "published_constants" / "hoffmann2022.json"
  if not path.is_file():
    pytest.skip(f"the published constants are not at {path}")
  table = json.loads(path.read_text())[rows]
  frame = pd.DataFrame(table["rows"], columns=table["columns"])
  exponent, _ = power.line(frame[columns[1]], frame[columns[0]])
  assert exponent == pytest.approx(slope, abs=5e-4)
