# SPDX-License-Identifier: Apache-2.0
"""One table under one law: its optimum, resamples and profiles.

Stands between natural parameters, which a reader knows, and the solver's own,
in which the problem is well-conditioned: axes are divided by their geometric
means, targets by their smallest, and scales of unknown size are logarithms.
What a result means is judged in `fit`.
"""

import dataclasses
import functools
import itertools
from typing import Mapping

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import stats

from tfjax.scaling import forms
from tfjax.scaling import solver
from tfjax.scaling import varpro
from tfjax.scaling.forms import FloatArray

OBJECTIVES = ("huber", "absolute", "squares")

_START_COEFFICIENTS = (0.03, 0.1, 0.3)  # shares of the smallest target
_START_CONSTANT = (0.3, 0.6, 0.9)
_EXPONENTS = np.arange(1, 301) / 100  # where they are searched, not started
_MOST_STARTS = 1024  # of the law's own grid; a caller's is taken whole
_SAME_OBJECTIVE = 1e-4  # relative, for the share of starts at the best
_RIVAL_OBJECTIVE = 1e-2  # relative, for another optimum as good
_SAME_OPTIMUM = 0.01  # relative, of every parameter
_MOST_OPTIMA = 8
# Huber's loss with a smaller delta than this has many shallow optima and no
# curvature: it is reached from a larger delta by steps of ten.
_SMOOTH_DELTA = 1e-3
_ABSOLUTE_DELTA = 1e-8
_ITERATIONS, _PASSING = 400, 48  # of the solver; the latter on the way
_PROFILE_ITERATIONS = 96  # far from the estimate a profile is only a bound
_PROFILE_REACH = 4.0  # profiles span the estimate over and times this
_NOTHING = 1e-20  # objectives of exact data are rounding; they count as equal


@dataclasses.dataclass(frozen=True)
class Best:
  """The lowest of all starts, and the other optima that came near it."""

  theta: FloatArray
  objective: float
  converged: bool
  starts: int
  share_at_best: float
  rivals: FloatArray  # [optima, parameters], lowest first, without the best
  rival_objectives: FloatArray


