# SPDX-License-Identifier: Apache-2.0
"""Fits recover known laws, and say so where the data cannot tell."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from tfjax import scaling
from tfjax.scaling import laws
from tfjax.scaling import solver

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PUBLISHED = (_ROOT / ".." / "shared" / "refdata" / "epoch_chinchilla"
              / "svg_extracted_data.csv")
_SCRIPT = _ROOT / "scripts" / "fit.py"


def made_up(truth, noise=0.0, seed=0, sizes=5, data=4):
  """A plain table under a known law, with no column but the needed ones."""
  params, tokens = map(np.ravel, np.meshgrid(
      np.geomspace(3e4, 1e6, sizes), np.geomspace(2e5, 4e6, data)))
  loss = (truth["E"] + truth["A"] / params**truth["alpha"]
          + truth["B"] / tokens**truth["beta"])
  noise = noise * np.random.default_rng(seed).standard_normal(len(loss))
  return pd.DataFrame(
      {"params": params, "tokens": tokens, "loss": loss * np.exp(noise)})


def published() -> pd.DataFrame:
  if not _PUBLISHED.is_file():
    pytest.skip(f"the published table is not at {_PUBLISHED}")
  frame = pd.read_csv(_PUBLISHED).rename(
      columns={"Model Size": "params", "Training FLOP": "flops"})
  frame["tokens"] = frame["flops"] / (6 * frame["params"])
  # The study leaves out its five largest losses.
  return frame[frame["loss"] < np.sort(frame["loss"])[-5]]


def test_reproduces_the_published_optimum():
  fit = scaling.fit(published(), delta=1e-3)
  expected = {"A": 477.826, "B": 2143.417, "E": 1.817218,
              "alpha": 0.3473105, "beta": 0.3671724}
  for name, value in expected.items():
    assert fit.coefficients[name] == pytest.approx(value, rel=1e-4), name
  assert fit.objective <= 0.001018274018
  assert fit.status == "converged"
  assert fit.share_at_best == 1.0
  # 4000 resamples gave these; 1000 are within their own sampling error.
  errors = dict(zip(fit.law.parameters, fit.samples.std(axis=0)))
  for name, value in {"E": 0.02566, "alpha": 0.01540, "beta": 0.02060}.items():
    assert errors[name] == pytest.approx(value, rel=0.10), name


def test_reproduces_the_published_least_absolute_deviations():
  fit = scaling.fit(published(), delta=1e-7, bootstrap=100)
  expected = {"A": 481.999, "B": 2085.393, "E": 1.816862,
              "alpha": 0.347812, "beta": 0.365853}
  for name, value in expected.items():
    assert fit.coefficients[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("changes", [
    {}, {"alpha": 0.6, "A": 400.0}, {"E": 0.3, "beta": 0.25, "B": 20.0}])
def test_recovers_an_exact_law(truth, changes):
  truth = truth | changes
  fit = scaling.fit(made_up(truth), bootstrap=100)
  assert fit.status == "converged", fit.reason
  for name, value in truth.items():
    assert fit.coefficients[name] == pytest.approx(value, rel=1e-6), name


def test_is_robust_to_an_outlier(truth):
  frame = made_up(truth, noise=1e-4)
  frame.loc[7, "loss"] *= 1.3
  fit = scaling.fit(frame, bootstrap=100)
  for name in ("alpha", "beta", "E"):
    assert fit.coefficients[name] == pytest.approx(truth[name], rel=0.03), name


def test_intervals_cover_the_truth_about_as_often_as_they_say(truth):
  names, inside, widths = ("alpha", "beta", "E"), [], []
  for seed in range(20):
    fit = scaling.fit(made_up(truth, noise=0.003, seed=seed), holdout=2,
                      bootstrap=150, level=0.9, seed=seed)
    inside.append([fit.intervals[n][0] <= truth[n] <= fit.intervals[n][1]
                   for n in names] +
                  [h.interval[0] <= h.measured <= h.interval[1]
                   for h in fit.holdout])
    widths.append([np.ptp(fit.intervals[n]) / truth[n] for n in names])
  # 20 draws of 90% have a standard deviation of 7%.
  coverage = np.mean(inside, axis=0)
  assert (coverage >= 0.7).all(), coverage
  assert (np.median(widths, axis=0) < 0.5).all()


def test_held_out_runs_are_predicted_not_fitted(truth):
  frame = made_up(truth, noise=0.003)
  largest = (frame["params"] * frame["tokens"]).idxmax()
  fit = scaling.fit(frame, holdout=3)
  assert len(fit.runs) == 17 and len(fit.holdout) == 3
  last = fit.holdout[-1]
  assert last.run == f"row {largest}"
  assert last.measured == frame["loss"][largest]
  assert last.relative_error == pytest.approx(
      last.predicted / last.measured - 1)
  assert last.interval[0] < last.predicted < last.interval[1]
  # A wild value in a held-out run changes the comparison and not the fit.
  frame.loc[largest, "loss"] *= 2
  other = scaling.fit(frame, holdout=3)
  assert other.coefficients == fit.coefficients
  assert other.holdout[-1].relative_error < -0.4


def test_the_same_seed_gives_the_same_intervals(truth):
  frame = made_up(truth, noise=0.003)
  first, second, third = (
      scaling.fit(frame, bootstrap=100, seed=seed) for seed in (1, 1, 2))
  assert first.intervals == second.intervals
  assert first.intervals != third.intervals


def test_twenty_runs_take_under_three_seconds(truth):
  frame = made_up(truth, noise=0.003)
  start = time.process_time()
  scaling.fit(frame, bootstrap=1000)
  assert time.process_time() - start < 3


# --- What the data do not determine -----------------------------------------


def test_one_data_size(truth):
  frame = made_up(truth)
  fit = scaling.fit(frame[frame["tokens"] == frame["tokens"].max()].assign(
      seed=0), bootstrap=100)
  assert fit.status == "not_identifiable"
  fit = scaling.fit(made_up(truth, sizes=8, data=1), bootstrap=100)
  assert fit.status == "not_identifiable"
  assert "1 distinct value of D" in fit.reason
  assert fit.determined == {"E": False, "A": True, "B": False, "alpha": True,
                            "beta": False}
  assert fit.intervals["beta"] is None
  assert np.isnan(fit.compute_optimal(1e12)["params"][0])
  assert np.isnan(fit.predict_interval(1e6, 1e6)[0])


def test_two_model_sizes(truth):
  fit = scaling.fit(made_up(truth, sizes=2, data=6), bootstrap=100)
  assert fit.status == "not_identifiable"
  assert "2 distinct values of N" in fit.reason
  assert not fit.determined["alpha"] and fit.determined["beta"]


def test_one_ratio_of_tokens_to_parameters(truth):
  frame = made_up(truth, sizes=8, data=1)
  frame["tokens"] = 20 * frame["params"]
  frame["loss"] = 1.5 + 20 / frame["params"]**.3 + 120 / frame["tokens"]**.4
  fit = scaling.fit(frame, bootstrap=100)
  assert fit.status == "not_identifiable"
  assert "cannot be told apart" in fit.reason
  assert not any(fit.determined.values())


def test_no_more_runs_than_parameters(truth):
  fit = scaling.fit(made_up(truth, sizes=3, data=3)[:5], bootstrap=100)
  assert fit.status == "not_identifiable"
  assert "at least 6 are needed" in fit.reason


def test_noise_that_swamps_the_exponents(truth):
  fit = scaling.fit(made_up(truth, noise=0.05), bootstrap=300)
  assert fit.status in ("not_identifiable", "bound_hit")
  assert "factor of 2" in fit.reason
  assert not (fit.determined["alpha"] and fit.determined["beta"])


def test_no_irreducible_loss(truth):
  fit = scaling.fit(made_up(truth | {"E": 0.0}), bootstrap=100)
  assert fit.status == "bound_hit"
  assert "no irreducible loss" in fit.reason
  assert not fit.determined["E"]


def test_a_second_optimum_as_good_is_reported(truth, monkeypatch):
  # The reported status must follow from what the solver found, so hand it two
  # equal ends.
  real = solver.minimise

  def two_ends(features, target, weights, start, bounds, delta):
    ends = real(features, target, weights, start, bounds, delta)
    if len(start) == 432:
      ends.theta[0, 3] *= 1.5
    return ends

  monkeypatch.setattr(solver, "minimise", two_ends)
  fit = scaling.fit(made_up(truth, noise=0.001), bootstrap=100)
  assert fit.status == "multiple_optima"
  assert "another optimum" in fit.reason


def test_a_solver_that_is_stopped_early_says_so(truth, monkeypatch):
  real = solver.minimise
  monkeypatch.setattr(solver, "minimise", lambda *a: real(*a, max_iterations=2))
  fit = scaling.fit(made_up(truth, noise=0.003), bootstrap=100)
  assert fit.status == "max_iterations"


def test_solver_weights_are_repeated_rows(truth):
  frame = made_up(truth, noise=0.01)
  law = laws.get("chinchilla")
  counts = np.random.default_rng(0).integers(0, 3, len(frame))
  repeated = frame.loc[np.repeat(frame.index, counts)]

  def solve(rows, weights):
    logs = {"params": np.log(rows["params"]) - 12,
            "tokens": np.log(rows["tokens"]) - 14}
    bounds = (np.array([-6, -6, -6, 1e-3, 1e-3]), np.array([3.0] * 5))
    return solver.minimise(
        law.features({k: v.to_numpy() for k, v in logs.items()}),
        np.log(rows["loss"].to_numpy()), weights[None],
        np.array([[0.3, -1.0, -1.0, 0.3, 0.3]]), bounds, 1e-2)

  by_weight = solve(frame, counts.astype(float))
  by_row = solve(repeated, np.ones(len(repeated)))
  assert by_weight.converged.all() and by_row.converged.all()
  np.testing.assert_allclose(by_weight.theta, by_row.theta, rtol=1e-5)
  np.testing.assert_allclose(by_weight.objective, by_row.objective, rtol=1e-9)


# --- Bad rows and tables -----------------------------------------------------


def test_unusable_rows_are_listed_and_change_nothing(
    write_ledger, write_run):
  workdir = write_ledger(noise=0.003)
  clean = scaling.fit(scaling.load(workdir), bootstrap=100)
  write_run(workdir / "blown", 50000, 300000, None, status="diverged",
            status_reason="loss was inf at step 31")
  write_run(workdir / "zero", 50000, 300000, 0.0)
  write_run(workdir / "negative", 50000, 300000, -1.0)
  write_run(workdir / "unknown", 50000, 300000, None)
  write_run(workdir / "killed", 50000, 300000, 9.9, status="interrupted")
  # Unknown columns of a failed run do not make the table a mixture.
  write_run(workdir / "dead", 50000, 300000, None, status="failed",
            tokenizer=None)
  fit = scaling.fit(scaling.load(workdir), bootstrap=100)
  assert fit.coefficients == clean.coefficients
  assert {e.run: e.reason for e in fit.excluded} == {
      "blown": "diverged: loss was inf at step 31",
      "zero": "loss is 0; must be positive and finite",
      "negative": "loss is -1; must be positive and finite",
      "unknown": "loss is nan; must be positive and finite",
      "killed": "interrupted", "dead": "failed"}


def test_a_repeated_run_counts_once(write_ledger):
  frame = scaling.load(write_ledger(noise=0.003))
  fit = scaling.fit(pd.concat([frame, frame[:2]], ignore_index=True),
                    bootstrap=100)
  assert len(fit.runs) == 20
  assert [e.reason for e in fit.excluded] == ["repeats another row"] * 2


@pytest.mark.parametrize("column, value", [
    ("tokenizer", "byte"), ("tokenizer", None), ("objective", "masked"),
    ("corpus", "stdlib"), ("flops_convention", "6ND"), ("vocab_size", 512)])
def test_losses_that_cannot_be_compared(
    write_ledger, write_run, column, value):
  workdir = write_ledger()
  write_run(workdir / "odd", 50000, 300000, 3.0, **{column: value})
  with pytest.raises(scaling.TableError, match=f"not comparable.*{column}"):
    scaling.fit(scaling.load(workdir))


def test_too_few_rows(truth):
  with pytest.raises(scaling.TableError, match="too few runs to fit: 2 in"):
    scaling.fit(made_up(truth)[:2])
  with pytest.raises(scaling.TableError, match="18 held out"):
    scaling.fit(made_up(truth), holdout=18)


def test_missing_and_textual_columns(truth):
  frame = made_up(truth)
  with pytest.raises(scaling.TableError, match="params_total.*params"):
    scaling.fit(frame.drop(columns="params"))
  with pytest.raises(scaling.TableError, match="'loss' must hold numbers"):
    scaling.fit(frame.assign(loss="3.0"))


@pytest.mark.parametrize("argument", [
    {"delta": 0.0}, {"holdout": -1}, {"bootstrap": 3}, {"level": 1.0},
    {"law": "nonesuch"}])
def test_arguments_out_of_range(truth, argument):
  with pytest.raises(ValueError, match=next(iter(argument))):
    scaling.fit(made_up(truth), **argument)


def test_the_choice_of_n_is_used_and_recorded(write_ledger):
  frame = scaling.load(write_ledger())
  fit = scaling.fit(frame, params="params_non_embedding", bootstrap=100)
  assert fit.conventions["params"] == "params_non_embedding"
  # N is three quarters of the total here, so A shrinks by 0.75^alpha.
  assert fit.coefficients["A"] == pytest.approx(20 * 0.75**0.3, rel=1e-3)
  assert scaling.fit(frame, bootstrap=100).conventions["params"] == (
      "params_total")


def test_default_holdout(write_ledger):
  frame = scaling.load(write_ledger())
  assert scaling.default_holdout(frame) == 3
  assert scaling.default_holdout(frame[:7]) == 1
  assert scaling.default_holdout(frame[:6]) == 0


# --- The script --------------------------------------------------------------


def run_script(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, str(_SCRIPT), *arguments], capture_output=True,
      text=True, timeout=60, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})


def test_script_prints_and_records(write_ledger):
  workdir = write_ledger(noise=0.002)
  done = run_script(f"--workdir={workdir}", "--bootstrap=200")
  assert done.returncode == 0, done.stderr
  assert "alpha" in done.stdout and "held-out runs" in done.stdout
  record = json.loads((workdir / "fit.json").read_text())
  fit = scaling.fit(scaling.load(workdir), holdout=3, bootstrap=200)
  assert record["coefficients"] == fit.coefficients
  assert record["num_runs"] == 17 and len(record["holdout"]) == 3
  assert record["conventions"]["tokenizer"] == "bpe-1024"
  assert record["status"] == fit.status


def test_script_reports_what_is_not_determined(write_ledger):
  workdir = write_ledger(tokens=(1000000,), sizes=tuple(range(30000, 100000,
                                                              10000)))
  done = run_script(f"--workdir={workdir}", "--bootstrap=100")
  assert done.returncode == 0, done.stderr
  assert "not identifiable" in done.stdout
  assert "not determined" in done.stdout
  record = json.loads((workdir / "fit.json").read_text())
  assert record["intervals"]["beta"] is None


@pytest.mark.parametrize("make, problem", [
    (lambda write, path: path / "nowhere", "no directory"),
    (lambda write, path: path, "has a result.json"),
    (lambda write, path: write(sizes=(1000,), tokens=(5000,)), "too few runs"),
])
def test_script_with_nothing_to_fit(write_ledger, tmp_path, make, problem):
  done = run_script(f"--workdir={make(write_ledger, tmp_path)}")
  assert done.returncode == 2
  assert problem in done.stderr and "Traceback" not in done.stderr


def test_the_layer_imports_no_jax():
  code = ("import sys, tfjax.scaling, tfjax.scaling.report; "
          "assert not {'jax', 'flax', 'torch'} & set(sys.modules)")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, timeout=60)
  assert done.returncode == 0, done.stderr


def test_predictions_are_finite_and_shaped(truth):
  fit = scaling.fit(made_up(truth, noise=0.003), bootstrap=100)
  params, tokens = np.geomspace(1e4, 1e9, 7), np.full(7, 1e6)
  low, high = fit.predict_interval(params, tokens)
  assert fit.predict(params, tokens).shape == low.shape == high.shape == (7,)
  assert (low <= high).all()
  noisy_low, noisy_high = fit.predict_interval(params, tokens, noise=True)
  assert (noisy_high - noisy_low > high - low).all()
  assert math.isclose(
      float(fit.predict(1e5, 1e6)), truth["E"] + truth["A"] / 1e5**0.3
      + truth["B"] / 1e6**0.4, rel_tol=0.01)
