# SPDX-License-Identifier: Apache-2.0
"""The minimiser against scipy's, and variable projection against a search."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import special

from tfjax.scaling import laws
from tfjax.scaling import solver
from tfjax.scaling import varpro

_SIZE = np.repeat(np.geomspace(1, 50, 6), 4)
_DATA = np.tile(np.geomspace(1, 30, 4), 6)
_LOSS = (1.5 + 0.8 / _SIZE**0.4 + 0.6 / _DATA**0.5) * np.exp(
    0.01 * np.random.default_rng(0).standard_normal(24))


def surface(theta, x):
  return (theta[0] + theta[1] * jnp.exp(-theta[3] * jnp.log(x["n"]))
          + theta[2] * jnp.exp(-theta[4] * jnp.log(x["d"])))


def minimise(weights, delta, start=(1.0, 1.0, 1.0, 0.5, 0.5), bounds=None,
             log=True, **options):
  bounds = bounds or (np.full(5, 1e-3), np.full(5, 5.0))
  return solver.minimise(
      surface, log, {"n": _SIZE, "d": _DATA}, _LOSS, weights,
      np.atleast_2d(np.array(start)), bounds, delta, **options)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("delta", [np.inf, 1e-2, 2e-3])
def test_it_ends_where_scipy_does(log, delta):
  def value(theta):
    predicted = (theta[0] + theta[1] / _SIZE**theta[3]
                 + theta[2] / _DATA**theta[4])
    residual = (np.log(predicted) - np.log(_LOSS) if log
                else predicted - _LOSS)
    return (special.huber(delta, residual).sum() if np.isfinite(delta)
            else 0.5 * (residual**2).sum())
  ours = minimise(np.ones(24), delta, log=log)
  assert ours.converged.all()
  assert value(ours.theta[0]) == pytest.approx(ours.objective[0], rel=1e-12)
  theirs = optimize.minimize(
      value, ours.theta[0] * 1.02, method="Nelder-Mead",
      options={"maxiter": 20000, "maxfev": 20000, "xatol": 1e-9,
               "fatol": 1e-15})
  assert ours.objective[0] <= theirs.fun * (1 + 1e-9)
  np.testing.assert_allclose(ours.theta[0], theirs.x, rtol=2e-3)


def test_weights_are_repeated_rows():
  counts = np.random.default_rng(1).integers(0, 3, 24)
  by_weight = minimise(counts.astype(float), 1e-2)
  repeat = np.repeat(np.arange(24), counts)
  by_row = solver.minimise(
      surface, True, {"n": _SIZE[repeat], "d": _DATA[repeat]}, _LOSS[repeat],
      np.ones(len(repeat)), np.array([[1.0, 1.0, 1.0, 0.5, 0.5]]),
      (np.full(5, 1e-3), np.full(5, 5.0)), 1e-2)
  assert by_weight.converged.all() and by_row.converged.all()
  np.testing.assert_allclose(by_weight.theta, by_row.theta, rtol=1e-5)
  np.testing.assert_allclose(by_weight.objective, by_row.objective, rtol=1e-9)


def test_many_problems_are_each_their_own():
  rng = np.random.default_rng(2)
  weights = rng.integers(0, 3, (300, 24)).astype(float)  # more than one batch
  starts = np.tile([1.0, 1.0, 1.0, 0.5, 0.5], (300, 1))
  together = minimise(weights, 1e-2, starts)
  for k in (0, 127, 128, 299):
    alone = minimise(weights[k], 1e-2)
    np.testing.assert_array_equal(together.theta[k], alone.theta[0])


def test_bounds_hold_and_equal_ones_fix():
  low, high = np.full(5, 1e-3), np.full(5, 5.0)
  low[0] = high[0] = 1.45
  high[3] = 0.3
  ends = minimise(np.ones(24), 1e-2, bounds=(low, high))
  assert ends.converged.all()
  assert ends.theta[0, 0] == 1.45 and ends.theta[0, 3] == 0.3
  free = minimise(np.ones(24), 1e-2)
  assert ends.objective[0] > free.objective[0]


def test_a_start_without_a_value_does_not_count():
  ends = minimise(np.ones(24), 1e-2, ((np.nan,) * 5, (1.0, 1, 1, .5, .5)))
  assert not ends.converged[0] and np.isinf(ends.objective[0])
  assert ends.converged[1]


def test_stopped_early_is_not_converged():
  assert not minimise(np.ones(24), 1e-2, (4.0, 4.0, 4.0, 3.0, 3.0),
                      max_iterations=8).converged.any()


# --- Variable projection -----------------------------------------------------


def test_projection_is_the_search_it_stands_for():
  law, axes = laws.get("chinchilla"), {"params": _SIZE, "tokens": _DATA}
  weights = np.random.default_rng(3).uniform(0.5, 2, 24)
  grid = np.arange(1, 31) / 20
  found = varpro.search(law, axes, _LOSS, weights, grid)
  def squares(alpha, beta):
    design = np.stack([np.ones(24), _SIZE**-alpha, _DATA**-beta], axis=1)
    root = np.sqrt(weights)
    return optimize.nnls(design * root[:, None], _LOSS * root)
  best = min(itertools.product(grid, grid), key=lambda e: squares(*e)[1])
  np.testing.assert_allclose(found.natural[3:], best)
  (e, a, b), norm = squares(*best)
  np.testing.assert_allclose(found.natural[:3], (e, a, b), rtol=1e-9)
  assert found.objective == pytest.approx(norm**2, rel=1e-9)
  assert found.at_edge == ()


def test_projection_says_where_its_grid_ends():
  law, axes = laws.get("chinchilla"), {"params": _SIZE, "tokens": _DATA}
  found = varpro.search(law, axes, _LOSS, np.ones(24), np.arange(1, 7) / 20)
  assert found.at_edge == ("alpha", "beta")
  with pytest.raises(ValueError, match="'kaplan' is not a constant and"):
    varpro.search(laws.get("kaplan"), axes, _LOSS, np.ones(24), np.ones(3))
