# SPDX-License-Identifier: Apache-2.0
"""report.html and figures/ of a directory of runs.

What the page says is decided here, how it looks in `page`, what the figures
show in `plots`.
"""

import html
import io
import os
import pathlib
from typing import Any, Mapping

import numpy as np
import pandas as pd

from tfjax.scaling import page
from tfjax.scaling import plots
from tfjax.scaling import records
from tfjax.scaling import result
from tfjax.scaling import table
from tfjax.scaling import wording
from tfjax.scaling.fit import default_holdout
from tfjax.scaling.fit import fit as fit_law

_FIGURES = {
    "curves": (
        "Loss curves", "Training loss against tokens and compute, averaged "
        "over windows of equal length in log tokens. Markers are the held-out "
        "loss at the end of each run."),
    "size": (
        "Loss against model and data size", "Each series holds the other axis "
        "at the value shown (≈: points are drawn with the nearest). {lines}"),
    "compute": (
        "Loss against compute", "Every run at its training FLOPs; the dashed "
        "line joins those that spent theirs best. {frontier}"),
    "prediction": (
        "Predicted against measured", "Left: the diagonal is a perfect "
        "prediction. Right: the same, as relative error by compute. Held-out "
        "runs played no part in the fit."),
    "optimal": (
        "Compute-optimal size and data", "The split of a budget that "
        "minimises the fitted loss, {cost}. Beyond the fitted runs the line "
        "is dotted: an extrapolation."),
}


def write(workdir: str | os.PathLike[str],
          settings: Mapping[str, Any] | None = None) -> pathlib.Path:
  """Writes workdir/report.html and workdir/figures/NAME.{png,pdf}.

  Args:
    workdir: directory of run directories, as `records.load` reads it.
    settings: arguments of `fit`, as a fit's record holds them; unset: those
      of `scripts/fit.py` when it is given none.

  Returns:
    The page's path.

  Raises:
    FileNotFoundError: no such directory, or no run in it has a result.
    records.RecordError: a record cannot be read.
  """
  workdir = pathlib.Path(workdir)
  frame = records.load(workdir)
  if not len(frame):
    raise FileNotFoundError(
        f"no run below {workdir} has a result.json; nothing to report")
  fit, problem = None, ""
  settings = dict(settings) if settings else {
      "holdout": default_holdout(frame)}
  try:
    fit = fit_law(frame, **settings)
  except table.TableError as error:
    problem = str(error)
  runs = _runs(frame, settings)
  curves = {run: records.curves(directory) for run, directory
            in zip(table.run_names(frame), frame["directory"])}
  entropy_rate = _only(frame["entropy_rate"])
  figures = plots.draw(runs, curves, fit, entropy_rate)
  (workdir / "figures").mkdir(exist_ok=True)
  pictures = {}
  for name, figure in figures.items():
    for ending in ("png", "pdf"):
      plots.save(figure, str(workdir / "figures" / f"{name}.{ending}"))
    buffer = io.BytesIO()
    plots.save(figure, buffer, format="svg", metadata={"Date": None})
    pictures[name] = buffer.getvalue()
  sections = [
      _headline(frame, runs, fit),
      _fit_section(fit, problem, entropy_rate),
      *(_figure_section(name, svg, fit) for name, svg in pictures.items()),
      _optimal_table(fit),
      _run_table(frame),
      _left_out(frame, fit, records.unfinished(workdir)),
      _provenance(frame, fit),
  ]
  path = workdir / "report.html"
  partial = path.with_suffix(".html.partial")
  partial.write_text(page.document(_title(frame), "\n".join(sections)),
                     encoding="utf-8")
  partial.replace(path)
  return path


def optimal_budgets(fit: result.Fit) -> np.ndarray:
  """A few budgets: the cheapest run's to ten times the dearest's."""
  spent = [*fit.runs["flops"], *(h.flops for h in fit.holdout)]
  return np.geomspace(min(spent), 10 * max(spent), 5)


def fit_words(fit: result.Fit) -> str:
  """One sentence on how far the fit is to be trusted."""
  words = {"converged": "The runs determine the law",
           "not_identifiable": "The runs do not determine the law",
           "bound_hit": "A parameter ran into the end of its range",
           "multiple_optima": "More than one law fits these runs",
           "max_iterations": "The fit did not settle"}[fit.status]
  detail = "" if fit.status == "converged" else f": {fit.reason}"
  return (f"{words}{detail}. {fit.share_at_best:.0%} of {fit.starts} starts "
          f"reached this optimum.")


def status_words(fit: result.Fit) -> str:
  return fit.status.replace("_", " ")


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
    exponents = ", ".join(f"{name} is {wording.parameter(fit, name)}"
                          for name in fit.law.exponents)
    text += f" Of the fitted exponents, {exponents}."
    text += f" {_held_out_words(fit)}" if fit.holdout else ""
  spent, seconds = frame["flops_total"], frame["device_seconds"]
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


