# SPDX-License-Identifier: Apache-2.0
"""Every run of a directory as a row of one table, Parquet or CSV.

A row has the fields of the run's record under their own names, of its config
every dotted key as config.KEY, and what its cell set as overrides.KEY. What is
not known is null. Analysis is `tfjax.scaling`'s, which reads the records
themselves.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import typing
from typing import Any, Callable, Iterator, Mapping, Sequence

import pyarrow as pa
from pyarrow import csv
from pyarrow import parquet

from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep.specs import flat
from tfjax.train import records


class CollectError(ValueError):
  """A table that cannot be made or written; the message says why."""


def table(workdir: str | os.PathLike[str],
          run_ids: Sequence[str] | None = None) -> pa.Table:
  """A row for every planned run, in the plan's order, then for every other
  run that has a config.json below `workdir`.

  Whole numbers stay whole beside nulls; lists are JSON texts, and objects
  (such as flops_by_component) a column for each of their keys.

  Args:
    run_ids: these runs alone.

  Raises:
    CollectError: there is no run, or a file of one is damaged.
    RecordError: a result is damaged.
  """
  workdir = pathlib.Path(workdir)
  overrides = _planned(workdir)
  if run_ids is None:
    run_ids = list(dict.fromkeys([*overrides, *(
        path.parent.name for path in sorted(workdir.glob("*/config.json")))]))
  if not run_ids:
    raise CollectError(f"there are no runs in {workdir}")
  rows = [_row(workdir, run_id, overrides.get(run_id)) for run_id in run_ids]
  columns = _declared()
  for row in rows:
    columns |= {name: None for name in row if name not in columns}
  arrays = {name: _array([row.get(name) for row in rows], kind)
            for name, kind in sorted(columns.items(), key=_place)}
  return pa.table(arrays)


def write(frame: pa.Table, path: str | os.PathLike[str]) -> None:
  """Writes the table as its ending says; whole or not at all.

  Raises:
    CollectError: the ending is neither .parquet nor .csv, or the file cannot
      be written.
  """
  path = pathlib.Path(path)
  check_ending(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[path.suffix.lower()](frame, temporary)
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise CollectError(f"{path} cannot be written: {error}") from error


def check_ending(path: str | os.PathLike[str]) -> None:
  """Raises a CollectError where no table can be written there."""
  path = pathlib.Path(path)
  if path.suffix.lower() not in _WRITERS:
    raise CollectError(
        f"--out={path}: the ending {path.suffix!r} is not known; known: "
        f"{', '.join(_WRITERS)}")


def _planned(workdir: pathlib.Path) -> dict[str, Any]:
  """The overrides of planned runs, by run id."""
  try:
    return {row["run_id"]: row["overrides"]
            for row in ledger.read_plan(workdir)["runs"]}
  except FileNotFoundError:
    return {}  # Runs may have been trained one by one.


def _row(workdir: pathlib.Path, run_id: str,
         overrides: Mapping[str, Any] | None) -> dict[str, Any]:
  state = ledger.run_state(workdir, run_id)
  row = dict(state.result or dict(
      status_reason=state.reason, steps=state.step,
      tokens_per_second=state.tokens_per_second))
  row |= dict(run_id=run_id, status=state.status)
  row["config"] = _config(workdir / run_id / "config.json")
  row |= {f"overrides.{key}": value
          for key, value in (overrides or {}).items()}
  return flat(row)


def _config(path: pathlib.Path) -> dict[str, Any]:
  """A run's config; empty for one that has not begun."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError("it is no JSON object")
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise CollectError(f"{path} is damaged ({error}); delete the run's "
                       "directory to run it again") from None
  return values


# --- Types -------------------------------------------------------------------


def _declared() -> dict[str, pa.DataType]:
  """The types of what every table has: record fields and config keys."""
  hints = typing.get_type_hints(records.RunRecord)
  columns = {name: kind for name, hint in hints.items()
             if (kind := _kind(hint)) is not None}
  return columns | {f"config.{key}": _kind(hint) or pa.string()
                    for key, hint in _config_keys(config_lib.ExperimentConfig)}


def _config_keys(cls: type) -> Iterator[tuple[str, Any]]:
  hints = typing.get_type_hints(cls)
  for entry in dataclasses.fields(cls):
    hint = hints[entry.name]
    if dataclasses.is_dataclass(hint):
      for key, inner in _config_keys(hint):
        yield f"{entry.name}.{key}", inner
    else:
      yield entry.name, hint


def _kind(hint: Any) -> pa.DataType | None:
  """The column of a scalar, `int | None` for one; None: it is none."""
  arguments = [one for one in typing.get_args(hint) if one is not type(None)]
  return _KINDS.get(arguments[0] if len(arguments) == 1 else hint)


_KINDS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(),
          str: pa.string()}


def _array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
  """Of a declared type, or of the one that all values have.

  What does not fit its type, of another version of the code, makes the column
  one of texts: nothing is rounded or lost.
  """
  types = {type(value) for value in values if value is not None}
  if kind is None:
    kind = _KINDS.get(float if types == {int, float} else
                      next(iter(types)) if len(types) == 1 else None,
                      pa.string())
  fitting = {float, int} if kind == pa.float64() else {
      one for one, column in _KINDS.items() if column == kind}
  try:
    if not types <= fitting:
      raise pa.ArrowInvalid("values of another type would be bent")
    return pa.array(values, kind)
  except (pa.ArrowInvalid, OverflowError):  # too large a number, for one
    return pa.array([value if value is None or isinstance(value, str)
                     else json.dumps(value) for value in values], pa.string())


def _place(column: tuple[str, Any]) -> tuple[int, int]:
  """Who a run is, what its cell set, its record, its config."""
  name = column[0]
  if name in _FIRST:
    return 0, _FIRST.index(name)
  return (1 if name.startswith("overrides.") else
          3 if name.startswith("config.") else 2), 0


_FIRST = ("run_id", "sweep", "status", "status_reason")


def _write_csv(frame: pa.Table, path: pathlib.Path) -> None:
  csv.write_csv(frame, path)


def _write_parquet(frame: pa.Table, path: pathlib.Path) -> None:
  parquet.write_table(frame, path)


_WRITERS: dict[str, Callable[[pa.Table, pathlib.Path], None]] = {
    ".parquet": _write_parquet, ".csv": _write_csv}
