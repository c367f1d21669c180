# SPDX-License-Identifier: Apache-2.0
"""Fits a law of `laws` to a table of runs, and says how far to trust it.

Which rows may be used is decided in `table`; the minimiser is in `solver`;
what comes out is a `result.Fit`. `tfjax.scaling.fit` is the function.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pandas as pd

from tfjax.scaling import frontier
from tfjax.scaling import laws
from tfjax.scaling import result
from tfjax.scaling import solver
from tfjax.scaling import table

FloatArray = np.ndarray

# An exponent or constant with an interval wider than this is not determined.
WIDEST_INTERVAL = 2.0
# A term whose axis takes fewer values than it has unknowns cannot be found:
# a curve E + A / N^alpha needs three.
_LEAST_VALUES = 3
_COLLINEAR = 0.999  # |correlation| of log N and log D
_SAME_OBJECTIVE = 1e-4  # relative, for the share of starts at the best
_RIVAL_OBJECTIVE = 1e-2  # relative, for another optimum as good

_START_COEFFICIENTS = (0.03, 0.1, 0.3)  # shares of the median loss
_START_CONSTANT = (0.3, 0.6, 0.9)  # shares of the smallest loss
_START_EXPONENTS = (0.1, 0.3, 0.6, 1.0)


def fit(
    frame: pd.DataFrame,
    law: str = "chinchilla",
    *,
    params: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    delta: float = 1e-3,
    holdout: int = 0,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> result.Fit:
  """Fits a law to a table of runs: Huber's loss of log residuals, summed.

  Args:
    frame: one row a run, with params, tokens and loss; from `records.load`,
      or any table. Rows that cannot be used are listed in the result.
    law: a name in `laws.LAWS`.
    params: the column that is N; unset: params_total, or params.
    tokens: the column that is D; unset: tokens_seen, or tokens.
    flops: the column that is C; unset: flops_total, or flops, or neither.
    delta: log residual beyond which Huber's loss grows linearly.
    holdout: so many runs with the most FLOPs are predicted, not fitted.
    bootstrap: resamples of the runs for the intervals.
    level: coverage of the percentile intervals.
    seed: of the resamples.

  Raises:
    table.TableError: a column is missing, losses are not comparable, or there
      are too few rows.
    ValueError: an argument is out of range.
  """
  _check(delta > 0, "delta", delta, "positive")
  _check(holdout >= 0, "holdout", holdout, "at least 0")
  _check(bootstrap >= 100, "bootstrap", bootstrap, "at least 100")
  _check(0 < level < 1, "level", level, "between 0 and 1")
  known_law = laws.get(law)
  usable = table.prepare(frame, params=params, tokens=tokens, flops=flops,
                         holdout=holdout)
  rows = usable.fitted
  settings = dict(law=law, params=usable.conventions["params"],
                  tokens=usable.conventions["tokens"],
                  flops=usable.conventions["flops"], delta=delta,
                  holdout=holdout, bootstrap=bootstrap, level=level, seed=seed)
  estimate = _Estimate(known_law, rows, delta)
  solution, starts = estimate.best()
  samples = estimate.resample(solution.theta, bootstrap, seed)
  verdict = _judge(estimate, solution, samples, level)
  natural = estimate.natural(solution.theta)
  residuals = np.log(rows["loss"]) - np.log(
      known_law.predict(natural, result.axes(rows["params"], rows["tokens"])))
  made = result.Fit(
      law=known_law, coefficients=_named(known_law, natural),
      objective=float(solution.objective), starts=starts,
      share_at_best=solution.share_at_best, settings=settings,
      conventions=usable.conventions | {
          "minimised": f"sum of Huber(delta={delta:g}) of log residuals"},
      runs=rows, excluded=usable.excluded, holdout=(),
      cost=frontier.fit_cost(rows["params"].to_numpy(),
                             rows["tokens"].to_numpy(),
                             rows["recorded_flops"].to_numpy()),
      samples=samples, residuals=residuals.to_numpy(), **verdict)
  return dataclasses.replace(made, holdout=tuple(
      _predict_held_out(made, row) for row in usable.held_out.itertuples()))


def default_holdout(frame: pd.DataFrame, law: str = "chinchilla") -> int:
  """About 15% of the complete runs, at least 1; 0 where the law needs all."""
  count = table.count_complete(frame)
  wanted = max(1, round(0.15 * count))
  needed = len(laws.get(law).parameters) + 1
  return wanted if count - wanted >= needed else 0


# --- Details -----------------------------------------------------------------


def _check(good: bool, name: str, value: float, valid: str) -> None:
  if not good:
    raise ValueError(f"{name} is {value!r}; must be {valid}")


@dataclasses.dataclass(frozen=True)
class _Best:
  """The lowest of all starts, and the other ends that came near it."""

  theta: FloatArray
  objective: float
  converged: bool
  share_at_best: float
  rivals: FloatArray  # [ends, parameters]


class _Estimate:
  """One table under one law, in logs centred on the data."""

  def __init__(self, law: laws.Law, rows: pd.DataFrame, delta: float):
    logs = {axis: np.log(rows[axis].to_numpy()) for axis in law.axes}
    self.law, self.rows, self.delta = law, rows, delta
    self.centre = {axis: float(value.mean()) for axis, value in logs.items()}
    self.features = law.features(
        {axis: value - self.centre[axis] for axis, value in logs.items()})
    self.target = np.log(rows["loss"].to_numpy())
    count = len(law.terms)
    shares, exponents = law.share_bounds, law.exponent_bounds
    self.bounds = tuple(
        np.array([np.log(shares[side]) + self.target.min()] * count
                 + [exponents[side]] * len(law.exponents)) for side in (0, 1))

  def natural(self, theta: FloatArray) -> FloatArray:
    return self.law.uncentre(theta, self.centre)

  def best(self) -> tuple[_Best, int]:
    """The optimum over a grid of starts, and the number of starts."""
    axes = [np.log(_START_COEFFICIENTS) + np.median(self.target)
            if term.exponents else np.log(_START_CONSTANT) + self.target.min()
            for term in self.law.terms]
    axes += [_START_EXPONENTS] * len(self.law.exponents)
    starts = np.array(list(itertools.product(*axes)))
    ends = solver.minimise(
        self.features, self.target, np.ones((len(starts), len(self.target))),
        starts, self.bounds, self.delta)
    lowest = int(np.argmin(ends.objective))
    objective = ends.objective[lowest]
    # Objectives of exact data are rounding; they count as equal.
    near = ends.objective <= objective * (1 + _SAME_OBJECTIVE) + 1e-20
    rival = ends.converged & (
        ends.objective <= objective * (1 + _RIVAL_OBJECTIVE) + 1e-20)
    return _Best(ends.theta[lowest], float(objective),
                 bool(ends.converged[lowest]), float(near.mean()),
                 ends.theta[rival]), len(starts)

  def resample(self, theta: FloatArray, count: int, seed: int) -> FloatArray:
    """Natural parameters [count, parameters], runs drawn with replacement."""
    rows = len(self.target)
    weights = np.random.default_rng(seed).multinomial(
        rows, np.full(rows, 1 / rows), size=count).astype(np.float64)
    return self.natural(solver.minimise(
        self.features, self.target, weights, np.tile(theta, (count, 1)),
        self.bounds, self.delta).theta)

  def at_bound(self, theta: FloatArray) -> dict[str, str]:
    """Parameters at an end of their range, and which end."""
    low, high = self.bounds
    return {name: "lower" if theta[k] <= low[k] else "upper"
            for k, name in enumerate(self.law.parameters)
            if not low[k] < theta[k] < high[k]}


def _structural(law: laws.Law, rows: pd.DataFrame) -> dict[str, set[str]]:
  """Why the table cannot determine some parameters -> which those are."""
  problems: dict[str, set[str]] = {}
  everything = set(law.parameters)
  if len(rows) <= len(law.parameters):
    problems[f"{len(rows)} runs cannot determine {len(law.parameters)} "
             f"parameters; at least {len(law.parameters) + 1} are needed"
             ] = everything
  constants = {t.coefficient for t in law.terms if not t.exponents}
  for axis, letter in (("params", "N"), ("tokens", "D")):
    values = rows[axis].nunique() if axis in law.axes else _LEAST_VALUES
    if values < _LEAST_VALUES:
      touched = {name for term in law.terms if axis in term.exponents
                 for name in (term.coefficient, *term.exponents.values())}
      problems[f"{values} distinct value{'s' * (values > 1)} of {letter}; at "
               f"least {_LEAST_VALUES} are needed"] = touched | constants
  logs = [np.log(rows[axis].to_numpy()) for axis in law.axes]
  if len(logs) == 2 and all(np.ptp(x) > 0 for x in logs) and not problems:
    if abs(np.corrcoef(*logs)[0, 1]) > _COLLINEAR:
      problems["D is a power of N throughout (one ratio of tokens to "
               "parameters, say), so their effects cannot be told apart"
               ] = everything
  return problems


def _judge(estimate: _Estimate, best: _Best, samples: FloatArray,
           level: float) -> dict[str, Any]:
  """status, reason, intervals and determined."""
  law = estimate.law
  found: list[tuple[str, str]] = []
  determined = dict.fromkeys(law.parameters, True)
  tail = 100 * (1 - level) / 2
  low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
  intervals: dict[str, tuple[float, float] | None] = {
      name: (float(low[k]), float(high[k]))
      for k, name in enumerate(law.parameters)}
  structural = _structural(law, estimate.rows)
  for problem, names in structural.items():
    found.append(("not_identifiable", problem))
    for name in names:
      determined[name], intervals[name] = False, None
  if not best.converged:
    found.append(("max_iterations", "no start settled within the iterations"))
  for name, end in estimate.at_bound(best.theta).items():
    determined[name] = False
    found.append(("bound_hit", f"{name} is at the {end} end of its range" + (
        ": the runs show no irreducible loss"
        if end == "lower" and name in law.coefficients else "")))
  if not structural:
    rivals = estimate.natural(best.rivals)
    at = [law.parameters.index(name) for name in law.exponents]
    others = rivals[((rivals < low) | (rivals > high))[:, at].any(axis=1)]
    own = estimate.natural(best.theta)
    others = others[(np.abs(others / own - 1)[:, at] > 0.05).any(axis=1)]
    if len(others):
      text = ", ".join(f"{law.parameters[k]} {others[0, k]:.3g}" for k in at)
      found.append(("multiple_optima", f"another optimum fits as well: {text}"))
  constants = [t.coefficient for t in law.terms if not t.exponents]
  for name in (*law.exponents, *constants):
    if determined[name] and intervals[name][1] > (
        WIDEST_INTERVAL * intervals[name][0]):
      determined[name] = False
      found.append((
          "not_identifiable", f"the {level:.0%} interval of {name}, "
          f"{intervals[name][0]:.3g} to {intervals[name][1]:.3g}, spans more "
          f"than a factor of {WIDEST_INTERVAL:g}"))
  for term in law.terms:
    if not all(determined[e] for e in term.exponents.values()):
      determined[term.coefficient] = False
  status = found[0][0] if found else "converged"
  reason = "; ".join(text for _, text in found) or (
      "every parameter is determined")
  return dict(status=status, reason=reason, intervals=intervals,
              determined=determined)


def _predict_held_out(made: result.Fit, row: Any) -> result.HeldOut:
  predicted = float(made.predict(row.params, row.tokens))
  low, high = made.predict_interval(row.params, row.tokens, noise=True)
  return result.HeldOut(
      row.run, row.params, row.tokens, row.flops, row.loss, predicted,
      (float(low), float(high)) if made.has_intervals else None,
      predicted / row.loss - 1)


def _named(law: laws.Law, natural: FloatArray) -> dict[str, float]:
  return {name: float(natural[k]) for k, name in enumerate(law.parameters)}