def _fit_section(fit: result.Fit | None, problem: str,
                 entropy_rate: float | None) -> str:
  head = page.heading("The fitted law")
  if fit is None:
    return head + page.card(page.chip("no fit", "") + page.paragraph(
        f"There is no fit: {problem}"))
  rows = [[name, wording.parameter(fit, name)] for name in fit.law.parameters]
  if entropy_rate is not None:
    rows.append(["entropy rate of the source", f"{entropy_rate:.4f} nats a "
                 "token, known: what E should be"])
  body = (_law(fit) + f"<p>{page.chip(status_words(fit), fit.status)} "
          f"{html.escape(fit_words(fit))}</p>"
          + page.table([], rows, "left"))
  return head + page.card(body) + _held_out(fit)


def _law(fit: result.Fit) -> str:
  """The law with its numbers, those that are not determined left as names."""
  def shown(name: str) -> str:
    if fit.determined[name]:
      return f"{fit.coefficients[name]:.3g}"
    return f'<span class="open">{html.escape(name)}</span>'
  letters = {"params": "N", "tokens": "D"}
  terms = []
  for term in fit.law.terms:
    powers = " ".join(f"{letters[axis]}<sup>{shown(name)}</sup>"
                      for axis, name in term.exponents.items())
    terms.append(shown(term.coefficient) + (f" / {powers}" if powers else ""))
  return f'<p class="law">L(N, D) = {" + ".join(terms)}</p>'


def _held_out(fit: result.Fit) -> str:
  head = page.heading("Held-out prediction")
  if not fit.holdout:
    return head + page.paragraph("No run was held out of this fit, so nothing "
                                 "here tests it.")
  rows = [[h.run, wording.count(h.params), wording.count(h.tokens),
           wording.power(h.flops), f"{h.predicted:.4f}",
           wording.between(h.interval, "{:.4f}"), f"{h.measured:.4f}",
           f"{h.relative_error:+.2%}"] for h in fit.holdout]
  return head + page.paragraph(_held_out_words(fit)) + page.table(
      ["run", "N", "D", "FLOPs", "predicted", f"{fit.level:.0%} interval",
       "measured", "error"], rows)


def _held_out_words(fit: result.Fit) -> str:
  worst = max(abs(h.relative_error) for h in fit.holdout)
  count = len(fit.holdout)
  return (f"The {f'{count} runs' if count > 1 else 'run'} with the most "
          f"compute took no part in the fit; it predicts their loss to within "
          f"{worst:.2%}.")


def _figure_section(name: str, svg: bytes, fit: result.Fit | None) -> str:
  title, caption = _FIGURES[name]
  caption = caption.format(
      lines="" if fit is None else
      f"Lines are the fitted law with its {fit.level:.0%} interval; hollow "
      "markers were held out of the fit.",
      frontier="" if fit is None or not fit.has_intervals else
      "The solid line is the least loss that the fitted law gives a budget.",
      cost="" if fit is None else wording.cost(fit))
  return page.heading(title) + page.figure(svg, caption.strip(), title)


def _optimal_table(fit: result.Fit | None) -> str:
  if fit is None or not fit.has_intervals:
    return ""
  rows = fit.compute_optimal(optimal_budgets(fit))
  def cell(row: Any, name: str, text: Any) -> str:
    low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
    return f"{text(getattr(row, name))} ({text(low)} to {text(high)})"
  cells = [[wording.power(row.flops) + (" *" if row.extrapolated else ""),
            cell(row, "params", wording.count),
            cell(row, "tokens", wording.count),
            cell(row, "tokens_per_parameter", wording.count),
            cell(row, "loss", "{:.3f}".format)] for row in rows.itertuples()]
  note = "* beyond the fitted runs: an extrapolation."
  if fit.status != "converged":
    note += f" The fit is {status_words(fit)}: illustration only."
  return page.table(["FLOPs", "N*", "D*", "tokens / parameter", "loss"],
                    cells) + page.paragraph(note, "note")


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
  return page.heading("Runs") + page.table(
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
  head = page.heading("Runs left out")
  if not rows:
    return head + page.paragraph("None: every run is complete and was used.")
  return head + page.table(["run", "why"], rows, "left wrap")


def _provenance(frame: pd.DataFrame, fit: result.Fit | None) -> str:
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
      ["energy", _total(frame, "energy_kwh", "kWh", "energy_source")],
      ["CO2e", _total(frame, "co2e_kg", "kg", "co2e_source")],
      ["began, ended", f"{frame['started_at'].dropna().min()} to "
       f"{frame['finished_at'].dropna().max()}"
       if frame["finished_at"].notna().any() else wording.UNKNOWN],
  ]
  if fit is not None:
    rows += [["law", f"{fit.law.form} ({fit.law.source})"],
             ["fit", "; ".join(f"{name}: {value}" for name, value
                               in fit.conventions.items()
                               if name != "flops_convention")],
             ["resampling", f"{fit.settings['bootstrap']} bootstrap resamples "
              f"of the runs, {fit.level:.0%} percentile intervals, seed "
              f"{fit.settings['seed']}"],
             ["FLOPs of N and D", wording.cost(fit)]]
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


def _total(frame: pd.DataFrame, name: str, unit: str, source: str) -> str:
  known = frame[name].notna()
  if not known.any():
    return wording.UNKNOWN
  missing = f", {(~known).sum()} runs unknown" if not known.all() else ""
  return (f"{frame[name].sum():.3g} {unit} ({_values(frame[source][known])}"
          f"{missing})")
