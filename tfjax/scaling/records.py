# SPDX-License-Identifier: Apache-2.0
"""Run records as tables: reads runs/SWEEP/RUN/, writes nothing.

`result.json` becomes a row, with the shape of the model from `config.json`,
and `metrics.jsonl` a curve. Nothing is filled in: what a record does not hold
is NaN or None. Tables of runs that were trained elsewhere are read here too.
"""

import csv
import json
import math
import os
import pathlib
from typing import Any, Iterator

import pandas as pd

NUMBERS = (
    "seed", "params_total", "params_embedding", "params_non_embedding",
    "params_head", "params_active", "tokens_seen", "tokens_predicted",
    "unique_tokens", "epochs", "steps", "batch_tokens", "flops_total",
    "flops_matmul", "flops_attention", "flops_head", "flops_recompute",
    "flops_encoder", "flops_decoder", "loss", "loss_stderr", "train_loss",
    "bits_per_byte", "vocab_size", "bytes_per_token", "entropy_rate",
    "device_count", "device_seconds", "tokens_per_second", "mfu",
    "peak_flops_per_second", "wall_seconds", "startup_seconds",
    "compile_seconds", "input_seconds", "step_seconds", "evaluation_seconds",
    "checkpoint_seconds", "lost_seconds", "goodput", "occupied_device_seconds",
    "price_usd", "energy_kwh", "pue", "co2e_kg", "branch_step", "shared_flops",
    "shared_device_seconds")
TEXTS = (
    "run_id", "sweep", "status", "status_reason", "family", "objective",
    "loss_counts", "flops_convention", "tokenizer", "corpus", "device_kind",
    "peak_source", "hardware", "price_source", "energy_source", "region",
    "co2e_source", "config_hash", "code_version", "python_version", "host_cpu",
    "started_at", "finished_at", "branched_from")
# What a sum of must not be spoilt by: finite, and at least so much.
LEAST = {**{name: 0.0 for name in NUMBERS if name.endswith("_seconds")},
         "shared_flops": 0.0,
         "mfu": 0.0, "goodput": 0.0, "price_usd": 0.0, "energy_kwh": 0.0,
         "co2e_kg": 0.0, "pue": 1.0}
# Columns that config.json holds, and where.
CONFIGURED = {"d_model": ("model", "d_model"),
              "num_layers": ("model", "num_layers"),
              "learning_rate": ("optimizer", "learning_rate")}
CONFIGURED_TEXTS = {"schedule": ("optimizer", "schedule")}
REQUIRED = ("run_id", "status")
STATUSES = ("complete", "diverged", "stopped", "failed", "interrupted")

_RESULT, _METRICS, _CONFIG = "result.json", "metrics.jsonl", "config.json"


class RecordError(ValueError):
  """A record that cannot be read. The message names the file."""

  def __init__(self, path: pathlib.Path, problem: str):
    super().__init__(f"{path}: {problem}")
    self.path = path


def load(workdir: str | os.PathLike[str]) -> pd.DataFrame:
  """All runs below a directory that have a result, one row each.

  Returns:
    The columns of `NUMBERS` and `CONFIGURED` (float64, NaN where unknown),
    `TEXTS` and `CONFIGURED_TEXTS` (None where unknown), `packages` (a dict),
    `directory`, and whatever else the records hold; sorted by directory. Empty
    where there is no result.

  Raises:
    FileNotFoundError: there is no such directory.
    RecordError: a result.json or config.json cannot be read, or holds a value
      of the wrong type.
  """
  rows = [_read_result(directory / _RESULT)
          for directory, names in _walk(workdir) if _RESULT in names]
  frame = pd.DataFrame(rows)
  for name in (*NUMBERS, *CONFIGURED):
    frame[name] = pd.Series(
        [_number(row, name) for row in rows], dtype="float64")
  texts = (*TEXTS[4:], *CONFIGURED_TEXTS, "packages", "directory")
  for name in (*TEXTS[:4], *texts):
    frame[name] = pd.Series([row.get(name) for row in rows], dtype="object")
  known = [*TEXTS[:4], *NUMBERS, *CONFIGURED, *texts]
  return frame[[*known, *(c for c in frame.columns if c not in known)]]


