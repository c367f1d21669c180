# SPDX-License-Identifier: Apache-2.0
"""The frontier against a numerical minimum and numbers worked out by hand."""

import json
import pathlib

import numpy as np
import pytest
import scipy.optimize

from tfjax import scaling
from tfjax.scaling import forms
from tfjax.scaling import frontier
from tfjax.scaling import laws
from tfjax.scaling import search

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_HOFFMANN = (_ROOT / ".." / "shared" / "refdata" / "published_constants"
             / "hoffmann2022.json")

_LAW = laws.get("chinchilla")
# E, A, B, alpha, beta
_NATURAL = np.array([1.5, 20.0, 120.0, 0.3, 0.4])
# u and v for N_c = 8.8e13 and D_c = 5.4e13: Kaplan et al. 2020, table 2.
_KAPLAN = np.array([(8.8e13 / 1e6) ** (0.076 / 0.095), 5.4e13 / 1e9, 0.076,
                    0.095])


def test_by_hand():
  # alpha A = beta B and alpha = beta = 1/2: N* = D* = sqrt(C / 6).
  natural = np.array([1.0, 10.0, 10.0, 0.5, 0.5])
  params, tokens, loss = frontier.optimum(
      _LAW, natural, frontier.CONVENTION, np.array(6e12))
  assert params == pytest.approx(1e6) and tokens == pytest.approx(1e6)
  assert loss == pytest.approx(1 + 0.01 + 0.01)


def searched(law, natural, cost, flops, given=None):
  """log N* by scipy."""
  found = scipy.optimize.minimize_scalar(
      lambda log_n: float(frontier.loss_at(
          law, natural, cost, np.exp(log_n), cost.tokens(np.exp(log_n), flops),
          given)),
      bounds=(5, 40), method="bounded", options={"xatol": 1e-9})
  return found.x, found.fun


@pytest.mark.parametrize("kappa, gamma", [(6.0, 1.0), (18.0, 0.92),
                                          (2.0, 1.1)])
@pytest.mark.parametrize("flops", [1e11, 1e15, 1e21])
def test_no_split_of_the_budget_is_better(kappa, gamma, flops):
  cost = frontier.Cost(kappa, gamma, "", None, None)
  params, tokens, loss = frontier.optimum(_LAW, _NATURAL, cost,
                                          np.array(flops))
  assert cost.flops(params, tokens) == pytest.approx(flops)
  log_params, least = searched(_LAW, _NATURAL, cost, flops)
  assert loss == pytest.approx(least, rel=1e-10)
  assert np.log(params) == pytest.approx(log_params, abs=1e-3)


@pytest.mark.parametrize("name, natural, given", [
    ("kaplan", _KAPLAN, None),
    ("overtraining", np.array([1.8, 150.0, 190.0, 0.12]), None),
    ("data_constrained", np.array(
        [1.87, 520.8, 1487.7, 0.3527, 0.3527, 15.39, 5.31]),
     {"unique_tokens": 1e9})])
def test_laws_without_a_closed_form_are_searched(name, natural, given):
  law, cost = laws.get(name), frontier.CONVENTION
  assert frontier.method(law, given) == "numeric"
  flops = np.array([1e19, 1e21])
  params, tokens, loss = frontier.optimum(law, natural, cost, flops, given)
  assert cost.flops(params, tokens) == pytest.approx(flops)
  for k in (0, 1):
    log_params, least = searched(law, natural, cost, flops[k], given)
    assert loss[k] == pytest.approx(least, rel=1e-12)
    assert np.log(params[k]) == pytest.approx(log_params, abs=1e-4)


def test_kaplan_by_hand():
  # Least (N_c/N)^(alpha_N/alpha_D) + D_c/D at 6 N D = C: a power law with
  # a = 1 / (1 + alpha_N / alpha_D) of N*.
  a, b = frontier.exponents(laws.get("kaplan"), _KAPLAN, frontier.CONVENTION,
                            np.array([1e20]))
  assert a == pytest.approx(1 / (1 + 0.076 / 0.095), abs=1e-6)
  assert a + b == pytest.approx(1)


def test_overtraining_by_hand():
  # Least a M^eta + b M^-eta, whatever the budget: M = (b / a)^(1 / 2 eta).
  params, tokens, _ = frontier.optimum(
      laws.get("overtraining"), np.array([1.8, 150.0, 190.0, 0.12]),
      frontier.CONVENTION, np.array([1e18, 1e22]))
  assert tokens / params == pytest.approx((190 / 150) ** (1 / 0.24), rel=1e-5)


def test_exponents_where_cost_is_not_in_proportion_to_size():
  cost = frontier.Cost(18.0, 0.92, "", None, None)
  a, b = frontier.exponents(_LAW, _NATURAL, cost, np.array([1e15]))
  # beta / (alpha + gamma beta) and, D being what is left, 1 - gamma a.
  assert a == pytest.approx(0.4 / (0.3 + 0.92 * 0.4))
  assert b == pytest.approx(0.3 / (0.3 + 0.92 * 0.4))


