# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table of runs may be fitted, and why the others may not.

Works on any pandas table with a size, a data and a loss column; columns of a
run record that it does not have are not asked for.
"""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

# Losses of runs that differ in one of these are not comparable.
SHARED = ("objective", "loss_counts", "corpus", "tokenizer", "vocab_size",
          "flops_convention")
# Below this there is no curve to speak of.
LEAST_ROWS = 3

_ALIASES = {"params": ("params_total", "params"),
            "tokens": ("tokens_seen", "tokens"),
            "flops": ("flops_total", "flops")}


class TableError(ValueError):
  """A table that cannot be fitted. The message says what would be right."""


@dataclasses.dataclass(frozen=True)
class Excluded:
  """A row that was left out, and why."""

  run: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns run, params, tokens, loss, flops (6 N D where unrecorded) and
  recorded_flops (NaN there), split into what is fitted and what is not."""

  fitted: pd.DataFrame
  held_out: pd.DataFrame
  excluded: tuple[Excluded, ...]
  conventions: dict[str, Any]


def prepare(frame: pd.DataFrame, *, params: str | None, tokens: str | None,
            flops: str | None, holdout: int) -> Table:
  """Names the columns, drops unusable rows, and sets the largest aside.

  Raises:
    TableError: a column is missing, losses are not comparable, or too few
      rows are left.
  """
  columns = {"params": _column(frame, "params", params),
             "tokens": _column(frame, "tokens", tokens),
             "flops": _column(frame, "flops", flops, needed=False),
             "loss": _column(frame, "loss", "loss")}
  reasons = _reasons(frame, columns)
  kept = frame[reasons == ""]
  shared = _shared(kept)
  runs = run_names(frame)
  excluded = tuple(
      Excluded(run, why) for run, why in zip(runs, reasons) if why)
  if len(kept) - holdout < LEAST_ROWS:
    raise TableError(
        f"too few runs to fit: {len(frame)} in the table, {len(excluded)} not "
        f"usable, {holdout} held out; at least {LEAST_ROWS} must be left"
        + "".join(f"\n  {e.run}: {e.reason}" for e in excluded[:10]))
  rows = pd.DataFrame({
      "run": runs[reasons == ""],
      **{name: kept[columns[name]].to_numpy(np.float64)
         for name in ("params", "tokens", "loss")}})
  rows["recorded_flops"] = (
      kept[columns["flops"]].to_numpy(np.float64) if columns["flops"]
      else np.nan)
  rows["flops"] = rows["recorded_flops"].where(
      rows["recorded_flops"] > 0, 6 * rows["params"] * rows["tokens"])
  rows = rows.sort_values(["flops", "params"], kind="stable",
                          ignore_index=True)
  split = len(rows) - holdout
  return Table(rows[:split], rows[split:].reset_index(drop=True), excluded,
               {**columns, **shared})


def count_complete(frame: pd.DataFrame) -> int:
  """Rows whose status is complete, or all where there is no status."""
  if "status" not in frame:
    return len(frame)
  return int((frame["status"] == "complete").sum())


def run_names(frame: pd.DataFrame) -> np.ndarray:
  """What a row is called: its run_id, or its place."""
  if "run_id" in frame:
    return frame["run_id"].astype(str).to_numpy(object)
  return np.array([f"row {index}" for index in frame.index], object)


def _column(frame: pd.DataFrame, axis: str, name: str | None,
            needed: bool = True) -> str | None:
  candidates = _ALIASES.get(axis, ()) if name is None else (name,)
  for candidate in candidates:
    if candidate in frame:
      if not pd.api.types.is_numeric_dtype(frame[candidate]):
        raise TableError(f"column {candidate!r} must hold numbers")
      return candidate
  if not needed and name is None:
    return None
  raise TableError(f"the table has no column {' or '.join(candidates)!r}; it "
                   f"has {', '.join(map(str, frame.columns))}")


def _reasons(frame: pd.DataFrame, columns: dict[str, str | None]) -> np.ndarray:
  """Per row, why it cannot be used; empty where it can."""
  reasons = np.full(len(frame), "", dtype=object)
  if "status" in frame:
    note = (frame["status_reason"] if "status_reason" in frame
            else pd.Series([None] * len(frame)))
    for i, (status, why) in enumerate(zip(frame["status"], note)):
      if status != "complete":
        reasons[i] = f"{status}: {why}" if isinstance(why, str) and why else (
            str(status))
  for axis in ("params", "tokens", "loss"):
    values = frame[columns[axis]].to_numpy(np.float64, na_value=np.nan)
    for i, value in enumerate(values):
      if not reasons[i] and not (np.isfinite(value) and value > 0):
        reasons[i] = (f"{columns[axis]} is {value:g}; must be positive and "
                      "finite")
  identity = [c for c in ("run_id", "sweep", *filter(None, columns.values()))
              if c in frame]
  repeated = frame.duplicated(subset=identity).to_numpy()
  if "run_id" in frame:  # Without names, equal rows may be distinct seeds.
    reasons[(reasons == "") & repeated] = "repeats another row"
  return reasons


def _shared(frame: pd.DataFrame) -> dict[str, Any]:
  """The one value of each column that comparable losses share."""
  shared = {}
  for name in SHARED:
    if name not in frame or not len(frame):
      continue
    values = sorted(
        frame[name].map(lambda v: "unknown" if pd.isna(v) else v).unique(),
        key=str)
    if len(values) > 1:
      raise TableError(
          f"losses are not comparable: the runs differ in {name} "
          f"({', '.join(map(str, values))}); fit each by itself")
    value = values[0]
    if isinstance(value, float):
      value = int(value)  # vocab_size: a float only to hold NaN.
    shared[name] = None if value == "unknown" else value
  return shared
