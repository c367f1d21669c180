# SPDX-License-Identifier: Apache-2.0
"""Tables and arguments at the edge: whatever is not refused gets a right
number."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import optimize
from scipy import stats

from tfjax import scaling
from tfjax.scaling import design
from tfjax.scaling import forms

_SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "fit.py"
_SIZES = np.geomspace(1e6, 1e9, 8)


def noisy(count=8, noise=0.02):
  rng = np.random.default_rng(0)
  params = np.geomspace(1e6, 1e9, count)
  return pd.DataFrame({"params": params, "loss": 10 * params**-0.1 * np.exp(
      noise * rng.standard_normal(count))})


def test_labels_of_an_index_that_repeat_are_no_groups():
  frame = pd.concat([noisy(), noisy().assign(loss=lambda f: f.loss * 1.01)])
  one, other = (scaling.fit(f, "kaplan_params", bootstrap=100) for f in (
      frame, frame.reset_index(drop=True)))
  assert one.intervals == other.intervals


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("own", [False, True])
def test_least_absolute_deviations_whatever_the_unit(size, own):
  frame = noisy(12)
  frame["loss"] *= size
  law = forms.from_function(
      lambda p, x: p["A"] * x["params"] ** -p["alpha"],
      (forms.Parameter("A", 1e-12, 1e12, (10 * size,), True, False),
       forms.Parameter("alpha", 1e-3, 3.0, (0.1, 0.3))),
      axes=("params",), name="own") if own else "kaplan_params"
  fit = scaling.fit(frame, law, objective="absolute", space="linear",
                    bootstrap=0)
  def deviations(exponent):  # Of a scale, the weighted median of ratios.
    powers = frame["params"].to_numpy() ** -exponent
    ratios = frame["loss"].to_numpy() / powers
    return min(np.abs(frame["loss"] - r * powers).sum() for r in ratios) / size
  grid = np.linspace(0.08, 0.12, 401)
  near = grid[np.argmin([deviations(a) for a in grid])]
  least = optimize.minimize_scalar(
      deviations, bounds=(near - 2e-4, near + 2e-4), method="bounded",
      options={"xatol": 1e-12}).fun
  assert fit.objective / size == pytest.approx(least, rel=1e-6)


def test_a_target_below_zero_has_no_law_of_positive_terms():
  law = forms.Law(
      "gain", "E + A / N^alpha", "made up", target="gain", space="linear",
      terms=(forms.Term("E"), forms.Term("A", {"params": "alpha"})))
  fit = scaling.fit(pd.DataFrame(
      {"params": _SIZES, "gain": -3 + 200 * _SIZES**-0.3}), law, bootstrap=0)
  assert fit.status == "bound_hit"


def test_a_score_of_zero_has_no_relative_error():
  loss = np.linspace(1.7, 5, 12)
  error = 0.5 - 1.5 * np.exp(-0.6 * loss)
  frame = pd.DataFrame({"loss": loss, "error": np.maximum(error, 0)})
  fit = scaling.fit(frame, "downstream_error", holdout=1, bootstrap=0)
  assert fit.holdout[0].measured == 0
  assert np.isnan(fit.holdout[0].relative_error)
  assert json.loads(json.dumps(fit.to_dict(), allow_nan=False))[
      "holdout"][0]["relative_error"] is None


def test_scales_too_large_for_a_number_are_infinite():
  fit = scaling.fit(
      noisy().assign(loss=lambda f: 10 + 1e-3 * np.cos(f.index)),
      "kaplan_params", bootstrap=0)
  assert fit.status == "bound_hit"
  assert fit.derived["N_c"] == np.inf
  assert '"N_c": null' in json.dumps(fit.to_dict(), allow_nan=False)


def test_profiles_of_parameters_of_any_sign():
  law = forms.from_function(
      lambda p, x: p["a"] + p["b"] * x["z"],
      (forms.Parameter("a", -100, 100, (0.0,)),
       forms.Parameter("b", -100, 100, (0.0,))),
      axes=("z",), target="y", space="linear", name="line")
  z = np.linspace(1, 10, 12)
  y = -2 * z + 0.3 * np.random.default_rng(0).standard_normal(12)
  design_matrix = np.stack([np.ones(12), z], axis=1)
  for shift in (0.0, np.linalg.lstsq(design_matrix, y, rcond=None)[0][0]):
    found, (squares,), _, _ = np.linalg.lstsq(
        design_matrix, y - shift, rcond=None)
    reach = stats.t.ppf(0.95, 10) * np.sqrt(squares / 10 * np.diag(
        np.linalg.inv(design_matrix.T @ design_matrix)))
    fit = scaling.fit(pd.DataFrame({"z": z, "y": y - shift}), law,
                      objective="squares", bootstrap=0, level=0.9)
    for k, name in enumerate("ab"):
      assert fit.profile_interval(name) == pytest.approx(
          (found[k] - reach[k], found[k] + reach[k]), rel=1e-6, abs=1e-6)
      assert fit.profile(name)["deviance"].max() > fit.deviance_limit


def test_a_range_of_losses_needs_no_decade():
  loss = np.linspace(1.8, 6, 10)
  rng = np.random.default_rng(0)
  fit = scaling.fit(pd.DataFrame({
      "loss": loss, "critical_batch": 2e8 * loss ** (-1 / 0.21) * np.exp(
          0.02 * rng.standard_normal(10))}), "critical_batch", bootstrap=100)
  assert fit.status == "converged", fit.reason
  assert fit.derived["alpha_B"] == pytest.approx(0.21, rel=0.02)


@pytest.mark.parametrize("law, options, problem", [
    ("broken_power", {"fixed": {"A": -1.0}}, "fixed A is -1.0; must be pos"),
    ("compute", {"fixed": {"alpha": "x"}}, "fixed alpha is 'x'"),
    ("compute", {"starts": {"alpha": []}}, "starts of alpha"),
    ("compute", {"starts": {"alpha": [np.nan]}}, "starts of alpha"),
    ("compute", {"resamples": np.zeros((3, 8))}, "resamples must be"),
    ("compute", {"resamples": np.zeros((0, 8), int)}, "resamples must be")])
def test_arguments_that_mean_nothing(law, options, problem):
  frame = noisy().rename(columns={"params": "flops"})
  with pytest.raises(ValueError, match=problem):
    scaling.fit(frame, law, bootstrap=0, **options)


def test_a_budget_below_zero_is_no_place_to_know_a_loss(truth):
  frame = pd.DataFrame([(n, d) for n in _SIZES for d in 20 * _SIZES],
                       columns=["params", "tokens"])
  frame["loss"] = (truth["E"] + truth["A"] / frame["params"]**truth["alpha"]
                   + truth["B"] / frame["tokens"]**truth["beta"])
  fit = scaling.fit(frame, bootstrap=0)
  with pytest.raises(ValueError, match="at must be positive"):
    design.suggest(fit, 1e20, at=-1.0, noise=0.01)


@pytest.mark.parametrize("flags, problem", [
    (["--config=x.py"], "--config means something with --suggest only"),
    (["--at=1e20"], "--at means something with --suggest only"),
    (["--report=/dev/null/x"], "fitted, but not written"),
    (["--suggest=0"], "flops is 0.0; must be positive")])
def test_script_refuses_flags_that_would_do_nothing(tmp_path, flags, problem):
  table = tmp_path / "runs.csv"
  frame = pd.DataFrame([(n, d) for n in _SIZES for d in 20 * _SIZES],
                       columns=["params", "tokens"])
  frame["loss"] = 2 + 400 * frame["params"]**-0.3 + 400 * frame["tokens"]**-0.3
  frame.to_csv(table, index=False)
  done = subprocess.run(
      [sys.executable, str(_SCRIPT), f"--table={table}", "--bootstrap=0",
       *flags], capture_output=True, text=True, timeout=300)
  assert done.returncode == 2, done.stderr
  assert problem in done.stderr


def test_script_that_can_reproduce_nothing_says_so(tmp_path):
  done = subprocess.run(
      [sys.executable, str(_SCRIPT), "--reproduce", f"--refdata={tmp_path}"],
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 2, done.stdout
  assert "no study's data" in done.stderr
