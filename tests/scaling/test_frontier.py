# SPDX-License-Identifier: Apache-2.0
"""The frontier against a numerical minimum and numbers worked out by hand."""

import numpy as np
import pytest
import scipy.optimize

from tfjax import scaling
from tfjax.scaling import frontier
from tfjax.scaling import laws

_LAW = laws.get("chinchilla")
# E, A, B, alpha, beta
_NATURAL = np.array([1.5, 20.0, 120.0, 0.3, 0.4])


def test_by_hand():
  # alpha A = beta B and alpha = beta = 1/2: N* = D* = sqrt(C / 6).
  natural = np.array([1.0, 10.0, 10.0, 0.5, 0.5])
  params, tokens, loss = frontier.optimum(
      _LAW, natural, frontier.CONVENTION, np.array(6e12))
  assert params == pytest.approx(1e6) and tokens == pytest.approx(1e6)
  assert loss == pytest.approx(1 + 0.01 + 0.01)


@pytest.mark.parametrize("kappa, gamma", [(6.0, 1.0), (18.0, 0.92),
                                          (2.0, 1.1)])
@pytest.mark.parametrize("flops", [1e11, 1e15, 1e21])
def test_no_split_of_the_budget_is_better(kappa, gamma, flops):
  cost = frontier.Cost(kappa, gamma, "", None, None)
  params, tokens, loss = frontier.optimum(_LAW, _NATURAL, cost,
                                          np.array(flops))
  assert cost.flops(params, tokens) == pytest.approx(flops)
  found = scipy.optimize.minimize_scalar(
      lambda log_n: float(_LAW.predict(_NATURAL, {
          "params": np.exp(log_n), "tokens": cost.tokens(
              np.exp(log_n), flops)})),
      bounds=(5, 40), method="bounded", options={"xatol": 1e-9})
  assert loss == pytest.approx(found.fun, rel=1e-10)
  assert np.log(params) == pytest.approx(found.x, abs=1e-3)


def test_cost_follows_the_records():
  params = np.array([1e4, 1e5, 1e6])
  cost = frontier.fit_cost(params, np.array([1e6, 2e6, 3e6]),
                           18 * params**0.92 * np.array([1e6, 2e6, 3e6]))
  assert (cost.kappa, cost.gamma) == pytest.approx((18, 0.92))
  assert cost.worst_error == pytest.approx(0, abs=1e-9)
  assert cost.per_parameter_token == pytest.approx(
      (18 * 1e6**-0.08, 18 * 1e4**-0.08))


def test_cost_of_one_size_is_a_constant():
  cost = frontier.fit_cost(np.full(3, 1e5), np.array([1e6, 2e6, 3e6]),
                           7.5e5 * np.array([1e6, 2e6, 3e6]))
  assert (cost.kappa, cost.gamma) == pytest.approx((7.5, 1))


def test_cost_without_flops_is_six_by_convention(write_ledger):
  frame = scaling.load(write_ledger())
  fit = scaling.fit(frame.drop(columns="flops_total"), bootstrap=100)
  assert (fit.cost.kappa, fit.cost.gamma) == (6, 1)
  assert "convention" in fit.cost.source
  recorded = scaling.fit(frame, bootstrap=100).cost
  assert recorded.gamma < 1 and recorded.worst_error < 0.05


def test_fit_on_the_frontier(write_ledger):
  fit = scaling.fit(scaling.load(write_ledger(noise=0.003)))
  rows = fit.compute_optimal([1e12, 1e13, 1e16])
  assert list(rows["extrapolated"]) == [False, False, True]
  for name in ("params", "tokens", "tokens_per_parameter", "loss"):
    assert (rows[f"{name}_low"] <= rows[name]).all()
    assert (rows[name] <= rows[f"{name}_high"]).all()
  assert rows["tokens_per_parameter"].to_numpy() == pytest.approx(
      (rows["tokens"] / rows["params"]).to_numpy())
  width = rows["params_high"] / rows["params_low"]
  assert width[2] > width[0]


@pytest.mark.parametrize("flops", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_must_be_positive(write_ledger, flops):
  fit = scaling.fit(scaling.load(write_ledger()), bootstrap=100)
  with pytest.raises(ValueError, match="positive and finite"):
    fit.compute_optimal([1e12, flops])


def test_envelope_is_the_lower_hull():
  flops = np.exp(np.array([3.0, 0.0, 1.0, 2.0, 2.0, 4.0]))
  loss = np.exp(np.array([0.2, 3.0, 1.0, 0.7, 0.5, 0.3]))
  # By cost: 0 -> 3, 1 -> 1, 2 -> 0.5 (0.7 is dearer), 3 -> 0.2; the last run
  # costs more and is worse. (2, 0.5) lies below the line (1, 1) to (3, 0.2).
  assert frontier.envelope(flops, loss).tolist() == [1, 2, 4, 0]
  loss[4] = np.exp(0.65)  # above that line
  assert frontier.envelope(flops, loss).tolist() == [1, 2, 0]


def test_a_law_without_a_trade_off_has_no_frontier():
  law = laws.Law("one_axis", (laws.Term("A", {"params": "alpha"}),), "", "")
  assert not frontier.has_optimum(law)
  assert frontier.has_optimum(_LAW)
