# SPDX-License-Identifier: Apache-2.0
"""Fits a scaling law to runs, plans the next ones, or repeats published fits.

    scripts/fit.py --workdir=runs/quickstart
    scripts/fit.py --table=losses.csv --law=chinchilla --params=n --tokens=d
    scripts/fit.py --workdir=runs/quickstart --suggest=1e14 \
        --config=experiments/quickstart.py
    scripts/fit.py --reproduce

Prints the law, its intervals, how far to trust it and what it predicts, and
writes fit.json into the run directory, or beside the table as TABLE.fit.json;
a table's figures and report go to --report. --suggest plans the runs that would
tell most for so many FLOPs; with --config they are runs that the experiment can
make, and are written as suggested.json, which scripts/sweep.py takes as
--overrides. Exits 0 also where the runs do not determine the law, 2 where there
is nothing to fit, and 1 where --reproduce misses a published number.
"""

import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
# Fits are float64 on the host; an accelerator may be busy with training.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
import pandas as pd

from tfjax import config as config_lib
from tfjax import scaling
from tfjax.scaling import design
from tfjax.scaling import estimate
from tfjax.scaling import laws
from tfjax.scaling import published
from tfjax.scaling import records
from tfjax.scaling import report
from tfjax.scaling import result
from tfjax.scaling import terminal

_LARGEST = 0.5  # of the FLOPs to plan for, that one run may cost
_REFDATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "refdata"

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of run directories")
_TABLE = flags.DEFINE_string(
    "table", None, "a table of runs from elsewhere: csv, tsv, json, jsonl or "
    "parquet")
_REPORT = flags.DEFINE_string(
    "report", None, "with --table: directory for report.html and figures/")
_LAW = flags.DEFINE_enum("law", "chinchilla", list(laws.LAWS), "what to fit")
_PARAMS = flags.DEFINE_string(
    "params", None, "the column that is N; unset: params_total or params")
_TOKENS = flags.DEFINE_string(
    "tokens", None, "the column that is D; unset: tokens_seen or tokens")
_FLOPS = flags.DEFINE_string(
    "flops", None, "the column that is C; unset: flops_total, flops or 6 N D")
_COLUMNS = flags.DEFINE_list(
    "columns", [], "AXIS=COLUMN for other axes of the law, or its target")
_OBJECTIVE = flags.DEFINE_enum(
    "objective", "huber", estimate.OBJECTIVES, "what is minimised")
_DELTA = flags.DEFINE_float(
    "delta", 1e-3, "residual beyond which Huber's loss is linear",
    lower_bound=1e-12)
_SPACE = flags.DEFINE_enum(
    "space", None, ["log", "linear"], "of residuals; unset: the law's own")
_WEIGHTS = flags.DEFINE_string("weights", None, "a column of row weights")
_STDERR = flags.DEFINE_string(
    "stderr", None, "a column of the target's standard errors")
_GROUP = flags.DEFINE_string(
    "group", None, "a column whose equal rows are resampled together")
_FIXED = flags.DEFINE_list("fixed", [], "PARAMETER=VALUE that are not fitted")
_HOLDOUT = flags.DEFINE_integer(
    "holdout", None, "runs with the most FLOPs to predict instead of fit; "
    "unset: about 15% of a run directory's, none of a table's nor with "
    "--suggest",
    lower_bound=0)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 1000, "resamples of the runs; 0: no intervals", lower_bound=0)
_LEVEL = flags.DEFINE_float(
    "level", 0.95, "coverage of the intervals", lower_bound=0.01,
    upper_bound=0.999)
_SEED = flags.DEFINE_integer("seed", 0, "of the resamples", lower_bound=0)
_SUGGEST = flags.DEFINE_float(
    "suggest", None, "FLOPs to plan the next runs for")
_TARGET = flags.DEFINE_list(
    "target", ["loss"], "with --suggest: what the runs are to tell (loss, "
    "params, tokens on the frontier, or parameters of the law)")
_AT = flags.DEFINE_float(
    "at", None, "with --suggest: the compute at which it is to be known; "
    "unset: ten times the dearest run's")
_CONFIG = flags.DEFINE_string(
    "config", None, "with --suggest: the experiment file that is to make them")
_REPRODUCE = flags.DEFINE_bool(
    "reproduce", False, "repeat published fits from their data")
_DATA = flags.DEFINE_string(
    "refdata", str(_REFDATA), "with --reproduce: holds a folder a study")


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return _refuse(f"unknown argument {arguments[1]!r}")
  if _REPRODUCE.value:
    return _reproduce()
  if (_WORKDIR.value is None) == (_TABLE.value is None):
    return _refuse("give --workdir or --table (or --reproduce), and one only")
  for flag, partner in (("config", _SUGGEST), ("at", _SUGGEST),
                        ("report", _TABLE)):
    if flags.FLAGS[flag].value is not None and partner.value is None:
      return _refuse(f"--{flag} means something with --{partner.name} only")
  display = terminal.Display()
  try:
    frame, path = _read()
    fit = scaling.fit(frame, _LAW.value, **_options(frame))
    planned, placed = _suggest(fit, frame) if (
        _SUGGEST.value is not None) else (None, None)
  except (FileNotFoundError, ValueError) as error:
    return _refuse(str(error))
  display.fit(fit)
  try:
    return _record(display, fit, path, planned, placed)
  except OSError as error:
    print(f"fitted, but not written: {error}", file=sys.stderr)
    return 2