def load_table(path: str | os.PathLike[str]) -> pd.DataFrame:
  """A table of runs that were trained elsewhere, one row a run.

  Args:
    path: a file that ends in .csv, .tsv, .json (a list of objects, or an
      object of columns), .jsonl or .parquet.

  Raises:
    FileNotFoundError: there is no such file.
    RecordError: the ending is unknown, or the file cannot be read, is empty
      or ragged, or names a column twice.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no file {path}" + (
        ", it is a directory" if path.is_dir() else ""))
  if path.suffix.lower() not in _READERS:
    raise RecordError(path, f"has an unknown ending {path.suffix!r}; known: "
                      f"{', '.join(_READERS)}")
  if not path.stat().st_size:
    raise RecordError(path, "is empty")
  try:
    frame = _READERS[path.suffix.lower()](path)
  except RecordError:
    raise
  except (ValueError, OSError, ImportError, csv.Error) as error:
    raise RecordError(path, f"cannot be read ({error})") from error
  if not len(frame):
    raise RecordError(path, "holds no rows")
  return frame


def unfinished(workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Run directories that were begun and have no result."""
  return [directory for directory, names in _walk(workdir)
          if _CONFIG in names and _RESULT not in names
          and directory != pathlib.Path(workdir)]


def curves(directory: str | os.PathLike[str]) -> pd.DataFrame:
  """The rows of a run's metrics.jsonl; empty where there is none.

  A last line that its writer did not live to finish is left out. Anything
  else that is not a JSON object raises a RecordError with its line number.
  """
  path = pathlib.Path(directory) / _METRICS
  if not path.is_file():
    return pd.DataFrame(columns=["kind", "step", "tokens", "flops", "loss"])
  *lines, last = path.read_bytes().split(b"\n")
  rows = [_parse_line(path, number, line)
          for number, line in enumerate(lines, start=1)]
  if last:
    try:
      rows.append(_parse_line(path, len(lines) + 1, last))
    except RecordError:
      pass  # No newline after it: the writer was killed in its midst.
  frame = pd.DataFrame(rows)
  for name in ("kind", "step", "tokens", "flops", "loss"):
    if name not in frame:
      frame[name] = None if name == "kind" else math.nan
  for name in ("step", "tokens", "flops", "loss"):
    frame[name] = frame[name].astype("float64")
  return frame


def check_number(path: pathlib.Path, name: str, value: Any,
                 least: float | None = None) -> None:
  """Raises a RecordError unless it is a number or null; where `LEAST` or
  `least` says how much it is at least, a finite one."""
  least = LEAST.get(name, least)
  if isinstance(value, bool) or not isinstance(value, int | float | None):
    raise RecordError(path, f"{name!r} must be a number or null, not "
                      f"{value!r}")
  if not (value is None or least is None or least <= value < math.inf):
    raise RecordError(path, f"{name!r} must be finite and at least "
                      f"{least:g}, or null, not {value!r}")


