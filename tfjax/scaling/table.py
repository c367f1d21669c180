# SPDX-License-Identifier: Apache-2.0
"""Which rows of a table of runs may be fitted, and why the others may not.

Works on any pandas table with the columns that a law needs; columns of a run
record that it does not have are not asked for. Which column is which axis is
decided in `columns`; here, which of its rows count.
"""

import dataclasses
from typing import Any, Callable, Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from tfjax.scaling import columns as columns_lib
from tfjax.scaling import forms
from tfjax.scaling import records

TableError = columns_lib.TableError
run_names = columns_lib.run_names

# Losses of runs that differ in one of these are not comparable.
SHARED = ("objective", "loss_counts", "corpus", "tokenizer", "vocab_size",
          "flops_convention")
# Below this there is no curve to speak of.
LEAST_ROWS = 3
# Seeds move a loss by some 0.1%, so that losses written with fewer significant
# digits than this may agree by chance, and longer ones hardly.
_TELLING_DIGITS = 5
# C / (N D) is 2 for a forward pass, 6 for training, some 10 to 200 where
# attention and the head outweigh a small N, and some 0.3 where N counts idle
# experts. A slip of a unit is a factor of 1000 and more.
_FLOPS_PER_PARAMETER_TOKEN = (0.05, 1000.0)
# From a first checkpoint to a tiny model on all there is.
_TOKENS_PER_PARAMETER = (1e-3, 1e6)
# Fewer parameters or tokens than this are a count of millions or billions.
_LEAST_COUNT = 1000.0
_SHARES = ("error", "accuracy")
# What, with a run's name, tells its rows apart where these columns are there.
_PLACES = ("sweep", "seed", "steps", "step", "tokens_seen", "tokens")
_NAMED = 3  # runs of each kind that a message lists


@dataclasses.dataclass(frozen=True)
class Excluded:
  """A row that was left out, and why."""

  run: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Table:
  """What is fitted, and what is not.

  `fitted` and `held_out` have the columns run, row (the place in the table
  that was given), each axis of the law, its target, flops (6 N D where
  unrecorded; NaN without N and D), recorded_flops (NaN where unrecorded),
  weight (1 where unset) and group (the run where unset), sorted by flops.
  `conventions` says which column each axis is or how it is derived, what the
  runs share, and, as notes, what was chosen among several, and what runs that
  are fitted together had better share too.
  """

  fitted: pd.DataFrame
  held_out: pd.DataFrame
  excluded: tuple[Excluded, ...]
  conventions: dict[str, Any]


def prepare(
    frame: pd.DataFrame,
    law: forms.Law,
    *,
    columns: Mapping[str, str | None],
    holdout: int,
    weights: str | None = None,
    stderr: str | None = None,
    group: str | None = None,
    space: str = "log",
) -> Table:
  """Names the columns, drops unusable rows, and sets the largest aside.

  Args:
    frame: one row a run, or several checkpoints of each.
    law: whose axes and target are needed.
    columns: axis or target -> column, where the caller says so.
    holdout: so many rows with the most FLOPs are set aside; without FLOPs
      those with the largest first axis, of losses the smallest.
    weights: column of row weights, used as they are.
    stderr: column of standard errors of the target, in its own unit. The
      weight is 1 / stderr^2, in log space 1 / (stderr / target)^2, over the
      mean of the fitted rows'.
    group: column of what is resampled together.
    space: of residuals, "log" or "linear".

  Raises:
    TableError: a column is missing or holds no numbers, losses are not
      comparable, a unit is wrong, or too few rows are left.
  """
  if weights is not None and stderr is not None:
    raise TableError(f"weights ({weights!r}) and stderr ({stderr!r}) are two "
                     "answers to one question; give one")
  read = columns_lib.read(frame, law, columns)
  values = read.values.copy()
  values.insert(0, "run", run_names(frame))
  values.insert(1, "row", np.arange(len(frame)))
  values["weight"] = _weights(frame, values[law.target].to_numpy(), weights,
                              stderr, space)
  values["group"] = (_runs(frame, values) if group is None
                     else frame[columns_lib.find(frame, group)].to_numpy())
  reasons = _reasons(frame, law, read, values, weights or stderr, space)
  kept = values[reasons == ""]
  shared = _shared(frame[reasons == ""])
  excluded = tuple(Excluded(run, why) for run, why
                   in zip(values["run"], reasons) if why)
  if len(kept) - holdout < LEAST_ROWS:
    raise TableError(
        f"too few runs to fit: {len(frame)} in the table, {len(excluded)} not "
        f"usable, {holdout} held out; at least {LEAST_ROWS} must be left"
        + "".join(f"\n  {e.run}: {e.reason}" for e in excluded[:10]))
  _check_target(law, kept)
  kept = kept.iloc[_order(law, kept)].reset_index(drop=True)
  split = len(kept) - holdout
  if stderr is not None:
    kept["weight"] /= kept["weight"][:split].mean()
  said = [*read.notes, *_mixed(frame[reasons == ""])]
  notes = {"notes": "; ".join(said)} if said else {}
  return Table(kept[:split], kept[split:].reset_index(drop=True), excluded,
               {**read.sources, **shared, **notes})