def test_search_agrees_with_the_closed_form():
  free = tuple(forms.Parameter(n, 1e-3, 1e4, (1.0,)) for n in _LAW.parameters)
  law = forms.from_function(
      lambda p, x: p["E"] + p["A"] / x["params"] ** p["alpha"]
      + p["B"] / x["tokens"] ** p["beta"], free, ("params", "tokens"),
      name="same")
  samples = _NATURAL * np.exp(
      0.05 * np.random.default_rng(0).standard_normal((20, 1, 5)))
  cost = frontier.Cost(18.0, 0.92, "", None, None)
  flops = np.array([1e12, 1e20])
  closed = frontier.optimum(_LAW, samples, cost, flops)
  numeric = frontier.optimum(law, samples, cost, flops)
  assert frontier.method(_LAW) == "closed form"
  assert frontier.method(law) == "numeric"
  assert np.allclose(numeric[0], closed[0], rtol=1e-5)
  assert np.allclose(numeric[2], closed[2], rtol=1e-13)


def test_a_budget_without_a_best_split_is_unknown():
  # No loss in N at all: the smallest model is best, wherever one stops.
  law = forms.from_function(
      lambda p, x: p["E"] + 1 / x["tokens"] + 0 * x["params"],
      (forms.Parameter("E", 0.1, 9.0, (1.0,)),), ("params", "tokens"),
      name="no_size")
  params, _, loss = frontier.optimum(law, np.array([1.0]), frontier.CONVENTION,
                                     np.array([1e15]))
  assert np.isnan(params).all() and np.isnan(loss).all()


def test_further_axes_are_held_fixed():
  law = laws.get("width_depth")
  natural = np.array([1.5, 5.0, 2.0, 20.0, 120.0, 0.4, 0.6, 0.3, 0.4])
  given = {"width": 512.0, "depth": 8.0}
  flops = np.array([1e15])
  params, tokens, loss = frontier.optimum(law, natural, frontier.CONVENTION,
                                          flops, given)
  plain = frontier.optimum(_LAW, _NATURAL, frontier.CONVENTION, flops)
  assert params == pytest.approx(plain[0]) and tokens == pytest.approx(plain[1])
  assert loss == pytest.approx(plain[2] + 5 / 512**0.4 + 2 / 8**0.6)
  with pytest.raises(ValueError, match="width, depth.*given="):
    frontier.optimum(law, natural, frontier.CONVENTION, flops)
  with pytest.raises(ValueError, match="height is not an axis"):
    frontier.optimum(_LAW, _NATURAL, frontier.CONVENTION, flops,
                     {"height": 1.0})


@pytest.mark.parametrize("name", [
    "kaplan_params", "compute", "learning_rate", "width_depth_tokens",
    "kaplan_steps", "downstream_error", "transfer"])
def test_a_law_without_a_trade_off_has_no_frontier(name):
  assert not frontier.has_optimum(laws.get(name))


@pytest.mark.parametrize("name", ["chinchilla", "chinchilla_tied", "kaplan",
                                  "overtraining"])
def test_a_law_with_a_trade_off_has_one(name):
  assert frontier.has_optimum(laws.get(name))


def test_published_frontier():
  if not _HOFFMANN.is_file():
    pytest.skip(f"the published constants are not at {_HOFFMANN}")
  constants = json.loads(_HOFFMANN.read_text())
  raw = constants["approach3_unrounded"]
  natural = np.array([np.exp(raw["e"]), np.exp(raw["a"]), np.exp(raw["b"]),
                      raw["alpha"], raw["beta"]])
  a, b = frontier.exponents(_LAW, natural, frontier.CONVENTION,
                            np.array([1e21]))
  assert a == pytest.approx(0.4565, abs=5e-5) and a + b == pytest.approx(1)
  params, _, _ = frontier.optimum(_LAW, natural, frontier.CONVENTION,
                                  np.array([5.76e23]))
  assert params == pytest.approx(40.4e9, abs=0.05e9)


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
def test_a_budget_must_be_positive(flops):
  with pytest.raises(ValueError, match="flops must be positive and finite"):
    frontier.table(_LAW, _NATURAL, _NATURAL[None], frontier.CONVENTION,
                   [1e12, flops], 0.95)


def test_bands():
  values = np.arange(101.0)[:, None]
  assert np.ravel(frontier.band(values, 0.9)) == pytest.approx([5, 95])
  # Infinite samples: the ends, at ranks 4.5 and 95.5, are samples further out.
  values[96:] = np.inf
  low, high = frontier.band(values, 0.91)
  assert low == 4 and high == np.inf
  assert np.isnan(frontier.band(np.empty((0, 2)), 0.9)).all()


def test_search_finds_what_is_there_and_only_that():
  found = search.minimise(lambda x: (x - np.array([0.3, 7.0, 50.0])) ** 2,
                          np.zeros(3), np.full(3, 20.0))
  assert found[:2] == pytest.approx([0.3, 7.0], abs=1e-7)
  assert np.isnan(found[2])  # 50 is beyond the end.
  walled = search.minimise(lambda x: np.where(x < 5, np.inf, (x - 4) ** 2),
                           np.zeros(1), np.full(1, 20.0))
  assert walled == pytest.approx([5.0], abs=1e-6)
  crossing = search.first_below(
      lambda x: 10 - x, np.array([4.0, -100.0, 11.0, np.nan]), 0.0, 20.0)
  assert crossing[:2] == pytest.approx([6.0, np.inf])
  assert np.isnan(crossing[2:]).all()
