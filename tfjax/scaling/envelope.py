# SPDX-License-Identifier: Apache-2.0
"""Approach 1: the runs that spent their compute best, and laws through them.

Hoffmann et al. 2022, arXiv:2203.15556, section 3.1. Needs no law and no fit;
rows may be runs, or checkpoints of runs.
"""

import dataclasses
from typing import Callable

import numpy as np
import pandas as pd

from tfjax.scaling import power
from tfjax.scaling.forms import FloatArray

METHODS = ("hull", "pareto", "curves")

# By column: params, tokens, loss, flops, and run, a number.
_Points = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Envelope:
  """The envelope of a table of runs, and N*(C) and D*(C) through it."""

  method: str
  runs: pd.DataFrame  # the envelope by cost: run, params, tokens, loss, flops
  params: power.PowerLaw
  tokens: power.PowerLaw
  usable: float  # share of the resamples whose envelope gave a law


def fit(runs: pd.DataFrame, *, method: str = "hull", budgets: int = 1500,
        bootstrap: int = 1000, level: float = 0.95, seed: int = 0) -> Envelope:
  """Regresses log N and log D on log C along the envelope of runs.

  The intervals are of runs drawn with replacement, all checkpoints of a run
  together. An envelope is made of extremes, which resampling reproduces badly:
  take them for a lower bound of the uncertainty.

  Args:
    runs: run (a name; unset: each row is a run), params, tokens, loss, flops.
    method: "hull": the lower convex hull of log loss against log FLOPs
      (McLeish et al. 2025, arXiv:2502.06857, section 4.1); "pareto": every
      run that no cheaper one equals; "curves": at `budgets` FLOPs, spaced
      evenly in logs, the run whose curve through its checkpoints is lowest
      (Hoffmann et al. 2022: 1500).
    budgets: of the method "curves".
    bootstrap: resamples, 0 for none.
    level: coverage of the percentile intervals.
    seed: of the resamples.

  Raises:
    power.NoLaw: the envelope has too few points, or one size alone.
    ValueError: an argument or a row is out of range.
  """
  if method not in METHODS:
    raise ValueError(f"no envelope {method!r}; known: {', '.join(METHODS)}")
  if budgets < power.LEAST_POINTS:
    raise ValueError(f"budgets is {budgets}; must be at least "
                     f"{power.LEAST_POINTS}")
  power.check_options(bootstrap, level)
  runs = power.check_runs(runs)
  names, groups = np.unique(runs["run"].to_numpy(str), return_inverse=True)
  select = (_Curves(runs, groups, budgets) if method == "curves"
            else _Rows(runs, groups, hull if method == "hull" else pareto))
  best = select(np.arange(len(names)))
  problem = _problem(best)
  if problem:
    raise power.NoLaw(f"no law through the envelope ({method}) of "
                      f"{len(names)} runs: {problem}")
  rng = np.random.default_rng(seed)
  params, tokens = [], []
  for _ in range(bootstrap):
    # How often a run is drawn does not move an envelope.
    drawn = select(np.unique(rng.integers(len(names), size=len(names))))
    if not _problem(drawn):
      params.append(power.line(drawn["flops"], drawn["params"]))
      tokens.append(power.line(drawn["flops"], drawn["tokens"]))
  rows = pd.DataFrame(best | {"run": names[best["run"]]})
  return Envelope(
      method, rows[["run", "params", "tokens", "loss", "flops"]],
      power.through(best["flops"], best["params"], params, bootstrap, level),
      power.through(best["flops"], best["tokens"], tokens, bootstrap, level),
      len(params) / bootstrap if bootstrap else 0.0)


def pareto(flops: FloatArray, loss: FloatArray) -> np.ndarray:
  """Indices, by cost, of the runs that beat every run that cost no more."""
  order = np.lexsort((loss, flops))
  before = np.minimum.accumulate(np.r_[np.inf, loss[order][:-1]])
  return order[loss[order] < before]


def hull(flops: FloatArray, loss: FloatArray) -> np.ndarray:
  """Indices, by cost, of the runs on the lower convex hull of log loss against
  log FLOPs, up to the lowest loss: the runs that spent their compute best."""
  x, y = np.log(flops), np.log(loss)
  corners: list[int] = []
  for k in pareto(flops, loss):  # No other run can be on it.
    while len(corners) > 1:
      a, b = corners[-2:]
      if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
        break  # b lies below the line from a to k.
      corners.pop()
    corners.append(int(k))
  return np.array(corners)


# --- Details -----------------------------------------------------------------


def _problem(best: _Points) -> str:
  """Why no law goes through these points; empty where one does."""
  points = len(best["flops"])
  if points < power.LEAST_POINTS:
    return (f"it has {points} points; at least {power.LEAST_POINTS} are "
            "needed")
  if np.ptp(best["params"]) == 0:
    return "all of it is of one size, so N* cannot move with compute"
  return ""


class _Rows:
  """The envelope of the rows of some runs, as a choice among the rows."""

  def __init__(self, runs: pd.DataFrame, groups: np.ndarray,
               choose: Callable[[FloatArray, FloatArray], np.ndarray]):
    self._choose = choose
    self._points = {"run": groups} | {
        name: runs[name].to_numpy()
        for name in ("params", "tokens", "loss", "flops")}

  def __call__(self, chosen: np.ndarray) -> _Points:
    points = self._points
    rows = np.flatnonzero(np.isin(points["run"], chosen))
    rows = rows[self._choose(points["flops"][rows], points["loss"][rows])]
    return {name: values[rows] for name, values in points.items()}


class _Curves:
  """The envelope of the runs' curves, interpolated in logs."""

  def __init__(self, runs: pd.DataFrame, groups: np.ndarray, budgets: int):
    counts = np.bincount(groups)
    if counts.max() < 2:
      raise ValueError('the envelope of "curves" needs several checkpoints a '
                       "run; here every run has one row")
    self._flops = np.geomspace(runs["flops"].min(), runs["flops"].max(),
                               budgets)
    self._params = np.full(len(counts), np.nan)
    self._loss = np.full((len(counts), budgets), np.inf)
    self._tokens = np.full((len(counts), budgets), np.nan)
    for group, rows in runs.groupby(groups):
      rows = rows.sort_values("flops").drop_duplicates("flops")
      if rows["params"].nunique() > 1:
        raise ValueError(f"the checkpoints of {rows['run'].iloc[0]} differ in "
                         "size; one run has one")
      x, at = np.log(rows["flops"]), np.log(self._flops)
      self._params[group] = rows["params"].iloc[0]
      self._loss[group] = np.exp(np.interp(
          at, x, np.log(rows["loss"]), left=np.inf, right=np.inf))
      self._tokens[group] = np.exp(np.interp(at, x, np.log(rows["tokens"])))

  def __call__(self, chosen: np.ndarray) -> _Points:
    loss = self._loss[chosen]
    best = chosen[np.argmin(loss, axis=0)]
    known = np.flatnonzero(np.isfinite(loss.min(axis=0)))
    best = best[known]  # Elsewhere no run has a curve.
    return {"params": self._params[best], "tokens": self._tokens[best, known],
            "loss": self._loss[best, known], "flops": self._flops[known],
            "run": best}