def count_complete(frame: pd.DataFrame) -> int:
  """Rows whose status is complete, or all where there is no status."""
  if "status" not in frame:
    return len(frame)
  return int((frame["status"] == "complete").sum())


# --- Rows --------------------------------------------------------------------

Fault = tuple[np.ndarray, Callable[[int], str]]  # which rows; why, by place


def _reasons(frame: pd.DataFrame, law: forms.Law, read: columns_lib.Columns,
             values: pd.DataFrame, weighting: str | None, space: str
             ) -> np.ndarray:
  """Per row, why it cannot be used; empty where it can."""
  reasons = np.full(len(frame), "", dtype=object)

  def exclude(faults: Iterable[Fault]) -> None:
    for bad, why in faults:
      for place in np.flatnonzero(bad & (reasons == "")):
        reasons[place] = why(place)

  if "status" in frame:
    exclude([(np.array([s != "complete" for s in frame["status"]]),
              lambda place: _status(frame.iloc[place]))])
  exclude(_value_faults(law, read, values, space))
  exclude(_unit_faults(law, read, values))
  if weighting is not None:
    given = columns_lib.to_numbers(frame, weighting)
    exclude([(~_positive(given), lambda place: f"{weighting} is "
              f"{given[place]:g}; must be positive and finite")])
  exclude([(values["group"].isna().to_numpy(),
            lambda place: "its group is unknown")])
  good = np.flatnonzero(reasons == "")
  exclude((_scatter(bad, good, len(frame)), why) for bad, why
          in _repetitions(frame.iloc[good], values.iloc[good], law))
  return reasons


def _status(row: pd.Series) -> str:
  status, why = row["status"], row.get("status_reason")
  if status not in records.STATUSES:
    return f"status is {status!r}, not 'complete'"
  return f"{status}: {why}" if isinstance(why, str) and why else status


def _value_faults(law: forms.Law, read: columns_lib.Columns,
                  values: pd.DataFrame, space: str) -> Iterator[Fault]:
  """Numbers that no run can have."""
  for name in (*law.axes, law.target):
    value = values[name].to_numpy()
    good, valid = _positive(value), "positive and finite"
    if name in _SHARES:
      good = ((value >= 0) if space == "linear" else good) & (value <= 1)
      valid = "a share from 0 to 1, not per cent"
    elif name == law.target != "loss" and space == "linear":
      good, valid = np.isfinite(value), "finite"
    yield ~good, lambda place, value=value, name=name, valid=valid: (
        f"{read.sources[name]} is {value[place]:g}; must be {valid}")
  flops = values["recorded_flops"].to_numpy()
  yield ~(_positive(flops) | np.isnan(flops)), lambda place: (
      f"{read.sources['flops']} is {flops[place]:g}; must be positive and "
      "finite, or empty")
  if {"unique_tokens", "tokens"} <= set(law.axes):
    unique, tokens = (values[c].to_numpy() for c in ("unique_tokens", "tokens"))
    yield unique > tokens, lambda place: (
        f"{unique[place]:g} unique tokens are more than the {tokens[place]:g} "
        "that were seen")


def _unit_faults(law: forms.Law, read: columns_lib.Columns,
                 values: pd.DataFrame) -> Iterator[Fault]:
  """Counts that are in another unit, where two of them meet in one law.

  Raises:
    TableError: most rows are, so that it is the column.
  """
  names, checks = read.sources, []
  if "tokens_per_parameter" in law.axes:
    checks.append(("tokens per parameter",
                   values["tokens_per_parameter"].to_numpy(),
                   *_TOKENS_PER_PARAMETER, "a unit is wrong: give counts"))
  if {"params", "tokens"} <= set(law.axes):
    checks += [(names[axis], values[axis].to_numpy(), _LEAST_COUNT, np.inf,
                "must be the count itself, not thousands, millions or billions")
               for axis in ("params", "tokens")]
    ratio = values["recorded_flops"] / values["params"] / values["tokens"]
    checks.append((
        f"{names['flops']} / ({names['params']} * {names['tokens']})",
        ratio.to_numpy(), *_FLOPS_PER_PARAMETER_TOKEN,
        "training takes about 6 FLOPs a parameter and token, so a unit is "
        "wrong: give counts, not millions, sequences or PFLOP-days"))
  for what, value, low, high, valid in checks:
    known = _positive(value)
    bad = known & ~((low <= value) & (value <= high))
    if 2 * bad.sum() > known.sum():
      raise TableError(f"{what} has a median of {np.median(value[known]):.3g}; "
                       f"{valid}")
    yield bad, lambda place, what=what, value=value, valid=valid: (
        f"{what} is {value[place]:.3g}; {valid}")


