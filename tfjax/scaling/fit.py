# SPDX-License-Identifier: Apache-2.0
"""Fits a law of `laws` to a table of runs, and says how far to trust it.

Which rows may be used is decided in `table`, the optimum is found in
`estimate`, and what comes out is a `result.Fit`. `tfjax.scaling.fit` is the
function.
"""

import dataclasses
import numbers
from typing import Any, Mapping, Sequence

import numpy as np
import pandas as pd

from tfjax.scaling import estimate as estimate_lib
from tfjax.scaling import forms
from tfjax.scaling import frontier
from tfjax.scaling import judge
from tfjax.scaling import laws
from tfjax.scaling import result
from tfjax.scaling import table
from tfjax.scaling.forms import FloatArray

# Runs within this factor of the most compute are left out together, and at
# least this share of all.
_LARGEST = 1.25
_LEAST_LEFT_OUT = 0.05
_MOST_LEFT_OUT = 0.34  # of the rows
_MOST_RIVALS = 3  # that resamples start from as well


def fit(
    frame: pd.DataFrame,
    law: str | forms.Law = "chinchilla",
    *,
    params: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    columns: Mapping[str, str] | None = None,
    objective: str = "huber",
    delta: float = 1e-3,
    space: str | None = None,
    weights: str | None = None,
    stderr: str | None = None,
    fixed: Mapping[str, float] | None = None,
    starts: Mapping[str, Sequence[float]] | None = None,
    holdout: int = 0,
    bootstrap: int = 1000,
    group: str | None = None,
    resamples: np.ndarray | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> result.Fit:
  """Fits a law to a table of runs; by default Huber's loss of log residuals,
  summed (Hoffmann et al. 2022, arXiv:2203.15556, equation 3).

  Args:
    frame: one row a run, with the law's axes and its target; from
      `records.load`, or any table. Rows that cannot be used are listed in the
      result.
    law: a name in `laws.LAWS`, or a `forms.Law` of one's own.
    params: the column that is N; unset: params_total, or params.
    tokens: the column that is D; unset: tokens_seen, or tokens.
    flops: the column that is C; unset: flops_total, or flops, or 6 N D.
    columns: the column of any other axis of the law, or of its target, where
      it has another name.
    objective: what is minimised over the rows' residuals r: "huber", the sum
      of Huber's loss; "absolute", of |r|; "squares", of r^2.
    delta: residual beyond which Huber's loss grows linearly.
    space: "log" for residuals of logarithms, "linear" for those of the
      target; unset: the law's own.
    weights: a column of row weights.
    stderr: a column of the target's standard errors; rows weigh by 1 / its
      square.
    fixed: parameters that are not fitted, and their values.
    starts: of parameters, the natural values that the grid of starts is made
      of, in place of the law's own.
    holdout: so many runs with the most FLOPs are predicted, not fitted.
    bootstrap: resamples of the runs for the intervals; 0 for no intervals.
    group: a column; rows that agree in it are drawn together (checkpoints of
      a run, runs of a model). Unset: every row by itself.
    resamples: [count, rows] positions in `frame` to use for the resamples.
    level: coverage of the percentile intervals.
    seed: of the resamples.

  Raises:
    table.TableError: a column is missing, losses are not comparable, or there
      are too few rows.
    ValueError: an argument is out of range.
  """
  known_law = laws.get(law)
  space = space or known_law.space
  fixed = dict(fixed or {})
  starts = starts and {k: np.atleast_1d(v) for k, v in starts.items()}
  _check_arguments(known_law, objective, delta, space, fixed, starts, holdout,
                   bootstrap, level)
  named = {"params": params, "tokens": tokens, "flops": flops,
           **(columns or {})}
  usable = table.prepare(
      frame, known_law, columns={k: v for k, v in named.items() if v},
      holdout=holdout, weights=weights, stderr=stderr, group=group, space=space)
  rows = usable.fitted
  estimate = estimate_lib.Estimate(
      known_law, rows, objective=objective, delta=delta, space=space,
      fixed=fixed, starts=starts)
  best = estimate.best()
  counts = _draws(rows, bootstrap, seed) if resamples is None else _counts(
      rows, resamples, len(frame))
  optima = np.concatenate([best.theta[None], best.rivals[:_MOST_RIVALS]])
  samples = (estimate.resampled(counts, optima) if len(counts)
             else np.empty((0, len(known_law.parameters))))
  verdict = judge.judge(estimate, best, samples, level)
  natural = estimate.natural(best.theta)
  settings = dict(
      law=known_law.name, params=params, tokens=tokens, flops=flops,
      columns=dict(columns or {}), objective=objective, delta=delta,
      space=space, weights=weights, stderr=stderr, fixed=fixed,
      starts={k: [float(v) for v in values]
              for k, values in starts.items()} if starts else None,
      holdout=holdout, bootstrap=len(counts), group=group, level=level,
      seed=seed)
  made = result.Fit(
      law=known_law, coefficients=_named(known_law, natural),
      objective=best.objective, starts=best.starts,
      share_at_best=best.share_at_best,
      optima=tuple(
          {"coefficients": _named(known_law, estimate.natural(theta)),
           "objective": float(value)}
          for theta, value in zip(best.rivals, best.rival_objectives)),
      settings=settings,
      conventions=usable.conventions | {
          "minimised": _minimised(objective, delta, space, weights, stderr)},
      runs=rows, excluded=usable.excluded, holdout=(), extrapolation=(),
      cost=_cost(rows), samples=samples,
      residuals=estimate.residuals(best.theta),
      estimate=estimate, theta=best.theta, **verdict)
  held = tuple(_predicted(made, row) for row in usable.held_out.to_dict(
      "records"))
  made = dataclasses.replace(made, holdout=held)
  return dataclasses.replace(
      made, extrapolation=held or _leave_largest_out(made))


def default_holdout(frame: pd.DataFrame,
                    law: str | forms.Law = "chinchilla") -> int:
  """About 15% of the complete runs, at least 1; 0 where the law needs all."""
  count = table.count_complete(frame)
  wanted = max(1, round(0.15 * count))
  needed = len(laws.get(law).parameters) + 1
  return wanted if count - wanted >= needed else 0


# --- Details -----------------------------------------------------------------


def _check_arguments(
    law: forms.Law, objective: str, delta: float, space: str,
    fixed: Mapping[str, float], starts: Mapping[str, Sequence[float]] | None,
    holdout: int, bootstrap: int, level: float) -> None:
  _check(objective in estimate_lib.OBJECTIVES, "objective", objective,
         " or ".join(estimate_lib.OBJECTIVES))
  _check(delta > 0, "delta", delta, "positive")
  _check(space in ("log", "linear"), "space", space, "log or linear")
  _check(holdout >= 0, "holdout", holdout, "at least 0")
  _check(bootstrap == 0 or bootstrap >= 100, "bootstrap", bootstrap,
         "0 or at least 100")
  _check(0 < level < 1, "level", level, "between 0 and 1")
  for what, names in (("fixed", fixed), ("starts", starts or {})):
    for name in names:
      _check(name in law.parameters, f"{what} parameter", name,
             f"one of {', '.join(law.parameters)}")
  _check(len(fixed) < len(law.parameters), "fixed", list(fixed),
         "fewer than all parameters")
  for name, value in fixed.items():
    _check(isinstance(value, numbers.Real) and np.isfinite(value),
           f"fixed {name}", value, "a finite number")
  scales = {p.name for p in law.free if p.log}
  for name in scales & set(fixed):
    _check(fixed[name] > 0, f"fixed {name}", fixed[name], "positive")
  for name, values in (starts or {}).items():
    values = np.atleast_1d(np.asarray(values, np.float64))
    _check(values.size > 0 and np.isfinite(values).all() and (
        name not in scales or (values > 0).all()), f"starts of {name}",
           values.tolist(), "numbers that it can have, at least one")
  for term in law.terms:
    free = [e for e in term.exponents.values() if e not in fixed]
    if term.coefficient in fixed and free:
      raise ValueError(
          f"{term.coefficient} can be fixed only together with its exponent "
          f"{', '.join(free)}: alone it has no meaning")


def _check(good: bool, name: str, value: Any, valid: str) -> None:
  if not good:
    raise ValueError(f"{name} is {value!r}; must be {valid}")


def _draws(rows: pd.DataFrame, count: int, seed: int) -> FloatArray:
  """[count, rows] how often each row was drawn, groups with replacement."""
  groups, member = np.unique(rows["group"].astype(str), return_inverse=True)
  drawn = np.random.default_rng(seed).multinomial(
      len(groups), np.full(len(groups), 1 / len(groups)), size=count)
  return drawn[:, member].astype(np.float64)


def _counts(rows: pd.DataFrame, resamples: np.ndarray,
            length: int) -> FloatArray:
  """The same of positions in the table that the caller drew."""
  resamples = np.asarray(resamples)
  if (resamples.ndim != 2 or not resamples.size
      or not np.issubdtype(resamples.dtype, np.integer)
      or resamples.min() < 0 or resamples.max() >= length):
    raise ValueError("resamples must be [count, rows] positions in a table of "
                     f"{length} rows")
  drawn = np.stack([np.bincount(r, minlength=length) for r in resamples])
  used = rows["row"].to_numpy()
  if drawn[:, used].sum() < drawn.sum():
    raise ValueError("resamples draw rows that the fit left out")
  return drawn[:, used].astype(np.float64)


def _minimised(objective: str, delta: float, space: str, weights: str | None,
               stderr: str | None) -> str:
  what = {"huber": f"sum of Huber(delta={delta:g})", "absolute":
          "sum of absolute values", "squares": "sum of squares"}[objective]
  kind = "log residuals" if space == "log" else "residuals"
  by = (f", weighted by {weights}" if weights else
        f", weighted by 1 / {stderr}^2" if stderr else "")
  return f"{what} of {kind}{by}"


def _cost(rows: pd.DataFrame) -> frontier.Cost | None:
  if not {"params", "tokens"} <= set(rows.columns):
    return None
  return frontier.fit_cost(*(rows[name].to_numpy(np.float64) for name in (
      "params", "tokens", "recorded_flops")))


def _leave_largest_out(made: result.Fit) -> tuple[result.HeldOut, ...]:
  """Refits without the runs of the most compute, and predicts them."""
  spent = made.runs["flops"].to_numpy(np.float64)
  if not np.isfinite(spent).all():
    return ()
  least = max(1, round(_LEAST_LEFT_OUT * len(spent)))
  largest = spent >= min(spent.max() / _LARGEST, np.sort(spent)[-least])
  kept = made.runs[~largest].reset_index(drop=True)
  if (largest.mean() > _MOST_LEFT_OUT
      or len(kept) <= len(made.estimate.free)):
    return ()
  rest = made.estimate.of(kept)
  end = rest.refit(rest.theta(made.estimate.natural(made.theta)))
  smaller = dataclasses.replace(
      made, coefficients=_named(made.law, rest.natural(end.theta)))
  return tuple(_predicted(smaller, row, interval=False)
               for row in made.runs[largest].to_dict("records"))


def _predicted(made: result.Fit, row: Mapping[str, Any],
               interval: bool = True) -> result.HeldOut:
  axes = {axis: float(row[axis]) for axis in made.law.axes}
  predicted = float(made.predict(**axes))
  between = None
  if interval and made.has_intervals:
    low, high = made.predict_interval(**axes, noise=True)
    between = (float(low), float(high))
  measured = row[made.law.target]
  return result.HeldOut(
      row["run"], axes, row.get("params"), row.get("tokens"), row["flops"],
      measured, predicted, between,
      predicted / measured - 1 if measured else np.nan)


def _named(law: forms.Law, natural: FloatArray) -> dict[str, float]:
  return {name: float(natural[k]) for k, name in enumerate(law.parameters)}
