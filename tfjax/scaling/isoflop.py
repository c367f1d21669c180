# SPDX-License-Identifier: Apache-2.0
"""Approach 2: the best size at each budget, and laws through those minima.

Hoffmann et al. 2022, arXiv:2203.15556, section 3.2. Needs no law and no fit.
Its bias, which noise-free losses have too, is worked out in `approaches`.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import interpolate
from scipy.cluster import hierarchy

from tfjax.scaling import power
from tfjax.scaling import wording
from tfjax.scaling.forms import FloatArray


# Curve through the losses of a budget -> distinct sizes that it needs: one to
# spare for a parabola, the reach of its formula for Akima's.
METHODS = {"parabola": 4, "akima": 5, "makima": 5, "spline": 5}
# And in a resample, where some of them are missing.
_LEAST_DRAWN = {"parabola": 3, "akima": 3, "makima": 3, "spline": 5}


@dataclasses.dataclass(frozen=True)
class Minimum:
  """The best size at one budget, between sizes that were tried."""

  flops: float  # geometric mean of the budget's runs
  spread: float  # largest over smallest FLOPs among them
  params: float
  tokens: float
  loss: float  # of the curve there
  params_interval: tuple[float, float] | None
  runs: pd.DataFrame
  polynomial: interpolate.PPoly  # loss of log N, within the sizes tried

  def curve(self, params: FloatArray) -> FloatArray:
    """The fitted loss at these sizes; NaN beyond those that were tried."""
    return self.polynomial(np.log(params), extrapolate=False)


@dataclasses.dataclass(frozen=True)
class Refused:
  """A budget whose runs show no minimum, and why."""

  flops: float
  runs: int
  sizes: int
  reason: str


@dataclasses.dataclass(frozen=True)
class IsoFlop:
  """The minima, the budgets without one, and N*(C) and D*(C)."""

  method: str
  minima: tuple[Minimum, ...]
  refused: tuple[Refused, ...]
  params: power.PowerLaw | None  # None: too few minima
  tokens: power.PowerLaw | None
  usable: float  # share of the resamples whose minima gave a law
  reason: str  # why there is no law, or no interval; empty where there are

  def table(self) -> pd.DataFrame:
    """One row a budget, refused ones too: flops, runs, sizes, spread, params,
    params_low, params_high, tokens, loss, reason (empty: a minimum)."""
    rows = []
    for m in self.minima:
      low, high = m.params_interval or (np.nan, np.nan)
      rows.append(dict(
          flops=m.flops, runs=len(m.runs), sizes=m.runs["params"].nunique(),
          spread=m.spread, params=m.params, params_low=low, params_high=high,
          tokens=m.tokens, loss=m.loss, reason=""))
    made = pd.DataFrame(
        rows + [dataclasses.asdict(r) for r in self.refused],
        columns=["flops", "runs", "sizes", "spread", "params", "params_low",
                 "params_high", "tokens", "loss", "reason"])
    return made.sort_values("flops", ignore_index=True)


def fit(runs: pd.DataFrame, *, method: str = "parabola",
        budget: str | None = None, tolerance: float = 0.1,
        bootstrap: int = 1000, level: float = 0.95,
        seed: int = 0) -> IsoFlop:
  """Finds the size of least loss at each budget, and N*(C) and D*(C).

  Runs of one size at one budget (seeds) count as their mean. D* is where the
  budget's own N and D have N*, interpolated in logs. The intervals are of
  runs drawn with replacement within each budget.

  Args:
    runs: params, tokens, loss, flops, one row a run at its last step.
    method: curve of loss in log N: "parabola" by least squares (Hoffmann et
      al. 2022), "akima" and "makima" through every loss, "spline": a smoothing
      spline, its penalty by generalised cross-validation (slow to resample).
    budget: column whose values are the budgets; unset: FLOPs that lie within
      `tolerance` of one another.
    tolerance: largest relative difference of the FLOPs of one budget. Loss
      falls with compute, so a wide budget tilts its own curve.
    bootstrap: resamples, 0 for none.
    level: coverage of the percentile intervals.
    seed: of the resamples.

  Raises:
    ValueError: an argument or a row is out of range.
  """
  if method not in METHODS:
    raise ValueError(f"no isoFLOP curve {method!r}; known: "
                     f"{', '.join(METHODS)}")
  if not 0 <= tolerance < 1:
    raise ValueError(f"tolerance is {tolerance}; must be at least 0 and below "
                     "1, a relative difference of FLOPs")
  power.check_options(bootstrap, level)
  runs = power.check_runs(runs)
  found, refused = [], []
  for _, rows in runs.groupby(_budgets(runs, budget, tolerance)):
    flops = float(np.exp(np.log(rows["flops"]).mean()))
    one = _Budget(rows, flops, method)
    if one.problem:
      refused.append(Refused(flops, len(rows), rows["params"].nunique(),
                             one.problem))
    else:
      found.append(one)
  found.sort(key=lambda one: one.flops)
  rng = np.random.default_rng(seed)
  draws = np.empty((bootstrap, len(found), 2))  # log N*, log D*
  for k, one in enumerate(found):
    draws[:, k] = one.draws(bootstrap, rng)
  return _summary(method, found, tuple(refused), draws, level)


# --- Details -----------------------------------------------------------------


def _budgets(runs: pd.DataFrame, column: str | None,
             tolerance: float) -> np.ndarray:
  """A label per row."""
  if column is not None:
    if column not in runs:
      raise ValueError(f"the runs have no column {column!r} of budgets; they "
                       f"have {', '.join(map(str, runs.columns))}")
    unnamed = runs[column].isna()
    if unnamed.any():
      raise ValueError(f"{runs['run'][unnamed].iloc[0]} has no {column}, so no "
                       "budget")
    return runs[column].to_numpy()
  if len(runs) < 2:
    return np.zeros(len(runs), int)
  # Complete linkage: no two runs of a budget differ by more.
  tree = hierarchy.linkage(np.log(runs[["flops"]].to_numpy()), "complete")
  # Rounding of equal FLOPs is no difference.
  return hierarchy.fcluster(tree, np.log1p(tolerance) + 1e-9, "distance")


def _curve(method: str, x: FloatArray, loss: FloatArray, weights: FloatArray,
           ends: tuple[float, float]) -> interpolate.PPoly:
  """Loss of log N, piecewise polynomial; x is increasing."""
  if method == "parabola":
    coefficients = np.polyfit(x - ends[0], loss, 2, w=np.sqrt(weights))
    return interpolate.PPoly(coefficients[:, None], np.array(ends))
  if method == "spline":
    return interpolate.PPoly.from_spline(
        interpolate.make_smoothing_spline(x, loss, w=weights))
  return interpolate.Akima1DInterpolator(x, loss, method=method)


def _lowest(curve: interpolate.PPoly) -> float | None:
  """Where the curve is least, or None where that is one of its ends."""
  flat = curve.derivative().roots(extrapolate=False)
  flat = flat[np.isfinite(flat)]
  if not len(flat):
    return None
  best = float(flat[np.argmin(curve(flat))])
  ends = curve(curve.x[[0, -1]])
  return best if curve(best) < ends.min() else None


def _vertices(x: FloatArray, sums: FloatArray,
              weights: FloatArray) -> FloatArray:
  """Of parabolas by weighted least squares, one a row of the weights; NaN
  where one has no minimum between the ends of x, or too few sizes.

  Args:
    x: [sizes] log N.
    sums: [problems, sizes] weight times loss.
    weights: [problems, sizes].
  """
  middle, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
  basis = np.vander((x - middle) / half, 3)
  vertex = np.full(len(weights), np.nan)
  enough = (weights > 0).sum(axis=1) >= 3
  normal = np.einsum("sk,kp,kq->spq", weights[enough], basis, basis)
  a, b, _ = np.linalg.solve(
      normal, (sums[enough] @ basis)[..., None])[..., 0].T
  with np.errstate(divide="ignore", invalid="ignore"):
    at = -b / (2 * a)
  vertex[enough] = np.where((a > 0) & (np.abs(at) < 1), middle + half * at,
                            np.nan)
  return vertex


class _Budget:
  """The runs of one budget: their minimum, and that of resamples."""

  def __init__(self, rows: pd.DataFrame, flops: float, method: str):
    self.rows, self.flops, self._method = rows, flops, method
    self._sizes, self._at = np.unique(rows["params"], return_inverse=True)
    self._x, self._loss = np.log(self._sizes), rows["loss"].to_numpy()
    weights, sums = self._totals(np.arange(len(rows)))
    self._log_tokens = np.bincount(
        self._at, np.log(rows["tokens"])) / weights
    self.best, self.curve, self.problem = np.nan, None, ""
    if len(self._sizes) < METHODS[method]:
      self.problem = (f"distinct sizes: {len(self._sizes)}; a {method} needs "
                      f"at least {METHODS[method]}")
      return
    self.curve = self._drawn_curve(weights, sums)
    best = _lowest(self.curve)
    self.best = np.nan if best is None else best
    self.problem = self._at_an_end(sums / weights)

  def log_tokens(self, log_params: FloatArray) -> FloatArray:
    """Of a run of this budget, interpolated."""
    return np.interp(log_params, self._x, self._log_tokens)

  def draws(self, count: int, rng: np.random.Generator) -> FloatArray:
    """[count, (log N*, log D*)] of resamples; NaN where one has no minimum."""
    drawn = rng.integers(len(self.rows), size=(count, len(self.rows)))
    totals = [self._totals(rows) for rows in drawn]
    if self._method == "parabola" and count:
      weights, sums = map(np.array, zip(*totals))
      best = _vertices(self._x, sums, weights)
    else:
      best = np.full(count, np.nan)
      for k, (weights, sums) in enumerate(totals):
        if (weights > 0).sum() >= _LEAST_DRAWN[self._method]:
          lowest = _lowest(self._drawn_curve(weights, sums))
          best[k] = np.nan if lowest is None else lowest
    return np.stack([best, self.log_tokens(best)], axis=-1)

  def _totals(self, rows: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """Of these rows, how many have each size, and the sum of their losses."""
    return (np.bincount(self._at[rows], minlength=len(self._x)).astype(float),
            np.bincount(self._at[rows], self._loss[rows], len(self._x)))

  def _drawn_curve(self, weights: FloatArray,
                   sums: FloatArray) -> interpolate.PPoly:
    there = weights > 0
    return _curve(self._method, self._x[there], sums[there] / weights[there],
                  weights[there], (self._x[0], self._x[-1]))

  def _at_an_end(self, means: FloatArray) -> str:
    """That the best size may lie beyond those tried; empty where not."""
    lowest, last = int(np.argmin(means)), len(means) - 1
    what = "the lowest loss"
    if lowest not in (0, last):
      if np.isfinite(self.best):
        return ""
      ends = self.curve(self.curve.x[[0, -1]])
      lowest, what = int(np.argmin(ends)) * last, "the lowest of the curve"
    end, other = (("smallest", "smaller") if lowest == 0
                  else ("largest", "larger"))
    return (f"{what} is at the {end} size, "
            f"{wording.count(self._sizes[lowest])}: the best may be {other} "
            "still")


def _summary(method: str, found: list[_Budget], refused: tuple[Refused, ...],
             draws: FloatArray, level: float) -> IsoFlop:
  count = len(draws)
  tails = ((1 - level) / 2, (1 + level) / 2)
  minima = []
  for k, one in enumerate(found):
    drawn = draws[:, k, 0][np.isfinite(draws[:, k, 0])]
    interval = None
    if len(drawn) >= max(1, power.LEAST_USABLE * count):
      interval = tuple(np.exp(np.quantile(drawn, tails)).tolist())
    minima.append(Minimum(
        one.flops, float(one.rows["flops"].max() / one.rows["flops"].min()),
        float(np.exp(one.best)), float(np.exp(one.log_tokens(one.best))),
        float(one.curve(one.best)), interval, one.rows, one.curve))
  flops = np.array([one.flops for one in found])
  if len(minima) < power.LEAST_POINTS:
    return IsoFlop(method, tuple(minima), refused, None, None, 0.0,
                   f"{len(minima)} of {len(minima) + len(refused)} budgets "
                   f"show a minimum; a law needs {power.LEAST_POINTS}")
  there = np.isfinite(draws[..., 0])
  usable = there.sum(axis=1) >= power.LEAST_POINTS
  laws = []
  for column, name in ((0, "params"), (1, "tokens")):
    lines = [power.line(flops[t], np.exp(d[t, column]))
             for d, t in zip(draws[usable], there[usable])]
    laws.append(power.through(
        flops, np.array([getattr(m, name) for m in minima]), lines, count,
        level))
  reason = "" if len(laws[0].samples) or not count else (
      f"no interval: {usable.mean():.0%} of the resamples show enough minima")
  return IsoFlop(method, tuple(minima), refused, *laws,
                 float(usable.mean()) if count else 0.0, reason)
