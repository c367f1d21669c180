# SPDX-License-Identifier: Apache-2.0
"""Profile likelihood: how much worse a fit gets as one parameter moves away.

The other parameters are at their best for each value. Works on any objective
of `estimate`, by the likelihood-ratio-type test of M-estimators.
"""

import numpy as np
from scipy import stats

from tfjax.scaling import estimate as estimate_lib
from tfjax.scaling.forms import FloatArray

_REACH = 4.0  # profiles span the estimate over and times this
_ERRORS = 3.0  # times the usual interval, where ratios mean nothing
_POINTS = 25  # of a first look, and in all of the second
_ITERATIONS = 96  # far from the estimate a profile is only a bound


def curve(estimate: estimate_lib.Estimate, theta: FloatArray, name: str,
          values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
  """The profile of one parameter.

  Args:
    estimate: the table and its law.
    theta: the optimum, in the solver's parameters.
    name: one of `estimate.boxed`.
    values: natural values to hold it at; those outside the bounds are left
      out.

  Returns:
    Natural parameters [values, parameters], the objective, and the deviance.

  Raises:
    ValueError: a coefficient has no profile while its exponent is free.
  """
  if name not in estimate.boxed:
    raise ValueError(f"no profile of {name!r}: only of "
                     f"{', '.join(estimate.boxed)} (a coefficient has none of "
                     "its own while its exponent is free)")
  k = estimate.law.parameters.index(name)
  ends = [estimate.natural(side)[k] for side in (estimate.low, estimate.high)]
  values = np.asarray(values, np.float64)
  values = values[(values > ends[0]) & (values < ends[1])]
  held = np.tile(estimate.natural(theta), (len(values), 1))
  held[:, k] = values
  held = estimate.theta(held)[:, k]
  # The terms' sizes at the centre stay, whatever the exponent.
  start = np.tile(theta, (len(values), 1))
  start[:, k] = held
  low, high = (np.tile(b, (len(values), 1))
               for b in (estimate.low, estimate.high))
  low[:, k] = high[:, k] = held
  # And once with nothing held: the minimum that the profile rises from.
  start, low, high = (np.concatenate([rows, free[None]]) for rows, free in (
      (start, theta), (low, estimate.low), (high, estimate.high)))
  found = estimate.solve(start, estimate.weights, _smooth(estimate),
                         (low, high), _ITERATIONS)
  *objective, lowest = found.objective
  objective = np.array(objective)
  return (estimate.natural(found.theta[:-1]), objective * estimate.scale**2,
          deviance(estimate, theta, objective - lowest))


def grid(estimate: estimate_lib.Estimate, theta: FloatArray, name: str,
         level: float, points: int = _POINTS) -> FloatArray:
  """Values about an estimate, evenly in ratio, over and times a reach; where
  zero and less are allowed too, evenly over some standard errors."""
  at = estimate.law.parameters.index(name)
  value = float(estimate.natural(theta)[at])
  if estimate.natural(estimate.low)[at] > 0:
    return value * _REACH ** np.linspace(-1, 1, points)
  error = _standard_error(estimate, theta, at)
  reach = max(_ERRORS * np.sqrt(limit(estimate, level)) * error,
              0.75 * abs(value), 1e-9) if np.isfinite(error) else abs(value)
  return value + reach * np.linspace(-1, 1, points)


def deviance(estimate: estimate_lib.Estimate, theta: FloatArray,
             excess: FloatArray) -> FloatArray:
  """An excess of the objective over its minimum (in units of the target), on
  the scale of an F statistic of one parameter and the degrees of freedom of
  the residuals.

  Heritier and Ronchetti 1994, doi:10.1080/01621459.1994.10476822: twice
  E[psi'] / E[psi^2] times the excess; of squares this is the F test. E[psi']
  counts residuals within a bandwidth, which Huber's delta may be too narrow
  for.
  """
  residual = estimate.residuals(theta) / estimate.scale
  count, spare = len(residual), len(residual) - len(estimate.free)
  if spare < 1:
    return np.full_like(excess, np.nan)
  largest = np.abs(residual).max() + 1e-300
  spread = 1.4826 * np.median(np.abs(residual))
  delta = min(_smooth(estimate), largest)
  reach = min(max(delta, spread * count ** -0.2), largest)
  inside = estimate.weights * (np.abs(residual) <= reach)
  slope = np.sum(inside) * delta / reach
  square = np.sum(estimate.weights**2 * np.clip(residual, -delta, delta)**2)
  return 2 * np.maximum(excess, 0.0) * slope / (square + 1e-300) * spare / count


def limit(estimate: estimate_lib.Estimate, level: float) -> float:
  """What the deviance of the truth stays below so often."""
  spare = len(estimate.target) - len(estimate.free)
  return float(stats.f.ppf(level, 1, spare)) if spare > 0 else np.inf


def interval(estimate: estimate_lib.Estimate, theta: FloatArray, name: str,
             level: float) -> tuple[float | None, float | None]:
  """Where the deviance passes its limit; None for an end that lies beyond the
  reach of the profile, or outside the bounds."""
  at = estimate.law.parameters.index(name)
  centre = float(estimate.natural(theta)[at])
  bar = limit(estimate, level)
  values = grid(estimate, theta, name, level)
  for _ in range(2):  # the second time between the ends of the first
    natural, _, height = curve(estimate, theta, name, values)
    ends = [_crossing(natural[:, at], height, centre, bar, side)
            for side in (-1, 1)]
    if ends == [None, None]:
      break
    values = np.concatenate([
        np.linspace(inner[0], outer[0], _POINTS // 2)
        for inner, outer in filter(None, ends)])
  return tuple(None if end is None else _between(*end, bar) for end in ends)


# --- Details -----------------------------------------------------------------


def _standard_error(estimate: estimate_lib.Estimate, theta: FloatArray,
                    at: int) -> float:
  """Of one parameter, by the law's slopes: how far a profile has to look."""
  natural = estimate.natural(theta)
  slopes = estimate.law.gradient(natural, estimate.axes)
  if estimate.log:
    slopes = slopes / estimate.law.predict(natural, estimate.axes)
  free = [estimate.law.parameters.index(name) for name in estimate.free]
  spare = len(estimate.target) - len(free)
  if spare < 1:
    return np.inf
  weights = estimate.weights / estimate.weights.mean()
  variance = np.sum(weights * estimate.residuals(theta)**2) / spare
  slopes = slopes[free]
  size = np.sqrt(np.mean(slopes**2, axis=1)) + 1e-300
  slopes = slopes / size[:, None]
  inverse = np.linalg.pinv((slopes * weights) @ slopes.T)
  k = free.index(at)
  return float(np.sqrt(variance * max(inverse[k, k], 0.0)) / size[k])


def _smooth(estimate: estimate_lib.Estimate) -> float:
  """The delta of profiles: a narrower one has no curvature to speak of."""
  return estimate.deltas[0]


def _crossing(
    values: FloatArray, height: FloatArray, centre: float, bar: float,
    side: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
  """(value, deviance) before and after the bar is first passed."""
  inner = (centre, 0.0)
  for k in np.argsort(side * values):
    if side * (values[k] - centre) <= 0:
      continue
    outer = (float(values[k]), float(height[k]))
    if outer[1] > bar:
      return inner, outer
    inner = outer
  return None


def _between(inner: tuple[float, float], outer: tuple[float, float],
             bar: float) -> float:
  """Where the deviance's root, nearly straight, is that of the bar."""
  low, high = np.sqrt(inner[1]), np.sqrt(outer[1])
  return float(inner[0] + (outer[0] - inner[0]) * (np.sqrt(bar) - low)
               / (high - low))
