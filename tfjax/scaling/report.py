# SPDX-License-Identifier: Apache-2.0
"""report.html and figures/ of a directory of runs, or of a fit alone.

What the page says of a fit is in `sections`, how it looks in `page`, what the
figures show in `plots`.
"""

import os
import pathlib
from typing import Any, Mapping, Sequence

import numpy as np
import pandas as pd

from tfjax.scaling import approaches
from tfjax.scaling import cost_section
from tfjax.scaling import costs
from tfjax.scaling import page
from tfjax.scaling import plots
from tfjax.scaling import records
from tfjax.scaling import result
from tfjax.scaling import sections
from tfjax.scaling import table
from tfjax.scaling import wording
from tfjax.scaling.figures import canvas
from tfjax.scaling.figures import law as figures_law
from tfjax.scaling.figures import runs as figures_runs
from tfjax.scaling.fit import default_holdout
from tfjax.scaling.fit import fit as fit_law

_LISTED = 60  # rows of a table from elsewhere
_DRAWS = 200  # resamples of approaches 1 and 2

# Of a fit's own words, what a terminal shows too.
fit_words = sections.fit_words
status_words = sections.status_words
optimal_budgets = sections.optimal_budgets


def write(workdir: str | os.PathLike[str],
          settings: Mapping[str, Any] | None = None) -> pathlib.Path:
  """Writes workdir/report.html and workdir/figures/NAME.{png,svg,pdf}.

  Args:
    workdir: directory of run directories, as `records.load` reads it.
    settings: arguments of `fit`, as a fit's record holds them; unset: those
      of `scripts/fit.py` when it is given none.

  Returns:
    The page's path.

  Raises:
    FileNotFoundError: no such directory, or no run in it has a result.
    records.RecordError: a record, or the forecast of what they were to cost,
      cannot be read.
    ValueError: a setting is out of range.
  """
  workdir = pathlib.Path(workdir)
  frame = records.load(workdir)
  if not len(frame):
    raise FileNotFoundError(
        f"no run below {workdir} has a result.json; nothing to report")
  forecast = costs.read_forecast(workdir)
  fit, problem = None, ""
  settings = dict(settings) if settings else {
      "holdout": default_holdout(frame)}
  try:
    fit = fit_law(frame, **settings)
  except table.TableError as error:
    problem = str(error)
  runs = plots.runs_of(fit) if fit is not None else None
  if runs is None:
    runs = _runs(frame, settings)
  curves = {run: records.curves(directory) for run, directory
            in zip(table.run_names(frame), frame["directory"])}
  entropy_rate = _only(frame["entropy_rate"])
  compared = _compare(fit)
  figures = _figures(workdir, plots.draw(
      runs, curves, fit, entropy_rate, compared,
      costs.alone(costs.spent(frame))))
  cost = figures.pop("cost", "")
  unfinished = records.unfinished(workdir)
  return _write(workdir, _title(frame), [
      _headline(frame, runs, fit),
      sections.no_fit(problem) if fit is None else
      sections.fitted_law(fit, entropy_rate),
      *figures.values(),
      "" if fit is None else sections.optimal(fit, compared),
      cost_section.section(frame, forecast, [p.name for p in unfinished], fit,
                           runs, cost),
      _run_table(frame),
      _left_out(frame, fit, unfinished),
      "" if fit is None else sections.conventions(fit),
      _provenance(frame),
  ])


def write_fit(fit: result.Fit, directory: str | os.PathLike[str],
              title: str = "Scaling report") -> pathlib.Path:
  """The same of a fit alone, whose runs were trained elsewhere.

  Args:
    fit: of any law and any table.
    directory: where report.html and figures/ are written; made if needed.
    title: the page's heading.

  Returns:
    The page's path.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  compared = _compare(fit)
  figures = _figures(directory, plots.draw(
      plots.runs_of(fit), {}, fit, compared=compared))
  return _write(directory, title, [
      _fit_headline(fit, title),
      sections.fitted_law(fit),
      *figures.values(),
      sections.optimal(fit, compared),
      _farthest(fit),
      sections.excluded([[e.run, e.reason] for e in fit.excluded],
                        "None: every row of the table was used."),
      sections.conventions(fit),
  ])


def _compare(fit: result.Fit | None) -> approaches.Comparison | None:
  """The three approaches at the largest run's budget and ten times that."""
  if not figures_runs.has_frontier(fit):
    return None
  largest = max([*fit.runs["flops"], *(h.flops for h in fit.holdout)])
  return approaches.compare(fit, [largest, 10 * largest],
                            bootstrap=min(fit.settings["bootstrap"], _DRAWS))


