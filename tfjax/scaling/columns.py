# SPDX-License-Identifier: Apache-2.0
"""From a table's columns to the numbers that a law asks for.

Names, aliases, derived axes and the reading of numbers are here; which rows
may be used is decided in `table`.
"""

import dataclasses
import decimal
import numbers
from typing import Any, Mapping

import numpy as np
import pandas as pd

from tfjax.scaling import forms

# What an axis is called, in run records and elsewhere; the first wins.
ALIASES = {"params": ("params_total", "params"),
           "tokens": ("tokens_seen", "tokens"),
           "flops": ("flops_total", "flops"),
           "width": ("width", "d_model"),
           "depth": ("depth", "num_layers")}


class TableError(ValueError):
  """A table that cannot be fitted. The message says what would be right."""


@dataclasses.dataclass(frozen=True)
class Columns:
  """Numbers by axis and target, and where each came from.

  `values` has a column for each of the law's axes and its target, `flops`
  (6 N D where none is recorded; NaN without N and D) and `recorded_flops`
  (NaN where none is); rows are the frame's, in its order. `sources` is the
  name of the column, or how it is derived; None for what there is none of.
  """

  values: pd.DataFrame
  sources: dict[str, str | None]
  notes: tuple[str, ...]


def read(frame: pd.DataFrame, law: forms.Law,
         chosen: Mapping[str, str | None]) -> Columns:
  """Finds and derives the columns of a law.

  Args:
    frame: one row a run.
    law: whose axes and target.
    chosen: axis or target -> column, where the caller says so.

  Raises:
    TableError: a column is missing, is there twice, or does not hold numbers.
  """
  reader = _Reader(frame, law, chosen)
  wanted = dict.fromkeys((*law.axes, law.target))
  values = {axis: reader.get(axis) for axis in wanted}
  unknown = np.full(len(frame), np.nan)
  recorded = reader.recorded("flops")
  values["recorded_flops"] = unknown if recorded is None else recorded
  if "flops" not in wanted:
    try:
      derived = reader.derived("flops")
    except TableError:
      derived = None  # Nothing but the order of runs is lost.
    missing = np.isnan(values["recorded_flops"])
    values["flops"] = np.where(
        missing, unknown if derived is None else derived,
        values["recorded_flops"])
    if recorded is not None and derived is not None and missing.any():
      reader.notes.append(f"flops are 6 N D in {missing.sum()} of {len(frame)} "
                          f"rows, without {reader.sources['flops']}")
    reader.sources.setdefault("flops", None)
  return Columns(pd.DataFrame(values), reader.sources, tuple(reader.notes))


def find(frame: pd.DataFrame, name: str) -> str:
  """The column of that name, which must be there once.

  Raises:
    TableError: it is not.
  """
  count = list(frame.columns).count(name)
  if count == 0:
    raise TableError(f"the table has no column {name!r}; it has "
                     f"{', '.join(map(str, frame.columns))}")
  if count > 1:
    raise TableError(f"the table has {count} columns called {name!r}; "
                     "rename or drop all but one")
  return name


def to_numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
  """A column as float64, NaN where it is empty.

  Raises:
    TableError: it is not there, or holds something else than numbers.
  """
  column = frame[find(frame, name)]
  kind = pd.api.types
  if (not kind.is_numeric_dtype(column) or kind.is_bool_dtype(column)
      or kind.is_complex_dtype(column)):
    for row, value in zip(run_names(frame), column):
      if not _is_number(value):
        raise TableError(f"column {name!r} must hold numbers; {row} has "
                         f"{value!r}")
  return column.to_numpy(np.float64, na_value=np.nan)


def run_names(frame: pd.DataFrame) -> np.ndarray:
  """What a row is called: its run_id, or its place."""
  places = [f"row {index}" for index in frame.index]
  if "run_id" not in frame:
    return np.array(places, object)
  return np.array([place if pd.isna(name) else str(name) for place, name
                   in zip(places, frame[find(frame, "run_id")])], object)


class _Reader:
  """Columns of one frame, with where each came from."""

  def __init__(self, frame: pd.DataFrame, law: forms.Law,
               chosen: Mapping[str, str | None]):
    known = dict.fromkeys((*law.axes, law.target, "params", "tokens", "flops"))
    for axis in chosen:
      if axis not in known:
        raise TableError(f"law {law.name!r} has no axis {axis!r} to take from "
                         f"a column; it has {', '.join(known)}")
    self._frame, self._law = frame, law
    self._chosen = {axis: name for axis, name in chosen.items()
                    if name is not None}
    self.sources: dict[str, str | None] = {}
    self.notes: list[str] = []

  def recorded(self, axis: str) -> np.ndarray | None:
    """The column of an axis, None where there is none and none was chosen."""
    if axis in self._chosen:
      names = (find(self._frame, self._chosen[axis]),)
    else:
      names = tuple(name for name in ALIASES.get(axis, (axis,))
                    if name in self._frame)
    if not names:
      return None
    values = to_numbers(self._frame, names[0])
    if axis not in self.sources:
      self.sources[axis] = names[0]
      for other in names[1:]:
        if self._differs(values, other):
          self.notes.append(f"{axis} is {names[0]}; the table also has "
                            f"{other}, which differs")
    return values

  def _differs(self, values: np.ndarray, other: str) -> bool:
    try:
      return not np.array_equal(values, to_numbers(self._frame, other),
                                equal_nan=True)
    except TableError:
      return False  # Text, for readers.

  def get(self, axis: str) -> np.ndarray:
    """The column of an axis, or what follows from others."""
    values = self.recorded(axis)
    if values is None:
      values = self.derived(axis)
    if values is not None:
      return values
    names = " or ".join(map(repr, ALIASES.get(axis, (axis,))))
    raise TableError(
        f"the table has no column {names}, the {axis} of law "
        f"{self._law.name!r}; it has "
        f"{', '.join(map(str, self._frame.columns))}")

  def derived(self, axis: str) -> np.ndarray | None:
    """What follows from other columns, where they are there."""
    if axis not in _DERIVED:
      return None
    source, inputs, function = _DERIVED[axis]
    parts = [self.recorded(name) for name in inputs]
    if any(part is None for part in parts):
      return None
    self.sources.setdefault(axis, source)
    good = np.all([part > 0 for part in parts], axis=0)  # not (-1) * (-1)
    return np.where(good, function(*parts), np.nan)


_DERIVED = {
    # Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    "flops": ("6 N D", ("params", "tokens"), lambda n, d: 6 * n * d),
    "tokens_per_parameter": ("D / N", ("params", "tokens"),
                             lambda n, d: d / n),
}


def _is_number(value: Any) -> bool:
  if isinstance(value, bool | np.bool_):
    return False
  return value is None or value is pd.NA or isinstance(
      value, numbers.Real | decimal.Decimal)
