# SPDX-License-Identifier: Apache-2.0
"""Whole loss curves: their collapse onto one, and fits to all their points.

A table of curves has one row a measured point, with the columns run, flops
and loss; `collapse` also needs what a run's size is, `prefixes` what the
learning rate did. `of_runs` makes such a table of run directories; any other
serves as well. Fits of end points alone are `tfjax.scaling.fit`.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from tfjax import scaling
from tfjax.scaling import forms
from tfjax.scaling import records
from tfjax.scaling import result
from tfjax.scaling import table
from tfjax.scaling.forms import FloatArray

# Shares of a run's compute at which normalised curves are compared.
GRID = np.linspace(0.05, 1.0, 60)
# Runs of one size must have trained as long as each other, but for rounding.
_SAME_COMPUTE = 0.01
# E, A and alpha, and one point more.
_LEAST_SIZES = 4
_KINDS = ("evaluation", "train")


@dataclasses.dataclass(frozen=True)
class Collapse:
  """Curves over their own ends, and how far those of one size differ from
  those of another.

  Attributes:
    irreducible: L0, nats a token.
    fit: where it is from (`fit.determined["E"]` says how well it is known);
      None where it was given.
    normalised: run, size, x (share of the run's compute) and value, which is
      (L(x C*) - L0) / (L(C*) - L0): 1 at the end of every run.
    spread: by x, how far sizes differ and how far seeds do, as standard
      deviations over the mean. `spread` is of the sizes' curves, each the
      mean of its seeds; `pooled` of all runs' curves; `noise` of L - L0 among
      seeds of one size, averaged over sizes that have several, NaN where none
      has. Of a population (over n): with fewer seeds than sizes that
      understates the noise more than the spread.
    excluded: runs that were left out, and why.
  """

  irreducible: float
  fit: result.Fit | None
  normalised: pd.DataFrame
  spread: pd.DataFrame
  excluded: tuple[table.Excluded, ...]

  def at(self, x: float) -> pd.Series:
    """The row of `spread` at the first point of its grid from x on."""
    later = self.spread[self.spread["x"] >= x - 1e-9]
    if later.empty:
      raise ValueError(f"x is {x:g}; must be at most "
                       f"{self.spread['x'].max():g}")
    return later.iloc[0]


def collapse(curves: pd.DataFrame, *, size: str = "params",
             irreducible: float | None = None, grid: FloatArray = GRID,
             **options: Any) -> Collapse:
  """Compute-optimally trained runs of several sizes on one curve.

  Qiu et al. 2025, arXiv:2507.02119, section 2: with C* what a size was
  trained for, l(x) = (L(x C*) - L0) / (L(C*) - L0) is the same function for
  all sizes, and with a decaying learning rate sizes differ less than seeds.
  L0 is fitted to the sizes' end points, each the mean of its seeds, by
  L = L0 + A / C^alpha, Huber's loss of log residuals with delta 1e-3.

  Args:
    curves: run, flops (any unit), loss, and the column of sizes.
    size: the column of sizes; runs of one size differ in their seed only.
    irreducible: L0, where it is not to be fitted.
    grid: increasing shares of a run's compute, of (0, 1].
    **options: of `tfjax.scaling.fit`.

  Raises:
    table.TableError: a column is missing, runs of one size end at different
      compute, sizes are fewer than two, or they do not determine L0.
    ValueError: grid or irreducible is out of range.
  """
  grid = np.asarray(grid, np.float64)
  if not (len(grid) and (np.diff(grid) > 0).all() and 0 < grid[0]
          and grid[-1] <= 1):
    raise ValueError("grid must increase, from above 0 to at most 1")
  kept, excluded = _whole(curves, size, grid[0])
  ends = end_points(kept, size=size)
  if len(ends) < 2:
    raise table.TableError(
        f"a collapse needs two sizes or more; {size} has {len(ends)}"
        + "".join(f"\n  {e.run}: {e.reason}" for e in excluded[:10]))
  made = None if irreducible is not None else _fit_ends(ends, options)
  floor = float(irreducible) if made is None else made.coefficients["E"]
  lowest = kept["loss"].min()
  if not 0 <= floor < lowest:
    raise ValueError(f"the irreducible loss is {floor:g}; must be at least 0 "
                     f"and below every loss, of which the least is {lowest:g}")
  runs = [(name, rows[size].iloc[0], _at(rows, grid) - floor,
           rows["loss"].iloc[-1] - floor)
          for name, rows in kept.groupby("run", sort=False)]
  normalised = pd.concat([
      pd.DataFrame({"run": name, "size": n, "x": grid, "value": rest / end})
      for name, n, rest, end in runs], ignore_index=True)
  spread = _spread(grid, np.array([n for _, n, _, _ in runs]),
                   np.array([rest for _, _, rest, _ in runs]),
                   np.array([rest / end for _, _, rest, end in runs]))
  return Collapse(floor, made, normalised, spread, excluded)


def end_points(curves: pd.DataFrame, *, size: str = "params") -> pd.DataFrame:
  """One row a size: flops and loss at the end, averaged over its runs.

  Raises:
    table.TableError: a column is missing, or runs of one size end at
      different compute.
  """
  _need(curves, "run", "flops", "loss", size)
  last = curves.sort_values("flops", kind="stable").groupby("run").tail(1)
  groups = last.groupby(size)
  for value, flops in groups["flops"]:
    if flops.max() > (1 + _SAME_COMPUTE) * flops.min():
      raise table.TableError(
          f"runs of {size} {value:g} end at different compute, {flops.min():g} "
          f"to {flops.max():g} FLOPs; a collapse is of one budget a size")
  return groups.agg(flops=("flops", "mean"), loss=("loss", "mean"),
                    runs=("run", "size")).reset_index()


def of_runs(workdir: str | os.PathLike[str], *, kind: str = "evaluation"
            ) -> pd.DataFrame:
  """The curves of all runs below a directory, one row a measured point.

  Args:
    workdir: of run directories.
    kind: which rows of metrics.jsonl: "evaluation", the loss on held-out
      documents (config: evaluation.every_steps), or "train", the loss of one
      batch, which is noisier, and lower once data repeat.

  Returns:
    run, step, params, tokens, flops, loss; status, seed, unique_tokens (at
    most the tokens so far) and what losses must share (`table.SHARED`);
    schedule and warmup_steps, None and NaN where config.json does not tell.

  Raises:
    FileNotFoundError: there is no such directory.
    records.RecordError: a file cannot be read.
    ValueError: there is no such kind.
  """
  if kind not in _KINDS:
    raise ValueError(f"kind is {kind!r}; must be {' or '.join(_KINDS)}")
  parts = []
  for _, run in records.load(workdir).iterrows():
    rows = records.curves(run["directory"])
    rows = rows.loc[rows["kind"] == kind, ["step", "tokens", "flops", "loss"]]
    schedule, warmup = _schedule(pathlib.Path(run["directory"]), run["steps"])
    parts.append(rows.assign(
        run=run["run_id"], params=run["params_total"],
        unique_tokens=np.minimum(rows["tokens"], run["unique_tokens"]),
        schedule=schedule, warmup_steps=warmup,
        **{name: run[name] for name in ("status", "seed", *table.SHARED)}))
  names = ["run", "step", "params", "tokens", "flops", "loss", "status",
           "seed", "unique_tokens", "schedule", "warmup_steps", *table.SHARED]
  if not parts:
    return pd.DataFrame(columns=names)
  return pd.concat(parts, ignore_index=True)[names]


def prefixes(curves: pd.DataFrame
             ) -> tuple[pd.DataFrame, tuple[table.Excluded, ...]]:
  """The points of curves that are results of shorter runs.

  With a constant learning rate nothing in the first D tokens of a run depends
  on how long it goes on: its loss there is what a run of D tokens with the
  same warmup has at its end. With a decay it is not, since the shorter run
  would have decayed by then, so that such runs are refused (Hoffmann et al.
  2022, arXiv:2203.15556, appendix B). Points of the warmup are left out.

  Args:
    curves: run, step, schedule and warmup_steps, and what a law asks for; as
      from `of_runs`.

  Returns:
    The rows that may be fitted, with a run_id each (run@step), and the runs
    that were refused. Points of one run err together: fit them with
    group="run".

  Raises:
    table.TableError: a column is missing, or no run is left.
  """
  _need(curves, "run", "step", "schedule", "warmup_steps")
  excluded, kept = [], []
  for name, rows in curves.groupby("run", sort=False):
    if why := _refusal(rows):
      excluded.append(table.Excluded(str(name), why))
    else:
      kept.append(rows[rows["step"] > rows["warmup_steps"]])
  if not kept:
    raise table.TableError(
        "no run has a curve whose points can be fitted"
        + "".join(f"\n  {e.run}: {e.reason}" for e in excluded[:10]))
  made = pd.concat(kept, ignore_index=True)
  step = made["step"].astype("int64").astype(str)
  made.insert(0, "run_id", made["run"].astype(str) + "@" + step)
  return made, tuple(excluded)


def fit(curves: pd.DataFrame, law: str | forms.Law = "chinchilla",
        **options: Any) -> result.Fit:
  """Fits a law to every usable point of the curves, by `tfjax.scaling.fit`.

  Points are those of `prefixes`; the bootstrap draws runs, not points, which
  would claim more than the runs know.

  Args:
    curves: as for `prefixes`.
    law: as for `tfjax.scaling.fit`.
    **options: as for `tfjax.scaling.fit`, but for group.

  Raises:
    table.TableError: as `prefixes` and `tfjax.scaling.fit`.
  """
  points, refused = prefixes(curves)
  made = scaling.fit(points, law, group="run", **options)
  return dataclasses.replace(made, excluded=refused + made.excluded)


# --- Details -----------------------------------------------------------------


def _need(curves: pd.DataFrame, *names: str) -> None:
  missing = [name for name in names if name not in curves]
  if missing:
    raise table.TableError(
        f"a table of curves needs a column {', '.join(map(repr, missing))}; "
        f"it has {', '.join(map(str, curves.columns))}")


def _schedule(directory: pathlib.Path, steps: float
              ) -> tuple[str | None, float]:
  """Name of the learning-rate schedule and steps of warmup, where known."""
  path = directory / "config.json"
  config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
  optimizer = config.get("optimizer", {})
  warmup = optimizer.get("warmup_steps")
  if warmup is None:
    warmup = np.round(optimizer.get("warmup_fraction", np.nan) * steps)
  return optimizer.get("schedule"), float(warmup)


def _refusal(rows: pd.DataFrame) -> str:
  """Why the points of a run are not results of shorter runs, or nothing."""
  first = rows.iloc[0]
  schedule = first["schedule"]
  if "status" in rows and first["status"] != "complete":
    return str(first["status"])
  if not isinstance(schedule, str):
    return "its learning-rate schedule is unknown"
  if schedule != "constant":
    return (f"its learning rate decays (optimizer.schedule is {schedule!r}): "
            "a point before its end is not the result of a shorter run")
  if not np.isfinite(first["warmup_steps"]):
    return "its steps of warmup are unknown"
  if not (rows["step"] > rows["warmup_steps"]).any():
    return "it has no point after its warmup"
  return ""


def _whole(curves: pd.DataFrame, size: str, start: float
           ) -> tuple[pd.DataFrame, tuple[table.Excluded, ...]]:
  """Runs whose curve can be normalised, points in order; and the others."""
  _need(curves, "run", "flops", "loss", size)
  kept, excluded, seen = [], [], {}
  for name, rows in curves.groupby("run", sort=False):
    rows = rows.sort_values("flops", kind="stable")
    flops, loss = (rows[c].to_numpy(np.float64) for c in ("flops", "loss"))
    points = (flops.tobytes(), loss.tobytes())
    why = _flaw(rows, flops, loss, size, start)
    if not why and points in seen:
      why = f"repeats run {seen[points]}"
    if why:
      excluded.append(table.Excluded(str(name), why))
    else:
      seen[points] = name
      kept.append(rows)
  return (pd.concat(kept, ignore_index=True) if kept else curves.iloc[:0],
          tuple(excluded))


def _flaw(rows: pd.DataFrame, flops: FloatArray, loss: FloatArray, size: str,
          start: float) -> str:
  if "status" in rows and rows["status"].iloc[0] != "complete":
    return str(rows["status"].iloc[0])
  if rows[size].nunique(dropna=False) != 1 or rows[size].isna().any():
    return f"its {size} is not one number"
  bad = ~((loss > 0) & np.isfinite(loss))
  if bad.any():
    return f"a loss is {loss[bad][0]:g}; must be positive and finite"
  if not (np.isfinite(flops) & (flops >= 0)).all() or flops[-1] <= 0:
    return "its flops must be finite, and positive at the end"
  if (np.diff(flops) <= 0).any():
    return f"it has two points at {flops[1:][np.diff(flops) <= 0][0]:g} FLOPs"
  if flops[0] > start * flops[-1]:
    return (f"its first point is at {flops[0] / flops[-1]:.2g} of its compute; "
            f"curves are compared from {start:.2g} on")
  return ""


def _fit_ends(ends: pd.DataFrame, options: dict[str, Any]) -> result.Fit:
  if len(ends) < _LEAST_SIZES:
    raise table.TableError(
        f"{len(ends)} sizes do not determine the irreducible loss; at least "
        f"{_LEAST_SIZES} do, or give irreducible=")
  return scaling.fit(ends, "compute", flops="flops", **options)


def _at(rows: pd.DataFrame, grid: FloatArray) -> FloatArray:
  """Loss at shares of the run's compute, linear between its points."""
  flops = rows["flops"].to_numpy(np.float64)
  return np.interp(grid, flops / flops[-1], rows["loss"].to_numpy(np.float64))


def _spread(grid: FloatArray, sizes: np.ndarray, rest: FloatArray,
            value: FloatArray) -> pd.DataFrame:
  """`Collapse.spread` of L - L0 and normalised curves [runs, grid]."""
  groups = [sizes == n for n in np.unique(sizes)]
  means = np.array([value[g].mean(axis=0) for g in groups])
  seeds = [rest[g] for g in groups if g.sum() > 1]
  noise = (np.mean([_relative(r) for r in seeds], axis=0) if seeds
           else np.full(len(grid), np.nan))
  return pd.DataFrame({"x": grid, "spread": _relative(means),
                       "pooled": _relative(value), "noise": noise})


def _relative(values: FloatArray) -> FloatArray:
  """Standard deviation of a population over its mean, down the rows."""
  return values.std(axis=0) / values.mean(axis=0)
