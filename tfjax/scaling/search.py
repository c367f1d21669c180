# SPDX-License-Identifier: Apache-2.0
"""One-dimensional minima and roots of many problems at once.

For laws whose frontier has no closed form: every bootstrap sample is a
problem. The arrays keep one shape throughout, which is what JAX compiles for.
"""

from typing import Callable

import numpy as np

from tfjax.scaling.forms import FloatArray

Function = Callable[[FloatArray], FloatArray]

_GOLDEN = (5**0.5 - 1) / 2


def minimise(function: Function, low: FloatArray, high: FloatArray,
             points: int = 96, steps: int = 44) -> FloatArray:
  """Where each function is least between low and high.

  A grid of `points` finds the lowest valley, golden-section search its floor,
  to 1e-9 of a grid step. Infinite values are walls.

  Args:
    function: elementwise, of an array of the shape of low and high.

  Returns:
    NaN where the least value of the grid is at one of its ends, or none is
    finite: then the minimum is not between low and high.
  """
  low, high = np.broadcast_arrays(low, high)
  step = (high - low) / (points - 1)
  least, best = np.full(low.shape, np.inf), np.zeros(low.shape)
  for k in range(points):
    value = _walled(function(low + k * step))
    lower = value < least
    least, best = np.where(lower, value, least), np.where(lower, k, best)
  inside = np.isfinite(least) & (best > 0) & (best < points - 1)
  a, b = low + (best - 1) * step, low + (best + 1) * step
  c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
  at_c, at_d = _walled(function(c)), _walled(function(d))
  for _ in range(steps):
    left = at_c < at_d
    a, b = np.where(left, a, c), np.where(left, d, b)
    kept, at_kept = np.where(left, c, d), np.where(left, at_c, at_d)
    fresh = np.where(left, b - _GOLDEN * (b - a), a + _GOLDEN * (b - a))
    at_fresh = _walled(function(fresh))
    c, d = np.where(left, fresh, kept), np.where(left, kept, fresh)
    at_c = np.where(left, at_fresh, at_kept)
    at_d = np.where(left, at_kept, at_fresh)
  return np.where(inside, (a + b) / 2, np.nan)


def first_below(function: Function, target: FloatArray, low: float,
                high: float, steps: int = 52) -> FloatArray:
  """Where each falling function reaches the target, by bisection.

  Returns:
    inf where it is above the target even at high; NaN where it is at or below
    the target already at low, or is itself NaN.
  """
  shape = np.shape(target)
  at_high = function(np.full(shape, high))
  at_low = function(np.full(shape, low))
  left, right = np.full(shape, low), np.full(shape, high)
  for _ in range(steps):
    middle = (left + right) / 2
    above = function(middle) > target
    left, right = np.where(above, middle, left), np.where(above, right, middle)
  found = np.where(at_high > target, np.inf, (left + right) / 2)
  unknown = np.isnan(at_high) | ~(at_low > target)
  return np.where(unknown, np.nan, found)


def _walled(value: FloatArray) -> FloatArray:
  return np.where(np.isfinite(value), value, np.inf)
