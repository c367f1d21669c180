# SPDX-License-Identifier: Apache-2.0
"""One table under one law: its optimum, and those of resamples.

Stands between natural parameters, which a reader knows, and the solver's own,
in which the problem is well-conditioned: axes are divided by their geometric
means, targets by their smallest, and scales of unknown size are logarithms.
Profiles are in `profile`; what a result means is decided in `judge`.
"""

import dataclasses
import functools
import itertools
from typing import Mapping

import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import special

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
    # Residuals that are not of logarithms may be of targets of any sign.
    least = target.min() if target.min() > 0 else np.abs(target).max()
    self.unit = float(least) if law.terms else 1.0
    self.target = target / self.unit
    self.centre = {a: float(np.log(v).mean()) if law.terms else 0.0
                   for a, v in self.axes.items()}
    self.inputs = {a: np.log(v) - self.centre[a] if law.terms else v
                   for a, v in self.axes.items()}
    # Linear residuals are in units of the target.
    self.scale = 1.0 if self.log else self.unit
    # What is a small residual depends on the target's size, but of logarithms.
    self._typical = 1.0 if self.log else float(np.median(np.abs(self.target)))
    self.delta = {"huber": delta / self.scale, "squares": np.inf,
                  "absolute": _ABSOLUTE_DELTA * self._typical}[objective]
    self.fixed = {law.parameters.index(name): value
                  for name, value in fixed.items()}
    self._starts = starts
    self.low, self.high = self._bounds()

  def of(self, rows: pd.DataFrame) -> "Estimate":
    """The same of other rows."""
    return Estimate(
        self.law, rows, objective=self.objective, delta=self.delta * self.scale
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
    ends = self.solve(starts, self.weights, self.deltas[0])
    lowest = np.min(ends.objective)
    near = self._near(ends.objective, lowest, _SAME_OBJECTIVE)
    share = float(near.mean())
    kept = self._distinct(ends, lowest)
    theta, objective = ends.theta[kept], ends.objective[kept]
    converged = ends.converged[kept]
    for delta in self.deltas[1:]:
      ends = self.solve(theta, self.weights, delta)
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
  def deltas(self) -> list[float]:
    """Ever narrower, to this estimate's own: one solves from the last."""
    deltas = [self.delta]
    while deltas[0] * 10 <= _SMOOTH_DELTA * self._typical * 1.001:
      deltas.insert(0, deltas[0] * 10)
    return deltas

  def solve(self, start: FloatArray, weights: FloatArray, delta: float,
            bounds: tuple[FloatArray, FloatArray] | None = None,
            iterations: int = _ITERATIONS) -> solver.Solution:
    """Minimises within the bounds; the objective in units of the target."""
    return solver.minimise(
        _form(self.law), self.log, self.inputs, self.target, weights, start,
        bounds or (self.low, self.high), delta, iterations)

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
    return float(np.sum(self.weights * special.huber(
        self.delta * self.scale, residual)))

  def at_bound(self, theta: FloatArray) -> dict[str, str]:
    """Free parameters at an end of their range, and which end."""
    return {name: "lower" if theta[k] <= self.low[k] else "upper"
            for k, name in enumerate(self.law.parameters)
            if k not in self.fixed
            and not self.low[k] < theta[k] < self.high[k]}

  # --- Details --------------------------------------------------------------

  def _descend(self, start: FloatArray, weights: FloatArray,
               bounds: tuple[FloatArray, FloatArray] | None = None
               ) -> solver.Solution:
    *passed, last = self.deltas
    for delta in passed:
      start = self.solve(start, weights, delta, bounds, _PASSING).theta
    return self.solve(start, weights, last, bounds)

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