def _walk(
    workdir: str | os.PathLike[str]
) -> Iterator[tuple[pathlib.Path, list[str]]]:
  """Directories below workdir, in order, checkpoints left out."""
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no directory {workdir}")
  for root, directories, names in os.walk(workdir):
    directories[:] = sorted(d for d in directories if d != "checkpoints")
    yield pathlib.Path(root), names


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; a RecordError that names the file where it is none."""
  try:
    row = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise RecordError(path, f"is not valid JSON ({error})") from error
  if not isinstance(row, dict):
    raise RecordError(path, f"must be a JSON object, not {type(row).__name__}")
  return row


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  """The columns of `CONFIGURED` and `CONFIGURED_TEXTS` that a run's config.json
  holds."""
  config = read_json(path) if path.is_file() else {}
  found = {}
  for places, kind, words in ((CONFIGURED, int | float | None, "a number"),
                              (CONFIGURED_TEXTS, str | None, "text")):
    for name, (section, key) in places.items():
      fields = config.get(section, {})
      if not isinstance(fields, dict):
        raise RecordError(
            path, f"{section!r} must be an object, not {fields!r}")
      value = fields.get(key)
      if isinstance(value, bool) or not isinstance(value, kind):
        raise RecordError(path, f"'{section}.{key}' must be {words} or null, "
                          f"not {value!r}")
      found[name] = value
  return found


def _read_result(path: pathlib.Path) -> dict[str, Any]:
  row = read_json(path)
  row["directory"] = str(path.parent)
  row = _read_config(path.with_name(_CONFIG)) | row
  for name in REQUIRED:
    if row.get(name) is None:
      raise RecordError(path, f"has no {name!r}")
  for name in TEXTS:
    if not isinstance(row.get(name), str | None):
      raise RecordError(path, f"{name!r} must be text or null, not "
                        f"{row[name]!r}")
  for name in (*NUMBERS, *CONFIGURED):
    check_number(path, name, row.get(name))
  if row["status"] not in STATUSES:
    raise RecordError(path, f"'status' must be one of {', '.join(STATUSES)}, "
                      f"not {row['status']!r}")
  return row


def _number(row: dict[str, Any], name: str) -> float:
  value = row.get(name)
  return math.nan if value is None else float(value)


def _parse_line(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except ValueError as error:
    raise RecordError(
        path, f"line {number} is not valid JSON ({error})") from error
  if not isinstance(row, dict):
    raise RecordError(path, f"line {number} is not a JSON object")
  return row


def _read_separated(path: pathlib.Path, separator: str) -> pd.DataFrame:
  """Text with a header line. pandas takes a first column without a name for
  an index, and shifts what is longer than the header: neither here."""
  with open(path, encoding="utf-8-sig", newline="") as file:
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
    lines = [(reader.line_num, line) for line in reader if line]
  header = lines[0][1] if lines else []
  if len(header) < 2:
    raise RecordError(path, f"has no two columns separated by {separator!r}; "
                      f"its first line is {', '.join(header)!r}")
  repeated = sorted({name for name in header if header.count(name) > 1})
  if repeated:
    raise RecordError(path, f"has columns of one name: {', '.join(repeated)}")
  for number, line in lines:
    if len(line) != len(header):
      raise RecordError(path, f"line {number} has {len(line)} values under "
                        f"{len(header)} column names")
  frame = pd.read_csv(path, sep=separator, index_col=False,
                      encoding="utf-8-sig", skipinitialspace=True)
  unnamed = [name for name, given in zip(frame.columns, header) if not given]
  return frame.drop(columns=unnamed)  # An index that pandas has written.


def _read_rows(path: pathlib.Path) -> pd.DataFrame:
  """A JSON object a line."""
  lines = path.read_bytes().split(b"\n")
  return pd.DataFrame([_parse_line(path, number, line) for number, line
                       in enumerate(lines, start=1) if line.strip()])


def _read_columns(path: pathlib.Path) -> pd.DataFrame:
  """A JSON list of objects, or an object of columns."""
  value = json.loads(path.read_text(encoding="utf-8"))
  rows = value if isinstance(value, list) else [value]
  if not all(isinstance(row, dict) for row in rows):
    raise RecordError(path, "must be a list of objects, or an object of "
                      "columns")
  return pd.DataFrame(value)


_READERS = {".csv": lambda path: _read_separated(path, ","),
            ".tsv": lambda path: _read_separated(path, "\t"),
            ".json": _read_columns, ".jsonl": _read_rows,
            ".parquet": pd.read_parquet}