class Estimate:
  """Residuals of the rows of one table under one law."""

  def __init__(
      self,
      law: forms.Law,
      rows: pd.DataFrame,
      *,
      objective: str,
      delta: float,
      space: str,
      fixed: Mapping[str, float],
      starts: Mapping[str, FloatArray] | None,
  ):
    self.law, self.rows, self.objective = law, rows, objective
    self.log = space == "log"
    self.weights = rows["weight"].to_numpy(np.float64)
    self.axes = {a: rows[a].to_numpy(np.float64) for a in law.axes}
    target = rows[law.target].to_numpy(np.float64)
    self.unit = float(target.min()) if law.terms else 1.0
    self.target = target / self.unit
    self.centre = {a: float(np.log(v).mean()) if law.terms else 0.0
                   for a, v in self.axes.items()}
    self.inputs = {a: np.log(v) - self.centre[a] if law.terms else v
                   for a, v in self.axes.items()}
    # Linear residuals are in units of the target.
    self._scale = 1.0 if self.log else self.unit
    self.delta = {"huber": delta, "squares": np.inf,
                  "absolute": _ABSOLUTE_DELTA}[objective] / self._scale
    self.fixed = {law.parameters.index(name): value
                  for name, value in fixed.items()}
    self._starts = starts
    self.low, self.high = self._bounds()

  def of(self, rows: pd.DataFrame) -> "Estimate":
    """The same of other rows."""
    return Estimate(
        self.law, rows, objective=self.objective, delta=self.delta * self._scale
        if self.objective == "huber" else 0.0,
        space="log" if self.log else "linear", starts=self._starts,
        fixed={self.law.parameters[k]: v for k, v in self.fixed.items()})

  # --- Natural parameters and the solver's ----------------------------------

  @property
  def free(self) -> tuple[str, ...]:
    return tuple(name for k, name in enumerate(self.law.parameters)
                 if k not in self.fixed)

  @property
  def boxed(self) -> tuple[str, ...]:
    """Free parameters that the solver can hold at a natural value: all but
    coefficients of terms whose exponents are free."""
    return tuple(name for name in self.free if not self._mixed(name))

  def natural(self, theta: FloatArray) -> FloatArray:
    """[..., parameters] as the law's form has them."""
    made = np.array(theta, np.float64)
    if self.law.terms:
      made[..., :len(self.law.terms)] *= self.unit * np.exp(self._shift(made))
    for k, parameter in enumerate(self.law.free):
      if parameter.log:
        made[..., k] = np.exp(made[..., k])
    for k, value in self.fixed.items():
      made[..., k] = value  # to the digit, as it was given
    return made

  def theta(self, natural: FloatArray) -> FloatArray:
    made = np.array(natural, np.float64)
    if self.law.terms:
      made[..., :len(self.law.terms)] /= self.unit * np.exp(self._shift(made))
    for k, parameter in enumerate(self.law.free):
      if parameter.log:
        made[..., k] = np.log(made[..., k])
    return made

  # --- Solving --------------------------------------------------------------

  def best(self) -> Best:
    """The optimum over a grid of starts."""
    starts = self._grid()
    if (self.objective == "squares" and not self.log and not self.fixed
        and varpro.applies(self.law)):  # Needs no start to find its own.
      found = varpro.search(self.law, self.axes, self.target * self.unit,
                            self.weights, _EXPONENTS)
      starts = np.concatenate([starts, self.theta(found.natural)[None]])
    ends = self._solve(starts, self.weights, self._deltas()[0])
    lowest = np.min(ends.objective)
    near = self._near(ends.objective, lowest, _SAME_OBJECTIVE)
    share = float(near.mean())
    kept = self._distinct(ends, lowest)
    theta, objective = ends.theta[kept], ends.objective[kept]
    converged = ends.converged[kept]
    for delta in self._deltas()[1:]:
      ends = self._solve(theta, self.weights, delta)
      theta, objective, converged = ends.theta, ends.objective, ends.converged
    order = np.argsort(objective, kind="stable")
    theta, objective = theta[order], objective[order]
    rival = converged[order] & self._near(
        objective, objective[0], _RIVAL_OBJECTIVE)
    rival[0] = False
    return Best(theta[0], self.reported(theta[0]), bool(converged[order[0]]),
                len(starts), share, theta[rival],
                np.array([self.reported(t) for t in theta[rival]]))

  def refit(self, near: FloatArray, count: int = 100) -> solver.Solution:
    """The optimum from a handful of starts and one that is near it."""
    grid = self._grid()
    some = grid[np.linspace(0, len(grid) - 1, count).astype(int)]
    ends = self._descend(np.concatenate([near[None], some]), self.weights)
    lowest = np.argmin(ends.objective)
    return solver.Solution(*(part[lowest] for part in (
        ends.theta, ends.objective, ends.converged)))

  def resampled(self, counts: FloatArray,
                optima: FloatArray) -> FloatArray:
    """Natural parameters [S, parameters] of [S, rows] times that each row was
    drawn; from every optimum, and the lower one taken."""
    ends = [self._descend(np.tile(theta, (len(counts), 1)),
                          counts * self.weights) for theta in optima]
    lowest = np.argmin([e.objective for e in ends], axis=0)
    every = np.stack([e.theta for e in ends])
    return self.natural(every[lowest, np.arange(len(counts))])

  @property
  def _smooth(self) -> float:
    """The delta of profiles: a narrower one has no curvature to speak of."""
    return self._deltas()[0]

  def profiled(self, theta: FloatArray, name: str,
               values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Natural parameters and the objective, one parameter held at each of the
    natural `values` in turn and the others at their best."""
    if name not in self.boxed:
      raise ValueError(f"no profile of {name!r}: only of "
                       f"{', '.join(self.boxed)} (a coefficient has none of "
                       "its own while its exponent is free)")
    k = self.law.parameters.index(name)
    held = np.tile(self.natural(theta), (len(values), 1))
    held[:, k] = values
    held = self.theta(held)[:, k]
    # The terms' sizes at the centre stay, whatever the exponent.
    start = np.tile(theta, (len(values), 1))
    start[:, k] = held
    low, high = (np.tile(b, (len(values), 1)) for b in (self.low, self.high))
    low[:, k] = high[:, k] = held
    ends = self._solve(start, self.weights, self._smooth, (low, high),
                       _PROFILE_ITERATIONS)
    return self.natural(ends.theta), ends.objective * self._scale**2

  def profile(self, theta: FloatArray, name: str, values: FloatArray
              ) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The same, with the deviance, for values within the bounds."""
    at = self.law.parameters.index(name)
    low, high = (self._natural_bound(at, side) for side in (
        self.low, self.high))
    values = values[(values > low) & (values < high)]
    natural, objective = self.profiled(theta, name, values)
    return natural, objective, self.deviance(
        theta, objective - self._lowest(theta))

  def profile_grid(self, value: float, points: int) -> FloatArray:
    """Values about an estimate, evenly in ratio, over and times a reach."""
    ratios = _PROFILE_REACH ** np.linspace(-1, 1, points)
    return value + abs(value) * (ratios - 1)

  def deviance(self, theta: FloatArray, excess: FloatArray) -> FloatArray:
    """An excess of the objective over its minimum on chi-squared's scale, one
    degree of freedom.

    The likelihood-ratio-type test of M-estimators (Heritier and Ronchetti
    1994): 2 E[psi'] / E[psi^2] times the excess. E[psi'] counts residuals
    within a bandwidth, which Huber's delta may be too narrow for.
    """
    residual = self.residuals(theta) / self._scale
    count, spare = len(residual), len(residual) - len(self.free)
    if spare < 1:
      return np.full_like(excess, np.nan)
    largest = np.abs(residual).max() + 1e-300
    spread = 1.4826 * np.median(np.abs(residual))
    delta = min(self._smooth, largest)
    reach = min(max(delta, spread * count ** -0.2), largest)
    slope = np.sum(self.weights * (np.abs(residual) <= reach)) * delta / reach
    square = np.sum(self.weights**2 * np.clip(residual, -delta, delta)**2)
    excess = np.maximum(excess, 0.0) / self._scale**2
    return 2 * excess * slope / (square + 1e-300) * spare / count

  def profile_interval(
      self, theta: FloatArray, name: str, level: float, points: int = 25
  ) -> tuple[float | None, float | None]:
    """Where the profile's deviance crosses chi-squared's quantile; None for an
    end that lies beyond the reach of the profile, or outside the bounds."""
    at = self.law.parameters.index(name)
    value = self.natural(theta)[at]
    lowest = self._lowest(theta)
    limit = stats.chi2.ppf(level, 1)
    grid = self.profile_grid(value, points)
    values = grid[(grid > self._natural_bound(at, self.low))
                  & (grid < self._natural_bound(at, self.high))]
    for _ in range(3):  # each round a tenth as wide
      _, objective = self.profiled(theta, name, values)
      deviance = self.deviance(theta, objective - lowest)
      ends = [self._crossing(values, deviance, value, limit, side)
              for side in (-1, 1)]
      inner = [np.linspace(*end, 6)[1:-1] for end in ends if end is not None]
      if not inner:
        break
      values = np.unique(np.concatenate(
          [*inner, *(e for e in ends if e is not None)]))
    return tuple(None if e is None else float(np.mean(e)) for e in ends)

  def residuals(self, theta: FloatArray) -> FloatArray:
    """[rows] measured less predicted: of logs, or in units of the target."""
    predicted = self.law.predict(self.natural(theta), self.axes)
    measured = self.target * self.unit
    if self.log:
      return np.log(measured) - np.log(predicted)
    return measured - predicted

  def reported(self, theta: FloatArray) -> float:
    """The objective as its name says: sum of Huber's loss, |r| or r^2."""
    residual = self.residuals(theta)
    if self.objective == "absolute":
      return float(np.sum(self.weights * np.abs(residual)))
    if self.objective == "squares":
      return float(np.sum(self.weights * residual**2))
    size = np.abs(residual)
    inside = np.minimum(size, self.delta * self._scale)
    return float(np.sum(self.weights * inside * (size - inside / 2)))

  def at_bound(self, theta: FloatArray) -> dict[str, str]:
    """Free parameters at an end of their range, and which end."""
    return {name: "lower" if theta[k] <= self.low[k] else "upper"
            for k, name in enumerate(self.law.parameters)
            if k not in self.fixed
            and not self.low[k] < theta[k] < self.high[k]}

  # --- Details --------------------------------------------------------------

  def _lowest(self, theta: FloatArray) -> float:
    """The minimum that profiles rise from."""
    end = self._solve(theta[None], self.weights, self._smooth)
    return float(end.objective[0]) * self._scale**2

  def _deltas(self) -> list[float]:
    deltas = [self.delta]
    while deltas[0] * 10 <= _SMOOTH_DELTA * 1.001:
      deltas.insert(0, deltas[0] * 10)
    return deltas

  def _descend(self, start: FloatArray, weights: FloatArray,
               bounds: tuple[FloatArray, FloatArray] | None = None
               ) -> solver.Solution:
    *passed, last = self._deltas()
    for delta in passed:
      start = self._solve(start, weights, delta, bounds, _PASSING).theta
    return self._solve(start, weights, last, bounds)

  def _solve(self, start: FloatArray, weights: FloatArray, delta: float,
             bounds: tuple[FloatArray, FloatArray] | None = None,
             iterations: int = _ITERATIONS) -> solver.Solution:
    return solver.minimise(
        _form(self.law), self.log, self.inputs, self.target, weights, start,
        bounds or (self.low, self.high), delta, iterations)

  def _mixed(self, name: str) -> bool:
    return any(term.coefficient == name and any(
        e in self.free for e in term.exponents.values())
        for term in self.law.terms)

  def _shift(self, values: FloatArray) -> FloatArray:
    """[..., terms] log of a coefficient, less that of its term's size at the
    centre of the data, for exponents in `values`."""
    at = self.law.parameters.index
    return np.stack([
        -sum((factor * values[..., at(name)] * self.centre[axis]
              for axis, name, factor in term.powers()),
             np.zeros(values.shape[:-1]))
        for term in self.law.terms], axis=-1)

  def _bounds(self) -> tuple[FloatArray, FloatArray]:
    if self.law.terms:
      count = len(self.law.exponents)
      sides = [np.array([share] * len(self.law.terms) + [end] * count)
               for share, end in zip(self.law.share_bounds,
                                     self.law.exponent_bounds)]
    else:
      sides = [np.array([getattr(p, side) for p in self.law.free])
               for side in ("low", "high")]
      sides = [self.theta(side) for side in sides]
    if self.fixed:
      held = np.array([1.0] * len(self.law.parameters))
      for k, value in self.fixed.items():
        held[k] = value
      held = self.theta(held)
      for k in self.fixed:
        sides[0][k] = sides[1][k] = held[k]
    return sides[0], sides[1]

  def _natural_bound(self, at: int, side: FloatArray) -> float:
    return float(self.natural(side)[at])

  def _grid(self) -> FloatArray:
    """[starts, parameters], within the bounds."""
    named = self._starts or {}
    if self.law.terms:
      own = [_START_COEFFICIENTS if term.exponents else _START_CONSTANT
             for term in self.law.terms]
      own += [self.law.exponent_starts] * len(self.law.exponents)
    else:
      own = [p.starts for p in self.law.free]
      own = [np.log(v) if p.log else v for p, v in zip(self.law.free, own)]
    own = [(self.low[k],) if k in self.fixed else values
           for k, values in enumerate(own)]
    if set(named) >= set(self.free):
      grid = _product([np.asarray(named[name]) if name in named else (1.0,)
                       for name in self.law.parameters])
      for k, value in self.fixed.items():
        grid[:, k] = value
      grid = self.theta(grid)
    else:
      grid = _product(own, _MOST_STARTS)
      for name, values in named.items():  # natural values of some
        grid = np.concatenate([self._with(grid, name, v) for v in values])
    return np.clip(grid, self.low, self.high)

  def _with(self, grid: FloatArray, name: str, value: float) -> FloatArray:
    k = self.law.parameters.index(name)
    natural = self.natural(grid)
    natural[:, k] = value
    made = grid.copy()
    made[:, k] = self.theta(natural)[:, k]
    return np.unique(made, axis=0)

  def _near(self, objective: FloatArray, lowest: float,
            tolerance: float) -> np.ndarray:
    return objective <= lowest * (1 + tolerance) + _NOTHING

  def _distinct(self, ends: solver.Solution, lowest: float) -> np.ndarray:
    """Indices of a few optima that differ, lowest first."""
    kept: list[int] = []
    scale = np.abs(self.high - self.low)
    for k in np.argsort(ends.objective, kind="stable"):
      if kept and not (ends.converged[k] and self._near(
          ends.objective[k], lowest, 10 * _RIVAL_OBJECTIVE)):
        continue
      size = np.maximum(np.abs(ends.theta[k]), 1e-3 * scale) + 1e-12
      if all(np.max(np.abs(ends.theta[k] - ends.theta[j]) / size)
             > _SAME_OPTIMUM for j in kept):
        kept.append(int(k))
      if len(kept) == _MOST_OPTIMA:
        break
    return np.array(kept)

  def _crossing(self, values: FloatArray, deviance: FloatArray, centre: float,
                limit: float, side: int) -> tuple[float, float] | None:
    """Neighbours between which the deviance first passes the limit."""
    inner = centre
    order = np.argsort(side * values)
    for k in order:
      if side * (values[k] - centre) <= 0:
        continue
      if deviance[k] > limit:
        return (inner, float(values[k]))
      inner = float(values[k])
    return None


@functools.cache
def _form(law: forms.Law) -> solver.Form:
  """The law in the solver's parameters; one object a law, so that it is
  compiled once."""
  at = law.parameters.index
  if law.terms:
    def form(theta, logs):
      total = 0.0
      for j, term in enumerate(law.terms):
        powers = [factor * theta[at(name)] * logs[axis]
                  for axis, name, factor in term.powers()]
        total = total + theta[j] * (jnp.exp(sum(powers)) if powers else 1.0)
      rows = next(iter(logs.values())).shape
      return jnp.broadcast_to(total, rows)
  else:
    def form(theta, axes):
      values = {p.name: jnp.exp(theta[k]) if p.log else theta[k]
                for k, p in enumerate(law.free)}
      rows = next(iter(axes.values())).shape
      return jnp.broadcast_to(law.function(values, axes), rows)
  return form


def _product(values: list[FloatArray], most: int | None = None) -> FloatArray:
  """Every combination; or so many of them, drawn evenly at random."""
  count = int(np.prod([len(v) for v in values], dtype=np.int64))
  if most is None or count <= most:
    return np.array(list(itertools.product(*values)), np.float64)
  chosen = np.random.default_rng(0).choice(count, most, replace=False)
  places = np.unravel_index(np.sort(chosen), [len(v) for v in values])
  return np.stack([np.asarray(v, np.float64)[p]
                   for v, p in zip(values, places)], axis=-1)
