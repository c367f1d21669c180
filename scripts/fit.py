# SPDX-License-Identifier: Apache-2.0
"""Fits a scaling law to the runs in a directory.

    scripts/fit.py --workdir=runs/quickstart

Prints the law, its intervals, how far to trust it and what it predicts, and
writes workdir/fit.json. Exits 0 also where the runs do not determine the law,
and 2 where there is nothing to fit.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
from rich import console as console_lib
from rich import table as table_lib
from rich import text as text_lib

from tfjax import scaling
from tfjax.scaling import laws
from tfjax.scaling import report
from tfjax.scaling import result
from tfjax.scaling import wording

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of run directories", required=True)
_LAW = flags.DEFINE_enum("law", "chinchilla", list(laws.LAWS), "what to fit")
_PARAMS = flags.DEFINE_enum(
    "params", "params_total", ["params_total", "params_non_embedding"],
    "what N counts")
_HOLDOUT = flags.DEFINE_integer(
    "holdout", None, "runs with the most FLOPs to predict instead of fit; "
    "unset: about 15%", lower_bound=0)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 1000, "resamples of the runs", lower_bound=100)
_DELTA = flags.DEFINE_float(
    "delta", 1e-3, "log residual beyond which the loss is linear",
    lower_bound=1e-12)
_LEVEL = flags.DEFINE_float(
    "level", 0.95, "coverage of the intervals", lower_bound=0.01,
    upper_bound=0.999)
_SEED = flags.DEFINE_integer("seed", 0, "of the resamples", lower_bound=0)


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return _refuse(f"unknown argument {arguments[1]!r}")
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    frame = scaling.load(workdir)
    if not len(frame):
      return _refuse(f"no run below {workdir} has a result.json")
    holdout = _HOLDOUT.value
    if holdout is None:
      holdout = scaling.default_holdout(frame, _LAW.value)
    fit = scaling.fit(
        frame, _LAW.value, params=_PARAMS.value, holdout=holdout,
        delta=_DELTA.value, bootstrap=_BOOTSTRAP.value, level=_LEVEL.value,
        seed=_SEED.value)
  except (FileNotFoundError, ValueError) as error:
    return _refuse(str(error))
  console = console_lib.Console()
  if not console.is_terminal:
    console = console_lib.Console(width=110)
  _print(console, fit)
  path = workdir / "fit.json"
  partial = path.with_suffix(".json.partial")
  partial.write_text(json.dumps(fit.to_dict(), indent=2, allow_nan=False)
                     + "\n", encoding="utf-8")
  partial.replace(path)
  console.print(f"written to {path}", markup=False, highlight=False)
  return 0


def _refuse(problem: str) -> int:
  print(f"nothing fitted: {problem}", file=sys.stderr)
  return 2


def _print(console: console_lib.Console, fit: result.Fit) -> None:
  def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = table_lib.Table(title=title, title_justify="left")
    for position, name in enumerate(header):
      table.add_column(name, justify="right" if position else "left")
    for row in rows:
      table.add_row(*map(text_lib.Text, row))  # names are not markup
    console.print(table)

  def line(text: str) -> None:
    console.print(text, markup=False, highlight=False)

  line(f"{fit.law.form}  ({fit.conventions['params']} as N, "
       f"{len(fit.runs)} runs, {len(fit.holdout)} held out)")
  show("", ["parameter", f"estimate ({fit.level:.0%} interval)"],
       [[name, wording.parameter(fit, name)] for name in fit.law.parameters])
  line(f"{report.status_words(fit)}: {report.fit_words(fit)}")
  line(wording.cost(fit))
  if fit.holdout:
    show("held-out runs: predicted and measured loss (nats a token)",
         ["run", "N", "D", "predicted", "interval", "measured", "error"],
         [[h.run, wording.count(h.params), wording.count(h.tokens),
           f"{h.predicted:.4f}", wording.between(h.interval, "{:.4f}"),
           f"{h.measured:.4f}", f"{h.relative_error:+.2%}"]
          for h in fit.holdout])
  if fit.has_intervals:
    rows = fit.compute_optimal(report.optimal_budgets(fit))
    show("compute-optimal (* extrapolated)" if fit.status == "converged" else
         f"compute-optimal, but the fit is "
         f"{report.status_words(fit)} (* extrapolated)",
         ["FLOPs", "N*", "D*", "D*/N*", "loss"],
         [[wording.power(r.flops) + "*" * r.extrapolated,
           f"{wording.count(r.params)} ({wording.count(r.params_low)} to "
           f"{wording.count(r.params_high)})",
           f"{wording.count(r.tokens)} ({wording.count(r.tokens_low)} to "
           f"{wording.count(r.tokens_high)})",
           wording.count(r.tokens_per_parameter),
           f"{r.loss:.3f} ({r.loss_low:.3f} to {r.loss_high:.3f})"]
          for r in rows.itertuples()])
  if fit.excluded:
    show("rows left out", ["run", "why"],
         [[e.run, e.reason] for e in fit.excluded])


if __name__ == "__main__":
  app.run(main)