def _write(directory: pathlib.Path, title: str,
           parts: Sequence[str]) -> pathlib.Path:
  path = directory / "report.html"
  partial = path.with_suffix(".html.partial")
  partial.write_text(page.document(title, "\n".join(parts)),
                     encoding="utf-8")
  partial.replace(path)
  return path


def _figures(directory: pathlib.Path,
             pictures: Mapping[str, canvas.Picture]) -> dict[str, str]:
  """Writes the figures, and gives their sections, by name."""
  (directory / "figures").mkdir(exist_ok=True)
  return {name: sections.figure(
      name, picture, plots.save(picture, directory / "figures", name),
      level=3 if name == "cost" else 2)  # A part of a section.
          for name, picture in pictures.items()}


# --- Sections ----------------------------------------------------------------


def _title(frame: pd.DataFrame) -> str:
  names = [name for name in frame["sweep"].unique() if name]
  return f"Scaling report: {', '.join(map(str, names)) or 'runs'}"


def _headline(frame: pd.DataFrame, runs: pd.DataFrame,
              fit: result.Fit | None) -> str:
  complete = int((frame["status"] == "complete").sum())
  objective = _values(frame["objective"])
  text = (f"{objective[:1].upper()}{objective[1:]} {_values(frame['family'])} "
          f"language models on {_values(frame['corpus'])}: {complete} complete "
          f"run{'s' * (complete != 1)} of {len(frame)} with a result.")
  counts = frame["loss_counts"].dropna().unique()
  if len(counts) == 1 and counts[0] != "every token":
    text += f" The loss counts {counts[0]}."
  if fit is not None:
    text += f" {_exponent_words(fit)}"
    text += f" {sections.held_out_words(fit)}" if fit.holdout else ""
  spent, seconds = costs.spent(frame)["flops"], frame["device_seconds"]
  unknown = int(spent.isna().sum())
  items = [(f"{len(runs)}", "runs charted")]
  if len(runs):
    items += [(_range(runs["params"]), f"parameters N "
               f"({runs['params'].nunique()} sizes)"),
              (_range(runs["tokens"]), "training tokens D"),
              (_range(runs["loss"], "{:.2f}"), "held-out loss, nats / token")]
  items += [
      (wording.power(spent.sum()) if unknown < len(frame) else wording.UNKNOWN,
       "FLOPs in all" + (f", {unknown} runs unknown" if unknown else "")),
      (wording.duration(seconds.sum()) if seconds.notna().any()
       else wording.UNKNOWN, f"device time ({_values(frame['device_kind'])})")]
  return (page.heading(_title(frame), 1) + page.paragraph(text, "lead")
          + page.facts(items))


def _fit_headline(fit: result.Fit, title: str) -> str:
  rows = figures_law.rows_of(fit)
  target = fit.law.target
  held = f" {sections.held_out_words(fit)}" if fit.holdout else ""
  text = (f"{fit.law.form}, fitted to {len(fit.runs)} runs. "
          f"{_exponent_words(fit)}{held}")
  items = [(f"{len(rows)}", "runs"),
           *((_ends(axis, rows[axis]), wording.label(axis))
             for axis in fit.law.axes),
           (_ends(target, rows[target]), wording.label(target))]
  return (page.heading(title, 1) + page.paragraph(text, "lead")
          + page.facts(items))


def _exponent_words(fit: result.Fit) -> str:
  return "Of the fitted exponents, " + ", ".join(
      f"{name} is {wording.parameter(fit, name)}"
      for name in fit.law.exponents) + "."


def _farthest(fit: result.Fit) -> str:
  """Rows of the table, those that the law misses most first."""
  rows = figures_law.rows_of(fit)
  predicted = fit.predict(**{axis: rows[axis].to_numpy()
                             for axis in fit.law.axes})
  rows = rows.assign(predicted=predicted,
                     error=predicted / rows[fit.law.target] - 1)
  rows = rows.sort_values("error", key=abs, ascending=False)[:_LISTED]
  cells = [[row["run"], *(wording.amount(axis, row[axis])
                          for axis in fit.law.axes),
            wording.decimal(row["predicted"]),
            wording.decimal(row[fit.law.target]), f"{row['error']:+.2%}",
            "held out" if row["held_out"] else ""]
           for row in rows.to_dict("records")]
  head = page.heading("Runs, farthest from the law first")
  count = len(fit.runs) + len(fit.holdout)
  note = (page.paragraph(f"{_LISTED} of {count}.", "note")
          if count > _LISTED else "")
  return head + note + page.table(
      ["run", *map(wording.symbol, fit.law.axes), "predicted", "measured",
       "error", ""], cells)


