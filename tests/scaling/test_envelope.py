# SPDX-License-Identifier: Apache-2.0
"""Approach 1 against envelopes worked out by hand and published exponents."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from tfjax.scaling import envelope
from tfjax.scaling import power

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_GEMSTONES = _ROOT / ".." / "shared" / "refdata" / "gemstones"


def optimal_runs(count=6):
  """N = 2 C^0.4 and D = C^0.6 / 12, and a worse run beside each."""
  flops = np.geomspace(1e12, 1e15, count)
  best = pd.DataFrame({"params": 2 * flops**0.4, "tokens": flops**0.6 / 12,
                       "loss": 1 + 50 * flops**-0.1, "flops": flops})
  worse = best.assign(params=best["params"] * 3, tokens=best["tokens"] / 3,
                      loss=best["loss"] * 1.2)
  return pd.concat([best, worse], ignore_index=True)


def test_hull_by_hand():
  flops = np.exp(np.array([3.0, 0.0, 1.0, 2.0, 2.0, 4.0]))
  loss = np.exp(np.array([0.2, 3.0, 1.0, 0.7, 0.5, 0.3]))
  # By cost: 0 -> 3, 1 -> 1, 2 -> 0.5 (0.7 is dearer), 3 -> 0.2; the last run
  # costs more and is worse. (2, 0.5) lies below the line (1, 1) to (3, 0.2).
  assert envelope.hull(flops, loss).tolist() == [1, 2, 4, 0]
  loss[4] = np.exp(0.65)  # above that line
  assert envelope.hull(flops, loss).tolist() == [1, 2, 0]
  assert envelope.pareto(flops, loss).tolist() == [1, 2, 4, 0]


@pytest.mark.parametrize("method", ["hull", "pareto"])
def test_recovers_an_exact_allocation(method):
  found = envelope.fit(optimal_runs(), method=method, bootstrap=100)
  assert found.params.exponent == pytest.approx(0.4, rel=1e-9)
  assert found.tokens.exponent == pytest.approx(0.6, rel=1e-9)
  assert found.params.predict(1e20) == pytest.approx(2 * 1e8, rel=1e-8)
  assert found.tokens.predict(1e20) == pytest.approx(1e12 / 12, rel=1e-8)
  assert len(found.runs) == 6


def checkpoints():
  """Three runs of one curve each; which is lowest changes with compute."""
  rows = []
  for name, params in (("a", 1e6), ("b", 4e6), ("c", 1.6e7)):
    tokens = np.geomspace(1e6, 1e9, 40)
    loss = 2 + 300 / params**0.4 + 400 / tokens**0.4
    rows.append(pd.DataFrame({
        "run": name, "params": params, "tokens": tokens, "loss": loss,
        "flops": 6 * params * tokens}))
  return pd.concat(rows, ignore_index=True)


def test_curves_of_checkpoints():
  found = envelope.fit(checkpoints(), method="curves", budgets=500,
                       bootstrap=50)
  # A larger run is the lowest from where the curves cross: for a and b
  # 300 (N_a^-0.4 - N_b^-0.4) = 400 (D_b^-0.4 - D_a^-0.4), D = C / 6N.
  def crossing(small, large):
    size = 300 * (small**-0.4 - large**-0.4)
    data = 400 * ((6 * large)**0.4 - (6 * small)**0.4)
    return (data / size) ** (1 / 0.4)
  runs = found.runs
  step = runs["flops"].iloc[1] / runs["flops"].iloc[0]
  for small, large, sizes in (("a", "b", (1e6, 4e6)), ("b", "c", (4e6, 1.6e7))):
    last = runs["flops"][runs["run"] == small].max()
    first = runs["flops"][runs["run"] == large].min()
    assert first == pytest.approx(last * step)
    assert last / 1.01 <= crossing(*sizes) <= first * 1.01
  assert np.allclose(6 * runs["params"] * runs["tokens"], runs["flops"])


def test_checkpoints_of_a_run_are_drawn_together():
  rng = np.random.default_rng(0)
  rows = checkpoints()
  rows["loss"] *= np.exp(0.01 * rng.standard_normal(len(rows)))
  together = envelope.fit(rows, bootstrap=300)
  apart = envelope.fit(rows.assign(run=range(len(rows))), bootstrap=300)
  assert together.params.exponent == apart.params.exponent
  # Of three runs, one drawn alone has no law: 3 of 27 draws.
  assert together.usable == pytest.approx(1 - 3 / 27, abs=0.06)
  assert apart.usable == 1


def test_too_few_usable_resamples_give_no_interval():
  found = envelope.fit(optimal_runs(3)[:3], bootstrap=300)
  # All of three runs are drawn 6 times in 27.
  assert found.usable == pytest.approx(6 / 27, abs=0.08)
  assert found.params.interval is None
  assert np.isnan(found.params.predict_interval(1e20)).all()
  assert found.params.exponent == pytest.approx(0.4, rel=1e-9)


def test_bad_input_is_refused():
  runs = optimal_runs()
  with pytest.raises(ValueError, match="known: hull, pareto, curves"):
    envelope.fit(runs, method="convex")
  with pytest.raises(ValueError, match="no column tokens"):
    envelope.fit(runs.drop(columns="tokens"))
  with pytest.raises(ValueError, match="loss of row 2 is nan"):
    envelope.fit(runs.assign(loss=runs["loss"].where(runs.index != 2)))
  with pytest.raises(power.NoLaw, match="2 points; at least 3"):
    envelope.fit(runs[:2])
  with pytest.raises(power.NoLaw, match="one size"):
    envelope.fit(runs.assign(params=1e6))
  with pytest.raises(ValueError, match="several checkpoints"):
    envelope.fit(runs, method="curves")
  rows = checkpoints()
  with pytest.raises(ValueError, match="checkpoints of a differ in size"):
    envelope.fit(rows.assign(params=rows["params"] * rows["tokens"]),
                 method="curves")
  with pytest.raises(ValueError, match="level is 1.5"):
    envelope.fit(runs, level=1.5)
  with pytest.raises(ValueError, match="bootstrap is -1"):
    envelope.fit(runs, bootstrap=-1)


@pytest.mark.parametrize("table, label", [
    ("hot_477", ""), ("hot_100b+_477", "_100b+"),
    ("lr_ablation_hot_477", "_lr_ablation"), ("cool_end", "_cooldown"),
    ("hot_120b+_only_477", "_120b+_only")])
def test_published_exponents(table, label):
  if not _GEMSTONES.is_dir():
    pytest.skip(f"the published tables are not at {_GEMSTONES}")
  runs = pd.read_json(
      _GEMSTONES / "wandb_dfs" / f"wandb_df_for_fitting_{table}.jsonl",
      lines=True).rename(columns={
          "run_name": "run", "params_active_precise": "params",
          "final_loss": "loss"})
  runs = runs[runs["step"] > 0]
  width, depth = runs["width"], runs["depth"]
  # The study's count a token, forward and backward: 30 w^2 of matrices a
  # layer, causal scores over 2048 tokens, and the head of 50304.
  per_token = (depth * (90 * width**2 + 183.75 * width
                        + 10.5 * 2048 * width * (1 + 1 / 128))
               + 21.0 * width + 6 * width * 50304)
  found = envelope.fit(runs.assign(flops=per_token * runs["tokens"]),
                       bootstrap=0)
  for name, law in (("params", found.params), ("tokens", found.tokens)):
    published = json.loads((
        _GEMSTONES / "parameters"
        / f"approach_1_linear_regression_{name}{label}.json").read_text())
    assert law.exponent == pytest.approx(published["coef"][0], abs=1e-9)
    assert law.intercept == pytest.approx(published["intercept"], abs=1e-7)
    assert law.interval is None
