# SPDX-License-Identifier: Apache-2.0
"""Variable projection: least squares over a whole grid of exponents at once.

Where a law is a sum of terms, coefficients are linear in it once the exponents
are given, and least squares of linear residuals has them in closed form (Golub
and Pereyra 1973; for scaling laws Czech et al. 2026, arXiv:2603.22339). What
remains is a search over two exponents, done here without a start of any kind.
"""

import dataclasses

import numpy as np
from scipy import optimize

from tfjax.scaling import forms
from tfjax.scaling.forms import FloatArray

_CHUNK = 256  # exponents of the first axis a product, to stay in the cache


@dataclasses.dataclass(frozen=True)
class Projection:
  """The best cell of the grid, and the sum of squared residuals there."""

  natural: FloatArray  # [parameters] of the law
  objective: float
  at_edge: tuple[str, ...]  # exponents that lie at an end of their grid


def applies(law: forms.Law) -> bool:
  """Whether a law is a constant and one power of each of two axes."""
  powers = [t for t in law.terms if t.exponents]
  return (len(law.terms) == 3 and len(law.constants) == 1 and len(powers) == 2
          and len(law.exponents) == 2
          and all(len(t.exponents) == 1 for t in powers))


def search(law: forms.Law, axes: dict[str, FloatArray], target: FloatArray,
           weights: FloatArray, exponents: FloatArray) -> Projection:
  """Least squares of target - law at every pair of exponents of a grid.

  Cells where a coefficient would be negative are passed over: at the edge of
  what is allowed another cell's is zero.

  Args:
    law: one that `applies`.
    axes: [rows] of each axis.
    target: [rows].
    weights: [rows] of the squares.
    exponents: the grid of both exponents, in increasing order.

  Raises:
    ValueError: the law has another shape.
  """
  if not applies(law):
    raise ValueError(f"law {law.name!r} is not a constant and one power of "
                     "each of two axes")
  one, other = (t for t in law.terms if t.exponents)
  bases = [_powers(axes, term, exponents) for term in (one, other)]
  moments = _Moments(*bases, target, weights)
  lowest, place = np.inf, (0, 0)
  for start in range(0, len(exponents), _CHUNK):
    values = moments.residual(slice(start, start + _CHUNK))
    k = int(np.argmin(values))
    if values.flat[k] < lowest:
      row, column = np.unravel_index(k, values.shape)
      lowest, place = float(values.flat[k]), (start + int(row), int(column))
  design = np.stack([np.ones_like(target), bases[0][place[0]],
                     bases[1][place[1]]], axis=1)
  root = np.sqrt(weights)
  coefficients, norm = optimize.nnls(design * root[:, None], target * root)
  found = dict(zip((law.constants[0], one.coefficient, other.coefficient),
                   coefficients))
  names = [next(iter(t.exponents.values())) for t in (one, other)]
  found |= {name: exponents[k] for name, k in zip(names, place)}
  return Projection(
      np.array([found[name] for name in law.parameters]), float(norm**2),
      tuple(name for name, k in zip(names, place)
            if k in (0, len(exponents) - 1)))


class _Moments:
  """Weighted inner products of 1, x_i, y_j and the target, for all i and j."""

  def __init__(self, x: FloatArray, y: FloatArray, target: FloatArray,
               weights: FloatArray):
    total = weights.sum()
    share = weights / total
    self._means = x @ share, y @ share, float(target @ share)
    # About their means the constant drops out, and so does cancellation.
    x = x - (x @ share)[:, None]
    y = y - (y @ share)[:, None]
    target = target - target @ share
    self._x, self._y = x * weights, y
    self._xx, self._yy = (x**2) @ weights, (y**2) @ weights
    self._xt, self._yt = (x * weights) @ target, (y * weights) @ target
    self._tt = float(target**2 @ weights)

  def residual(self, rows: slice) -> FloatArray:
    """[rows, columns] sum of squares that is left; inf where a coefficient
    would be negative."""
    cross = self._x[rows] @ self._y.T
    xx, xt = self._xx[rows, None], self._xt[rows, None]
    yy, yt = self._yy, self._yt
    determinant = xx * yy - cross**2
    a = xt * yy - yt * cross
    b = yt * xx - xt * cross
    with np.errstate(divide="ignore", invalid="ignore"):
      left = self._tt - (a * xt + b * yt) / determinant
    x, y, target = self._means
    constant = target * determinant - a * x[rows, None] - b * y
    good = ((determinant > 1e-12 * xx * yy) & (a >= 0) & (b >= 0)
            & (constant >= 0))
    return np.where(good, left, np.inf)


def _powers(axes: dict[str, FloatArray], term: forms.Term,
            exponents: FloatArray) -> FloatArray:
  """[exponents, rows] of a term's axis."""
  (axis, _, factor), = term.powers()
  return np.exp(factor * exponents[:, None] * np.log(axes[axis]))