def _repetitions(frame: pd.DataFrame, values: pd.DataFrame, law: forms.Law
                 ) -> Iterator[Fault]:
  """Rows that are a copy of an earlier one, or contradict another.

  A run with a name is at one place once: with one value of the target, the
  first row counts, with two, none does. Rows without names may be seeds: only
  those alike in every column of the table are copies, and only where losses
  are written in more digits than seeds have in common.
  """
  if "run_id" not in frame:
    digits = [len(f"{value:.14e}".split("e")[0].replace(".", "").rstrip("0"))
              for value in values[law.target]]
    if max(digits, default=0) >= _TELLING_DIGITS:
      yield (frame.astype(str).duplicated().to_numpy(),
             lambda place: "repeats another row")
    return
  places = values[["run", *law.axes]].assign(**{
      f"recorded {name}": frame[name].to_numpy()
      for name in _PLACES if name in frame})
  where = places.groupby(list(places), dropna=False).ngroup()
  count = values[law.target].groupby(where).transform("nunique").to_numpy()
  yield count > 1, lambda place: (
      f"contradicts another row of the same run in its {law.target}")
  yield where.duplicated().to_numpy(), lambda place: "repeats another row"


def _runs(frame: pd.DataFrame, values: pd.DataFrame) -> np.ndarray:
  """What is a run of its own: a name, or where there is none the row, also
  where tables that were put together repeat the labels of an index."""
  if frame.index.is_unique:
    return values["run"].to_numpy()
  named = (frame["run_id"].notna().to_numpy() if "run_id" in frame
           else np.zeros(len(frame), bool))
  return np.where(named, values["run"], [f"row {k}" for k in values["row"]])


def _scatter(bad: np.ndarray, good: np.ndarray, count: int) -> np.ndarray:
  """A mask of the rows `good` as one of all."""
  mask = np.zeros(count, bool)
  mask[good[bad]] = True
  return mask


def _positive(value: np.ndarray) -> np.ndarray:
  return (value > 0) & np.isfinite(value)


def _weights(frame: pd.DataFrame, target: np.ndarray, weights: str | None,
             stderr: str | None, space: str) -> np.ndarray:
  """Weight a row, NaN where it has none."""
  if weights is not None:
    return columns_lib.to_numbers(frame, weights)
  if stderr is None:
    return np.ones(len(frame))
  errors = columns_lib.to_numbers(frame, stderr)
  errors = np.where(errors > 0, errors, np.nan)
  return ((target if space == "log" else 1.0) / errors) ** 2


def _order(law: forms.Law, kept: pd.DataFrame) -> np.ndarray:
  """Positions from the smallest run to the largest."""
  first = law.axes[0]
  size = kept[first] * (-1 if first == "loss" else 1)  # Large runs lose little.
  cost = kept["flops"]
  keys = (size,) if cost.isna().any() else (size, cost)
  return np.lexsort(keys)


# --- Tables ------------------------------------------------------------------


def _check_target(law: forms.Law, kept: pd.DataFrame) -> None:
  values = kept[law.target]
  if values.nunique() == 1:
    raise TableError(f"{law.target} is {values.iloc[0]:g} in every row: there "
                     "is no trend to fit")


def _shared(frame: pd.DataFrame) -> dict[str, Any]:
  """The one value of each column that comparable losses share."""
  shared = {}
  names = run_names(frame)
  for name in SHARED:
    if name not in frame or not len(frame):
      continue
    column = frame[columns_lib.find(frame, name)]
    values = column.astype(object).where(column.notna(), None)
    kinds = sorted(set(values), key=str)
    if len(kinds) > 1:
      counts = [_count(kind, names[[v == kind for v in values]])
                for kind in kinds]
      known = next(kind for kind in kinds if kind is not None)
      raise TableError(
          f"the runs are not comparable, they differ in {name}: "
          f"{'; '.join(counts)}. Fit each kind by itself: "
          f"frame[frame[{name!r}] == {_plain(known)!r}]")
    shared[name] = _plain(kinds[0])
  return shared


def _mixed(frame: pd.DataFrame) -> list[str]:
  """That runs are of several schedules: each ends at a loss of its own, and so
  does a law."""
  if "schedule" not in frame:
    return []
  kinds = frame["schedule"].value_counts().sort_index()
  if len(kinds) < 2:
    return []
  counts = " and ".join(f"{count} of {kind}" for kind, count in kinds.items())
  return [f"runs of several learning-rate schedules are fitted as one, {counts}: "
          "give each a workdir of its own"]


def _count(kind: Any, runs: np.ndarray) -> str:
  named = ", ".join(runs[:_NAMED]) + (", ..." if len(runs) > _NAMED else "")
  value = "unknown" if kind is None else repr(_plain(kind))
  return f"{value} in {len(runs)} ({named})"


def _plain(value: Any) -> Any:
  """A value as JSON has it: vocab_size is a float only to hold NaN."""
  if isinstance(value, float) and value.is_integer():
    return int(value)
  return value.item() if isinstance(value, np.generic) else value
