# SPDX-License-Identifier: Apache-2.0
"""Run records as tables: reads runs/SWEEP/RUN/, writes nothing.

`result.json` becomes a row, `metrics.jsonl` a curve. Nothing is filled in:
what a record does not hold is NaN or None.
"""

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
    "energy_kwh", "co2e_kg")
TEXTS = (
    "run_id", "sweep", "status", "status_reason", "family", "objective",
    "loss_counts", "flops_convention", "tokenizer", "corpus", "device_kind",
    "energy_source", "co2e_source", "config_hash", "code_version",
    "python_version", "host_cpu", "started_at", "finished_at")
REQUIRED = ("run_id", "status")
STATUSES = ("complete", "diverged", "failed", "interrupted")

_RESULT, _METRICS, _CONFIG = "result.json", "metrics.jsonl", "config.json"


class RecordError(ValueError):
  """A record that cannot be read. The message names the file."""

  def __init__(self, path: pathlib.Path, problem: str):
    super().__init__(f"{path}: {problem}")
    self.path = path


def load(workdir: str | os.PathLike[str]) -> pd.DataFrame:
  """All runs below a directory that have a result, one row each.

  Returns:
    The columns of `NUMBERS` (float64, NaN where unknown) and `TEXTS` (None
    where unknown), `packages` (a dict), `directory`, and whatever else the
    records hold; sorted by directory. Empty where there is no result.

  Raises:
    FileNotFoundError: there is no such directory.
    RecordError: a result.json cannot be read, or holds a value of the wrong
      type.
  """
  rows = [_read_result(directory / _RESULT)
          for directory, names in _walk(workdir) if _RESULT in names]
  frame = pd.DataFrame(rows)
  for name in NUMBERS:
    frame[name] = pd.Series(
        [_number(row, name) for row in rows], dtype="float64")
  for name in (*TEXTS, "packages", "directory"):
    frame[name] = pd.Series([row.get(name) for row in rows], dtype="object")
  others = [c for c in frame.columns
            if c not in (*TEXTS, *NUMBERS, "packages", "directory")]
  return frame[[*TEXTS[:4], *NUMBERS, *TEXTS[4:], "packages", "directory",
                *others]]


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


def _read_result(path: pathlib.Path) -> dict[str, Any]:
  try:
    row = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise RecordError(path, f"is not valid JSON ({error})") from error
  if not isinstance(row, dict):
    raise RecordError(path, f"must be a JSON object, not {type(row).__name__}")
  row["directory"] = str(path.parent)
  for name in REQUIRED:
    if row.get(name) is None:
      raise RecordError(path, f"has no {name!r}")
  for name in TEXTS:
    if not isinstance(row.get(name), str | None):
      raise RecordError(path, f"{name!r} must be text or null, not "
                        f"{row[name]!r}")
  for name in NUMBERS:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
      raise RecordError(path, f"{name!r} must be a number or null, not "
                        f"{value!r}")
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
