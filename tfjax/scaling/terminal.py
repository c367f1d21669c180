# SPDX-License-Identifier: Apache-2.0
"""Fits, designs and reproductions as tables on a terminal."""

import math
from typing import Any, Sequence

from rich import console as console_lib
from rich import table as table_lib
from rich import text as text_lib

from tfjax.scaling import approaches
from tfjax.scaling import design as design_lib
from tfjax.scaling import published
from tfjax.scaling import result
from tfjax.scaling import sections
from tfjax.scaling import wording
from tfjax.scaling.figures import runs as figures_runs

_MOST_PREDICTED = 12  # rows of predictions


class Display:
  """Prints to a console; 110 columns wide where there is no terminal."""

  def __init__(self) -> None:
    self._console = console_lib.Console()
    if not self._console.is_terminal:
      self._console = console_lib.Console(width=110)

  def line(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False)

  def table(self, title: str, header: Sequence[str],
            rows: Sequence[Sequence[str]]) -> None:
    table = table_lib.Table(title=title or None, title_justify="left")
    for position, name in enumerate(header):
      table.add_column(name, justify="right" if position else "left",
                       overflow="fold")
    for row in rows:
      table.add_row(*map(text_lib.Text, row))  # names are not markup
    self._console.print(table)

  def fit(self, fit: result.Fit) -> None:
    """The law, how far to trust it, and what it predicts."""
    axes = ", ".join(f"{wording.symbol(axis)} is {fit.conventions[axis]}"
                     for axis in fit.law.axes if axis in fit.conventions)
    self.line(f"{fit.law.form}\n{axes}; {len(fit.runs)} runs, "
              f"{len(fit.holdout)} held out")
    self.line(f"{fit.conventions['minimised']}: {fit.objective:.6g}")
    self.table("", ["parameter", f"estimate ({fit.level:.0%} bootstrap)",
                    f"{fit.level:.0%} profile likelihood"],
               sections.parameter_rows(fit))
    self.line(f"{sections.status_words(fit)}: {sections.fit_words(fit)}")
    for other in fit.optima[:3]:
      self.line("another optimum, objective "
                f"{other['objective']:.6g}: " + ", ".join(
                    f"{name} {wording.number(value)}"
                    for name, value in other["coefficients"].items()))
    self._predictions(fit)
    self._optimal(fit)
    if "notes" in fit.conventions:
      self.line(f"note: {fit.conventions['notes']}")
    if fit.excluded:
      self.table("rows left out", ["run", "why"],
                 [[e.run, e.reason] for e in fit.excluded])

  def design(self, design: design_lib.Design) -> None:
    """The runs that would tell most, and what they would tell."""
    axes = list(design.law.axes)
    self.table(
        f"runs to make next, {wording.power(design.flops)} FLOPs in all",
        [*map(wording.symbol, axes), "FLOPs of one", "seeds"],
        [[*(wording.amount(axis, row[axis]) for axis in axes),
          wording.power(row["flops"]), str(int(row["seeds"]))]
         for row in design.runs.to_dict("records")])
    self.table(
        "standard errors expected", ["of", "value", "now", "with these runs",
                                     "all candidates evenly, as many FLOPs"],
        [[str(row["target"]), *(wording.number(row[name]) if math.isfinite(
            row[name]) else "unbounded" for name in (
                "value", "before", "after", "even"))]
         for row in design.errors.to_dict("records")])

  def placed(self, runs: Sequence[Any]) -> None:
    """Wished-for runs as an experiment can make them."""
    cells: dict[str, list[Any]] = {}
    for run in runs:
      text = ", ".join(f"{key}={value:.6g}" if isinstance(value, float)
                       else f"{key}={value}"
                       for key, value in run.overrides.items()
                       if key != "seed")
      cells.setdefault(text, []).append(run)
    self.table("as the experiment can make them",
               ["overrides", "seeds", "N wished", "N", "D", "FLOPs of one"],
               [[text, ", ".join(str(run.overrides["seed"]) for run in same),
                 wording.count(same[0].wanted), wording.count(same[0].params),
                 wording.count(same[0].tokens), wording.power(same[0].flops)]
                for text, same in cells.items()])

  def reproduction(self, rows: Sequence[published.Row]) -> None:
    """Published numbers beside ours, a line each."""
    for row in rows:
      known = "-" if row.published is None else f"{row.published:.10g}"
      verdict = {None: "", True: "ok", False: "MISSED"}[row.ok]
      self._console.print(
          f"{row.study:18} {row.quantity:56} {known:>14} {row.ours:>16.10g}  "
          f"{_tolerance(row):16} {verdict}", markup=False, highlight=False,
          soft_wrap=True)
    for study, note in dict.fromkeys(
        (row.study, row.note) for row in rows if row.note):
      self.line(f"{study}: {note}")

  def _predictions(self, fit: result.Fit) -> None:
    held = bool(fit.holdout)
    runs = fit.holdout or fit.extrapolation
    if not runs:
      self.line("no run could be left out to test how the law extrapolates")
      return
    what = wording.label(fit.law.target)
    rows = [[h.run, wording.count(h.params), wording.count(h.tokens),
             f"{h.predicted:#.5g}",
             *([wording.between(h.interval, "{:#.5g}")] if held else []),
             f"{h.measured:#.5g}", wording.error(h.relative_error)]
            for h in runs[-_MOST_PREDICTED:]]
    self.table(
        ("held-out runs" if held else "fitted again without the most compute")
        + f": {what}, worst error {wording.worst(runs)}",
        ["run", "N", "D", "predicted", *(["interval"] if held else []),
         "measured", "error"], rows)

  def _optimal(self, fit: result.Fit) -> None:
    if not fit.has_intervals or not figures_runs.has_frontier(fit):
      return
    rows = fit.compute_optimal(sections.optimal_budgets(fit))
    self.table(
        "compute-optimal (* extrapolated)" if fit.status == "converged" else
        f"compute-optimal, but the fit is {sections.status_words(fit)} "
        "(* extrapolated)", ["FLOPs", "N*", "D*", "D*/N*", "loss"],
        [[wording.power(r.flops) + "*" * r.extrapolated,
          wording.banded(r, "params", wording.count),
          wording.banded(r, "tokens", wording.count),
          wording.count(r.tokens_per_parameter),
          wording.banded(r, "loss", "{:.3f}".format)]
         for r in rows.itertuples()])
    self.line(wording.cost(fit))
    self._approaches(fit)

  def _approaches(self, fit: result.Fit) -> None:
    """The three frontiers at ten times the largest run, and the second's
    bias."""
    budget = sections.optimal_budgets(fit)[-1]
    found, cell = approaches.compare(fit, budget), wording.banded
    self.table(
        "the frontier by three approaches, exponents of C, and at "
        f"{wording.power(budget)} FLOPs",
        ["approach", "a of N*", "b of D*", "N*", "D*"],
        [[f"{row.approach}, {row.method}",
          cell(row, "exponent_params", "{:.3f}".format),
          cell(row, "exponent_tokens", "{:.3f}".format),
          cell(row, "params", wording.count),
          cell(row, "tokens", wording.count)]
         for row in found.table.itertuples()])
    for caveat in found.caveats():
      self.line(caveat)


def _tolerance(row: published.Row) -> str:
  if row.published is None:
    return ""
  return (f"{row.tolerance:.3g}" if not row.relative
          else f"{row.tolerance:.2g} relative") + (
              " above" if row.at_most else "")