def _run_table(frame: pd.DataFrame) -> str:
  rows = []
  ordered = frame.sort_values(["params_total", "tokens_seen"])
  for row in ordered.to_dict("records"):
    error = (f" ± {row['loss_stderr']:.4f}"
             if wording.known(row["loss_stderr"])
             and wording.known(row["loss"]) else "")
    rate = row["tokens_seen"] / row["params_total"]
    rows.append([
        row["run_id"], row["status"], wording.count(row["params_total"]),
        wording.count(row["tokens_seen"]), wording.count(rate),
        wording.power(row["flops_total"]), wording.decimal(row["loss"]) + error,
        wording.decimal(row["bits_per_byte"], 3),
        wording.count(row["tokens_per_second"]),
        wording.duration(row["device_seconds"]),
        row["config_hash"] or wording.UNKNOWN])
  branched = (frame["shared_flops"].fillna(0.0) > 0).any()
  note = page.paragraph(
      "N, D and FLOPs are those of a run's whole way, its device time is its own: "
      "without what it shares with the trunk that it branched off.",
      "note") if branched else ""
  return page.heading("Runs") + note + page.table(
      ["run", "status", "N", "D", "D / N", "FLOPs", "loss, nats / token",
       "bits / byte", "tokens / s", "device time", "config"], rows)


def _left_out(frame: pd.DataFrame, fit: result.Fit | None,
              unfinished: list[pathlib.Path]) -> str:
  if fit is not None:
    rows = [[e.run, e.reason] for e in fit.excluded]
  else:
    rows = [[row.run_id, f"{row.status}: {row.status_reason or 'no reason'}"]
            for row in frame.itertuples() if row.status != "complete"]
  rows += [[path.name, "has no result.json: running, or killed"]
           for path in unfinished]
  return sections.excluded(rows, "None: every run is complete and was used.")


def _provenance(frame: pd.DataFrame) -> str:
  devices = sorted({f"{_integer(count)} × {kind or wording.UNKNOWN}"
                    for kind, count in zip(frame["device_kind"],
                                           frame["device_count"])})
  packages = sorted({f"{name} {version}" for entry in frame["packages"]
                     if isinstance(entry, dict)
                     for name, version in entry.items()})
  rows = [
      ["devices", ", ".join(devices)],
      ["host", _values(frame["host_cpu"])],
      ["code version", _values(frame["code_version"])],
      ["Python", _values(frame["python_version"])],
      ["packages", ", ".join(packages) or wording.UNKNOWN],
      ["tokenizer", f"{_values(frame['tokenizer'])}, vocabulary "
       f"{_values(frame['vocab_size'].map(_integer))}, "
       f"{_range(frame['bytes_per_token'], '{:.3g}')} bytes a token"],
      ["passes over the data", f"at most {frame['epochs'].max():.3g}"
       if frame["epochs"].notna().any() else wording.UNKNOWN],
      ["FLOPs convention", _values(frame["flops_convention"])],
      ["began, ended", f"{frame['started_at'].dropna().min()} to "
       f"{frame['finished_at'].dropna().max()}"
       if frame["finished_at"].notna().any() else wording.UNKNOWN],
  ]
  return page.heading("What was run, on what") + page.table(
      [], rows, "left wrap")


# --- Details -----------------------------------------------------------------


def _runs(frame: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
  """Complete runs under the names that `plots` reads, those without a number
  left out."""
  frame = frame.assign(run=table.run_names(frame))
  frame = frame[frame["status"] == "complete"]
  columns = {"params": settings.get("params") or "params_total",
             "tokens": settings.get("tokens") or "tokens_seen",
             "flops": settings.get("flops") or "flops_total", "loss": "loss"}
  runs = pd.DataFrame({"run": frame["run"], **{
      name: frame[column] for name, column in columns.items()}})
  numbers = runs[list(columns)]
  good = (np.isfinite(numbers) & (numbers > 0)).all(axis=1)
  return runs[good].reset_index(drop=True)


def _ends(name: str, column: pd.Series) -> str:
  low, high = (wording.amount(name, end)
               for end in (column.min(), column.max()))
  return low if low == high else f"{low} to {high}"


def _values(column: pd.Series) -> str:
  found = sorted({wording.UNKNOWN if pd.isna(v) else str(v) for v in column})
  return ", ".join(found)


def _only(column: pd.Series) -> float | None:
  """The value that all rows share, or None."""
  values = column.unique()
  return float(values[0]) if len(values) == 1 and wording.known(
      values[0]) else None


def _range(column: pd.Series, form: str | None = None) -> str:
  text = form.format if form else wording.count
  if not column.notna().any():
    return wording.UNKNOWN
  low, high = text(column.min()), text(column.max())
  return low if low == high else f"{low} to {high}"


def _integer(value: float) -> str:
  return f"{value:.0f}" if wording.known(value) else wording.UNKNOWN
