# SPDX-License-Identifier: Apache-2.0
"""Approach 2 against parabolas worked out by hand, and its published bias."""

import numpy as np
import pandas as pd
import pytest

from tfjax.scaling import isoflop

_A, _B, _E = 406.4, 410.7, 1.69


def optimal_tokens(flops, alpha, beta):
  scale = (alpha * _A / (beta * _B)) ** (1 / (alpha + beta))
  return (flops / 6) ** (alpha / (alpha + beta)) / scale


def surface(alpha=0.34, beta=0.28, width=8.0, points=15, noise=0.0,
            budgets=10.0 ** np.arange(17, 22)):
  """Losses at `points` sizes from D*/width to D* width, a budget each."""
  rng, rows = np.random.default_rng(0), []
  for flops in budgets:
    tokens = optimal_tokens(flops, alpha, beta) * np.geomspace(
        1 / width, width, points)
    params = flops / 6 / tokens
    loss = _E + _A / params**alpha + _B / tokens**beta
    rows.append(pd.DataFrame({
        "params": params, "tokens": tokens, "flops": flops,
        "loss": loss * np.exp(noise * rng.standard_normal(points))}))
  return pd.concat(rows, ignore_index=True)


def parabolas(curvature=0.3):
  """Loss 2 + 0.3 log(N / N*)^2 with N* = C^0.5 / 10, D = C / 6N."""
  rows = []
  for flops in (1e12, 1e14, 1e16):
    best = flops**0.5 / 10
    params = best * np.array([0.2, 0.5, 1.5, 3.0, 6.0])
    rows.append(pd.DataFrame({
        "params": params, "tokens": flops / 6 / params, "flops": flops,
        "loss": 2 + curvature * np.log(params / best) ** 2}))
  return pd.concat(rows, ignore_index=True)


def test_parabola_by_hand():
  found = isoflop.fit(parabolas(), bootstrap=50)
  assert [m.params for m in found.minima] == pytest.approx([1e5, 1e6, 1e7])
  assert [m.loss for m in found.minima] == pytest.approx([2, 2, 2])
  assert [m.tokens for m in found.minima] == pytest.approx(
      [1e7 / 6, 1e8 / 6, 1e9 / 6])
  assert found.params.exponent == pytest.approx(0.5)
  assert found.tokens.exponent == pytest.approx(0.5)
  assert found.params.predict(1e20) == pytest.approx(1e9)
  # Exact data: every resample has the same vertices, but for those in which
  # a size at the end is all that is left on its side.
  assert found.params.interval == pytest.approx((0.5, 0.5))
  assert found.minima[0].params_interval == pytest.approx((1e5, 1e5))
  assert found.minima[0].curve(np.array([1e5, np.e * 1e5, 1e9])
                               ) == pytest.approx([2, 2.3, np.nan], nan_ok=True)


@pytest.mark.parametrize("alpha, beta, width, published", [
    (0.34, 0.28, 2, -0.326937803732719), (0.34, 0.28, 4, -1.3011250437043),
    (0.34, 0.28, 8, -2.902904738135434), (0.34, 0.28, 16, -5.100244551712022),
    (0.465, 0.155, 2, -1.674747716507073),
    (0.465, 0.155, 4, -6.497778742083532),
    (0.465, 0.155, 8, -13.910418584294648),
    (0.465, 0.155, 16, -23.116308048545221), (0.31, 0.31, 16, 0.0)])
def test_published_bias_of_parabolas(alpha, beta, width, published):
  # Czech et al. 2026, error of D* at 1e24 FLOPs in percent, noise-free.
  found = isoflop.fit(surface(alpha, beta, width), bootstrap=0)
  error = found.tokens.predict(1e24) / optimal_tokens(1e24, alpha, beta) - 1
  assert 100 * error == pytest.approx(published, abs=1e-6)
  # The exponent is right all the same: the shift is one for all budgets.
  assert found.params.exponent == pytest.approx(beta / (alpha + beta))


@pytest.mark.parametrize("method, off", [("akima", 0.02), ("makima", 0.01),
                                         ("spline", 1e-4)])
def test_other_curves_hardly_have_that_bias(method, off):
  found = isoflop.fit(surface(0.465, 0.155, 16), method=method, bootstrap=0)
  error = found.tokens.predict(1e24) / optimal_tokens(1e24, 0.465, 0.155) - 1
  assert abs(error) < off


@pytest.mark.parametrize("method", ["parabola", "akima"])
def test_intervals_hold_the_truth(method):
  found = isoflop.fit(surface(width=4, points=9, noise=0.002), method=method,
                      bootstrap=300)
  low, high = found.params.interval
  assert low < 0.28 / 0.62 < high and high - low < 0.2
  assert found.usable > 0.9 and found.reason == ""
  low, high = found.params.predict_interval(np.array([1e18, 1e24]))
  assert (low < high).all() and high[1] / low[1] > high[0] / low[0]
  rows = found.table()
  assert (rows["params_low"] < rows["params_high"]).all()


def test_more_noise_wider_intervals():
  few, much = (isoflop.fit(surface(width=4, points=9, noise=noise),
                           bootstrap=300).params.interval
               for noise in (0.0005, 0.002))
  assert much[1] - much[0] > 2 * (few[1] - few[0])