def _record(display: terminal.Display, fit: result.Fit, path: pathlib.Path,
            planned: design.Design | None, placed: list[Any] | None) -> int:
  _write(path, fit.to_dict())
  display.line(f"written to {path}")
  if planned is not None:
    display.design(planned)
  if placed:
    display.placed(placed)
    overrides = path.with_name("suggested.json")
    _write(overrides, [run.overrides for run in placed])
    display.line(f"to run them: scripts/sweep.py --config={_CONFIG.value} "
                 f"--overrides={overrides} --workdir={path.parent}")
  if _TABLE.value and _REPORT.value:
    page = report.write_fit(
        fit, _REPORT.value, f"Scaling report: {pathlib.Path(_TABLE.value).name}")
    display.line(f"report: {page}")
  return 0


def _read() -> tuple[pd.DataFrame, pathlib.Path]:
  """The runs, and where the fit's record goes."""
  if _TABLE.value:
    path = pathlib.Path(_TABLE.value)
    return records.load_table(path), path.with_name(path.name + ".fit.json")
  workdir = pathlib.Path(_WORKDIR.value)
  frame = scaling.load(workdir)
  if not len(frame):
    raise FileNotFoundError(f"no run below {workdir} has a result.json")
  return frame, workdir / "fit.json"


def _options(frame: pd.DataFrame) -> dict[str, Any]:
  holdout = _HOLDOUT.value
  if holdout is None:
    holdout = (0 if _TABLE.value or _SUGGEST.value
               else scaling.default_holdout(frame, _LAW.value))
  return dict(
      params=_PARAMS.value, tokens=_TOKENS.value, flops=_FLOPS.value,
      columns=_pairs("columns", _COLUMNS.value), objective=_OBJECTIVE.value,
      delta=_DELTA.value, space=_SPACE.value, weights=_WEIGHTS.value,
      stderr=_STDERR.value, group=_GROUP.value,
      fixed={k: _number(k, v) for k, v in _pairs(
          "fixed", _FIXED.value).items()},
      holdout=holdout, bootstrap=_BOOTSTRAP.value, level=_LEVEL.value,
      seed=_SEED.value)


def _suggest(fit: result.Fit, frame: pd.DataFrame
             ) -> tuple[design.Design, list[Any] | None]:
  """The next runs, and the experiment's cells for them where it is named."""
  wanted = dict(target=_TARGET.value, at=_AT.value)
  if _CONFIG.value is None:
    return design.suggest(fit, _SUGGEST.value, **wanted), None
  from tfjax import sweep  # Training's packages take seconds to import.
  module = config_lib.module(_CONFIG.value)
  config = module.get_config()
  known = sweep.sizes(config, module.get_sweep(config))
  count = fit.conventions["params"]
  if count not in known[0].params:
    raise ValueError(
        f"with --config, N must be a column that says which parameters of the "
        f"experiment are counted, so --params one of "
        f"{', '.join(known[0].params)}, not {count!r}")
  offered = design.candidates(
      fit, _LARGEST * _SUGGEST.value, params=[s.params[count] for s in known],
      flops_per_token=[s.flops_per_token for s in known],
      most_tokens=float(fit.runs["tokens"].max()))
  made = design.suggest(fit, _SUGGEST.value, candidates=offered,
                        largest=_LARGEST, **wanted)
  seeds = frame["seed"].dropna() if "seed" in frame else pd.Series([])
  return made, sweep.place(
      config, made.runs.to_dict("records"), known, count=count,
      first_seed=int(seeds.max()) + 1 if len(seeds) else 0)


def _pairs(flag: str, items: list[str]) -> dict[str, str]:
  pairs = [item.partition("=") for item in items]
  for name, equals, value in pairs:
    if not (name and equals and value):
      raise ValueError(f"--{flag} takes NAME=VALUE, not {name + equals!r}")
  return {name: value for name, _, value in pairs}


def _number(name: str, text: str) -> float:
  try:
    return float(text)
  except ValueError as error:
    raise ValueError(f"--fixed {name}={text}: not a number") from error


def _write(path: pathlib.Path, content: Any) -> None:
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n",
                     encoding="utf-8")
  partial.replace(path)


def _reproduce() -> int:
  display, rows = terminal.Display(), []
  display.line(f"{'study':18} {'quantity':56} {'published':>14} {'ours':>16}  "
               "within")
  for name in published.STUDIES:
    made = published.run(pathlib.Path(_DATA.value), [name])
    display.reproduction(made)
    rows += made
  compared = [row for row in rows if row.ok is not None]
  met = sum(row.ok for row in compared)
  display.line(f"{met} of {len(compared)} published numbers reproduced")
  if not compared:
    return _refuse(f"no study's data are in {_DATA.value}")
  return 0 if met == len(compared) else 1


def _refuse(problem: str) -> int:
  print(f"nothing fitted: {problem}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  app.run(main)
