# SPDX-License-Identifier: Apache-2.0
"""What runs have cost, by their records: sums, against what was forecast, and
against what their losses cost on the frontier.

Numbers alone; `cost_section` puts them on a page, `figures.cost` in a figure.
Nothing is estimated here: what a record does not hold is unknown, and a sum
says how many of its runs are. Forecasts are made by scripts/plan.py.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any, Collection, Mapping

import numpy as np
import pandas as pd

from tfjax.scaling import frontier
from tfjax.scaling import inverse
from tfjax.scaling import records
from tfjax.scaling import result
from tfjax.scaling import table

FORECAST = "cost.json"  # in the directory of runs
# Quantities, their units in their names. Hours are those of a run from its
# claim to its result, of an ensemble's member its share of them; device-hours
# the same times its devices.
QUANTITIES = ("flops", "hours", "device_hours", "price_usd", "energy_kwh",
              "co2e_kg")
# What is bought with FLOPs: at a run's own rate, its share of FLOPs.
BOUGHT = ("device_hours", "price_usd", "energy_kwh", "co2e_kg")
PARTS = ("startup", "compile", "input", "step", "evaluation", "checkpoint",
         "lost")

_SECONDS = 3600.0  # in an hour
# Of a forecast's run: key, and what it is divided by.
_FORECAST_KEYS = {
    "flops": ("flops", 1.0), "hours": ("seconds", _SECONDS),
    "device_hours": ("device_seconds", _SECONDS),
    "price_usd": ("price_usd", 1.0), "energy_kwh": ("energy_kwh", 1.0),
    "co2e_kg": ("co2e_kg", 1.0)}
DRAWS = 200  # at most, of the bootstrap, for bands of what is off the frontier
_FACTORS = (0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Total:
  """A sum over the runs that know their share of it, and how many do not."""

  value: float  # NaN where no run knows
  known: int
  unknown: int

  @classmethod
  def of(cls, column: pd.Series) -> "Total":
    known = int(column.notna().sum())
    return cls(float(column.sum()) if known else math.nan, known,
               len(column) - known)


@dataclasses.dataclass(frozen=True)
class Forecast:
  """What a sweep was expected to cost before it ran.

  Attributes:
    path: of the file.
    basis: how its hours were obtained, in words.
    hours: from the first start to the last end, with so many workers.
    runs: run and `QUANTITIES`, NaN where unknown, one row a run.
  """

  path: pathlib.Path
  created: str | None
  basis: str | None
  hardware: str | None
  workers: int | None
  hours: float | None
  runs: pd.DataFrame


def spent(frame: pd.DataFrame) -> pd.DataFrame:
  """What each run has cost, whatever became of it.

  Args:
    frame: run records, as `records.load` has them.

  Returns:
    A row for each of the frame's, under its index: run, status, `QUANTITIES`
    (NaN where unknown), and occupied: whether its device-hours are those that
    are paid for, from claim to result; else they are those inside training
    steps, which is all that the record holds. What a run shares with the trunk
    that it branched off is the trunk's alone; `shared` are the FLOPs of it, 0
    of a run that trained alone, and `shared_device_hours` what they took there
    (NaN where unknown, or where the run's own are not those paid for).
    `begin_device_hours` are those of its own start and compilation, 0 where
    unknown.
  """
  occupied = frame["occupied_device_seconds"]
  shared = frame["shared_flops"].fillna(0.0)
  return pd.DataFrame({
      "run": table.run_names(frame), "status": frame["status"],
      "flops": frame["flops_total"] - shared, "shared": shared,
      "shared_device_hours":
          frame["shared_device_seconds"].where(occupied.notna()) / _SECONDS,
      "begin_device_hours": (
          (frame["startup_seconds"] + frame["compile_seconds"])
          * frame["device_count"]).fillna(0.0) / _SECONDS,
      "hours": frame["wall_seconds"] / _SECONDS,
      "device_hours": occupied.fillna(frame["device_seconds"]) / _SECONDS,
      "price_usd": frame["price_usd"], "energy_kwh": frame["energy_kwh"],
      "co2e_kg": frame["co2e_kg"], "occupied": occupied.notna()},
      index=frame.index)


def alone(spent: pd.DataFrame) -> pd.DataFrame:
  """The same, with what each run would have cost alone: of one that shared a
  trunk the whole way.

  Device-hours are its own and those of the trunk up to there, with one start
  and compilation, the trunk's; where the trunk's are unknown, as many times its
  own as FLOPs are. Hours, money and energy are at its own rate of device-hours.
  `shared` is left to tell which these are.
  """
  flops = spent["flops"] + spent["shared"]
  hours = (spent["device_hours"] + spent["shared_device_hours"]
           - spent["begin_device_hours"])
  by_flops = _over(flops.to_numpy(), spent["flops"].to_numpy())
  by_hours = _over(hours.to_numpy(), spent["device_hours"].to_numpy())
  scale = np.where(spent["shared"] > 0,
                   np.where(np.isnan(by_hours), by_flops, by_hours), 1.0)
  whole = {name: spent[name] * scale for name in QUANTITIES}
  return spent.assign(**whole | dict(flops=flops))


def read_forecast(workdir: str | os.PathLike[str]) -> Forecast | None:
  """The forecast that scripts/plan.py has left; None where it has not.

  Raises:
    records.RecordError: the file is damaged: it says in which field.
  """
  path = pathlib.Path(workdir) / FORECAST
  if not path.is_file():
    return None
  content = records.read_json(path)
  runs, total = content.get("runs"), content.get("total") or {}
  if not isinstance(runs, list) or not all(isinstance(r, dict) for r in runs):
    raise records.RecordError(path, "'runs' must be a list of objects")
  if not isinstance(total, dict):
    raise records.RecordError(path, f"'total' must be an object, not {total!r}")
  rows = [_forecast_run(path, place, run) for place, run in enumerate(runs)]
  made = pd.DataFrame(rows, columns=["run", *QUANTITIES]).astype(
      dict.fromkeys(QUANTITIES, "float64"))
  repeated = made["run"][made["run"].duplicated()]
  if len(repeated):
    raise records.RecordError(
        path, f"'runs' holds {repeated.iloc[0]!r} more than once")
  for name, least in (("workers", 1.0), ("total.hours", 0.0)):
    key = name.rpartition(".")[2]
    records.check_number(path, name, (total if "." in name else content
                                      ).get(key), least)
  texts = {}
  for name in ("created", "basis", "hardware"):
    texts[name] = content.get(name)
    if not isinstance(texts[name], str | None):
      raise records.RecordError(
          path, f"{name!r} must be text or null, not {texts[name]!r}")
  return Forecast(path, **texts, workers=content.get("workers"),
                  hours=total.get("hours"), runs=made)


def compare(runs: pd.DataFrame, forecast: Forecast) -> pd.DataFrame:
  """Forecast and spent side by side, one row a run.

  Args:
    runs: as `spent` has them; a run that several records are of has cost what
      they have together.
    forecast: of the same sweep.

  Returns:
    run, status (None where there is no record), planned (whether it was
    forecast), and for each quantity its _predicted, _spent and _ratio, spent
    over predicted; NaN where unknown. Runs that were forecast and have no
    record come last.
  """
  whole = dict.fromkeys(QUANTITIES, lambda column: column.sum(skipna=False))
  ours = runs.groupby("run", sort=False).agg(
      {"status": lambda kinds: ", ".join(dict.fromkeys(kinds))} | whole)
  theirs = forecast.runs.set_index("run")
  names = [*ours.index, *theirs.index.difference(ours.index, sort=False)]
  ours, planned = ours.reindex(names), theirs.reindex(names)
  columns = {
      "run": names, "planned": np.isin(names, theirs.index),
      "status": pd.Series([None if pd.isna(status) else status
                           for status in ours["status"]], dtype=object)}
  for name in QUANTITIES:
    predicted, real = planned[name].to_numpy(), ours[name].to_numpy()
    columns |= {f"{name}_predicted": predicted, f"{name}_spent": real,
                f"{name}_ratio": _over(real, predicted)}
  return pd.DataFrame(columns)


def time_parts(frame: pd.DataFrame) -> pd.DataFrame:
  """Where the time from claim to result went, in run-hours.

  Args:
    frame: run records, as `records.load` has them.

  Returns:
    One row a part that some run knows, the rest as "other": part; hours, and
    share of the hours of the runs that know it; least and most, of one run's
    share. Empty where no run knows its wall time.
  """
  wall = frame["wall_seconds"].where(frame["wall_seconds"] > 0)
  parts = {name: frame[f"{name}_seconds"] for name in PARTS}
  parts["other"] = wall - sum(parts.values())
  rows = []
  for name, seconds in parts.items():
    known = seconds.notna() & wall.notna()
    if not known.any():
      continue
    share = seconds[known] / wall[known]
    rows.append({"part": name, "hours": seconds[known].sum() / _SECONDS,
                 "share": seconds[known].sum() / wall[known].sum(),
                 "least": share.min(), "most": share.max(),
                 "runs": int(known.sum())})
  return pd.DataFrame(
      rows, columns=["part", "hours", "share", "least", "most", "runs"])


def no_frontier(fit: result.Fit | None) -> str:
  """Why there is nothing to compare runs with; empty where there is."""
  if fit is None:
    return "there is no fit"
  try:
    frontier.method(fit.law)
  except ValueError as error:
    return str(error)
  if fit.cost is None:
    return "what N and D cost is unknown, as the table does not hold them"
  if len(fit.samples) and not fit.has_intervals:
    return "the parameters of the fitted law have no intervals"
  return ""


def off_frontier(fit: result.Fit, runs: pd.DataFrame,
                 cost: pd.DataFrame) -> pd.DataFrame:
  """What each run's loss would have cost on the frontier.

  The loss is the law's at the run's N and D. What it costs on the frontier is
  what the run has cost over its `overhead` (`inverse.on_frontier`): the run's
  own rate of FLOPs for money, energy and time is taken to hold there, and for
  what it shared with a trunk.

  Args:
    fit: of a law for which `no_frontier` has nothing to say.
    runs: run, params, tokens, flops, one row each.
    cost: of these and other runs, as `spent` has it.

  Returns:
    run; loss, params, tokens; overhead with _low and _high; optimal_params;
    flops and `BOUGHT` (NaN where unknown), and each again as _optimal.
  """
  fewer = dataclasses.replace(fit, samples=fit.samples[:DRAWS])
  made = inverse.on_frontier(fewer, runs["params"].to_numpy(),
                             runs["tokens"].to_numpy())
  paid = alone(cost).drop_duplicates("run", keep=False).set_index(
      "run").reindex(runs["run"])
  columns = {"run": runs["run"].to_numpy(), **{
      name: made[name] for name in (
          "loss", "params", "tokens", "overhead", "overhead_low",
          "overhead_high", "optimal_params")}}
  for name in ("flops", *BOUGHT):
    value = (runs if name == "flops" else paid)[name].to_numpy(np.float64)
    columns |= {name: value, f"{name}_optimal": _over(
        value, made["overhead"].to_numpy())}
  return pd.DataFrame(columns)


def other_sizes(fit: result.Fit, row: Mapping[str, Any]) -> pd.DataFrame:
  """What the loss of one run would cost at several times the optimal N.

  Args:
    fit: the one that `off_frontier` was asked with.
    row: of what it gave.

  Returns:
    factor (of N*), params, tokens, then overhead (times the compute of the
    optimum) with _low and _high, flops, and `BOUGHT` at the run's own rate;
    infinite where a model of that size never has the loss.
  """
  fewer = dataclasses.replace(fit, samples=fit.samples[:DRAWS])
  budget = fit.cost.flops(row["params"], row["tokens"]) / row["overhead"]
  made = inverse.off_optimum(fewer, budget, _FACTORS)
  overhead = made["overhead"].to_numpy()
  return pd.DataFrame({
      **{name: made[name] for name in (
          "factor", "params", "overhead", "overhead_low", "overhead_high")},
      "tokens": fit.cost.tokens(made["params"].to_numpy(), overhead * budget),
      **{name: overhead * row[f"{name}_optimal"]
         for name in ("flops", *BOUGHT)}})


def known(frame: pd.DataFrame, names: Collection[str]) -> list[str]:
  """Those of the columns that hold a number."""
  return [name for name in names if frame[name].notna().any()]


# --- Details -----------------------------------------------------------------


def _forecast_run(path: pathlib.Path, place: int,
                  run: dict[str, Any]) -> dict[str, Any]:
  name = run.get("run_id")
  if not isinstance(name, str) or not name:
    raise records.RecordError(
        path, f"'runs[{place}].run_id' must be a run's name, not {name!r}")
  for key, _ in _FORECAST_KEYS.values():
    records.check_number(path, f"runs[{place}].{key}", run.get(key), 0.0)
  return {"run": name, **{
      quantity: math.nan if run.get(key) is None else run[key] / unit
      for quantity, (key, unit) in _FORECAST_KEYS.items()}}


def _over(value: np.ndarray, by: np.ndarray) -> np.ndarray:
  """value / by; NaN where there is nothing to divide by."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(by > 0, value / by, np.nan)