def test_refused_budgets_say_why():
  rows = surface()
  # At 1e17 only sizes above the best, at 1e18 only below, at 1e19 three.
  ratio = rows["params"] * 6 * optimal_tokens(rows["flops"], 0.34, 0.28) / (
      rows["flops"])
  kept = {1e17: ratio > 1.2, 1e18: ratio < 1 / 1.2,
          1e19: ratio.between(0.7, 1.4)}
  rows = rows[np.select([rows["flops"] == c for c in kept], kept.values(),
                        True)]
  found = isoflop.fit(rows, bootstrap=0)
  assert [r.flops for r in found.refused] == pytest.approx([1e17, 1e18, 1e19])
  reasons = [r.reason for r in found.refused]
  assert "smallest size" in reasons[0] and "smaller still" in reasons[0]
  assert "largest size" in reasons[1] and "larger still" in reasons[1]
  assert reasons[2] == "distinct sizes: 3; a parabola needs at least 4"
  # Two minima lie on a line whatever they are.
  assert len(found.minima) == 2 and found.params is None
  assert found.reason == "2 of 5 budgets show a minimum; a law needs 3"
  table = found.table()
  assert table["flops"].is_monotonic_increasing and len(table) == 5
  assert table["params"].isna().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("method", ["parabola", "akima", "spline"])
def test_a_hill_has_no_minimum(method):
  found = isoflop.fit(parabolas(curvature=-0.01), method=method, bootstrap=0)
  assert not found.minima and len(found.refused) == 3


@pytest.mark.parametrize("losses, reason", [
    # The lowest loss is inside, but the parabola's vertex is not.
    ([2.95, 2.9, 2.6, 1.9, 1.91], "lowest of the curve is at the largest"),
    # The parabola has its vertex inside, but as a hill.
    ([2.1, 2.5, 2.05, 2.5, 2.11], "lowest of the curve is at the smallest"),
    # It is a valley inside, but no larger size was worse.
    ([3.0, 2.4, 2.1, 2.0, 1.99], "lowest loss is at the largest")])
def test_a_vertex_that_shows_no_minimum_is_refused(losses, reason):
  x = np.arange(5.0)
  rows = pd.concat([pd.DataFrame({
      "params": 1e6 * np.exp(x), "tokens": flops / 6e6 / np.exp(x),
      "flops": flops, "loss": losses}) for flops in (1e15, 1e16, 1e17)])
  found = isoflop.fit(rows, bootstrap=0)
  assert not found.minima
  assert all(reason in one.reason for one in found.refused)


def test_intervals_stay_within_the_sizes():
  found = isoflop.fit(surface(width=3, points=7, noise=0.01), bootstrap=300)
  for one in found.minima:
    if one.params_interval is not None:
      low, high = one.params_interval
      assert one.runs["params"].min() < low < high < one.runs["params"].max()
  assert any(m.params_interval for m in found.minima)


def test_budgets_by_tolerance_and_by_column():
  rows = surface(points=6)
  rng = np.random.default_rng(1)
  near = rows.assign(flops=rows["flops"] * rng.uniform(0.97, 1.03, len(rows)))
  assert len(isoflop.fit(near, bootstrap=0).minima) == 5
  assert not isoflop.fit(near, tolerance=1e-3, bootstrap=0).minima
  named = near.assign(name=np.log10(rows["flops"]).round().astype(int))
  found = isoflop.fit(named, budget="name", tolerance=0.0, bootstrap=0)
  assert len(found.minima) == 5
  assert all(1 < m.spread < 1.07 for m in found.minima)
  # Equal FLOPs that differ by rounding are one budget.
  rounded = rows.assign(flops=rows["flops"] * (1 + 1e-13 * (rows.index % 3)))
  assert rounded["flops"].nunique() > 5
  assert len(isoflop.fit(rounded, tolerance=0.0, bootstrap=0).minima) == 5


def test_seeds_of_one_size_count_as_their_mean():
  rows = parabolas()
  split = pd.concat([rows.assign(loss=rows["loss"] + d) for d in (-0.1, 0.1)])
  found = isoflop.fit(split, method="akima", bootstrap=0)
  assert [m.params for m in found.minima] == pytest.approx(
      [m.params for m in isoflop.fit(rows, method="akima", bootstrap=0).minima])


def test_bad_input_is_refused():
  rows = parabolas()
  with pytest.raises(ValueError, match="known: parabola, akima"):
    isoflop.fit(rows, method="cubic")
  with pytest.raises(ValueError, match="tolerance is 1.5"):
    isoflop.fit(rows, tolerance=1.5)
  with pytest.raises(ValueError, match="no column 'level' of budgets"):
    isoflop.fit(rows, budget="level")
  with pytest.raises(ValueError, match="row 0 has no level"):
    isoflop.fit(rows.assign(level=[np.nan] + [1] * 14), budget="level")
  with pytest.raises(ValueError, match="params of row 3 is 0"):
    isoflop.fit(rows.assign(params=rows["params"].where(rows.index != 3, 0)))
