# SPDX-License-Identifier: Apache-2.0
"""The report's section on what runs have cost. The numbers are in `costs`.

What is unknown is named once, with what makes it known, and is a dash in a
table's cell.
"""

from typing import Any, Callable, Sequence

import pandas as pd

from tfjax.scaling import costs
from tfjax.scaling import page
from tfjax.scaling import result
from tfjax.scaling import wording

_DASH, _ARROW = "–", "→"
_LABELS = {"flops": "FLOPs", "hours": "hours", "device_hours": "device-hours",
           "price_usd": "US$", "energy_kwh": "kWh", "co2e_kg": "kg CO2e"}
_NEWER = ("nothing: every record has it, but old ones and those of runs that "
          "failed at once")
# Column of a run record that says how a number was obtained, and what makes
# it known in the runs to come.
_SOURCES = {"flops": "flops_convention", "price_usd": "price_source",
            "energy_kwh": "energy_source", "co2e_kg": "co2e_source"}
_EXPLAINED = ("price_usd", "energy_kwh", "co2e_kg")  # also where unknown
_REMEDIES = {
    "flops": _NEWER, "hours": _NEWER, "device_hours": _NEWER,
    "price_usd": "cost.hardware (or cost.hardware_file for your own) and, "
                 "where it has no price, cost.price_usd_per_chip_hour",
    "energy_kwh": "cost.hardware (or cost.hardware_file), whose TDP bounds it; "
                  "or cost.measure_energy, on a machine with counters",
    "co2e_kg": "cost.region, or cost.kg_co2e_per_kwh; it needs the energy too",
    "mfu": "cost.hardware, or scripts/bench.py --peak on that machine",
}
_HOW_FLOPS = ", without steps that were undone or lost; shared ones once"
_SHARE = "a member's share of its ensemble's"
_HOW_HOURS = ("wall time from a run's claim to its result; of runs side by "
              f"side the sum; {_SHARE}")
_HOW_OCCUPIED = f"wall time from claim to result, times devices; {_SHARE}"
_HOW_INSIDE = f"time inside training steps, times devices; {_SHARE}"
_HOW_KWH = "; without the PUE, which is in CO2e"


def section(frame: pd.DataFrame, forecast: costs.Forecast | None,
            unfinished: Sequence[str], fit: result.Fit | None,
            runs: pd.DataFrame, figure: str) -> str:
  """What the runs have cost, as HTML.

  Args:
    frame: run records, as `records.load` has them; not empty.
    forecast: of the sweep, if there is one.
    unfinished: names of runs that were begun and have no record.
    fit: of the runs, if there is one.
    runs: those that are charted: run, params, tokens, loss, flops.
    figure: HTML of loss against cost; empty where nothing is known.
  """
  frame = frame.sort_values(["params_total", "tokens_seen"])
  spent = costs.spent(frame)
  return "".join([
      page.heading("What it cost"), _lead(spent, unfinished), _facts(spent),
      _obtained(frame, spent), figure, _against_forecast(
          frame, spent, forecast, unfinished),
      _time(frame), _frontier(fit, runs, spent)])


# --- The sweep's total -------------------------------------------------------


def _lead(spent: pd.DataFrame, unfinished: Sequence[str]) -> str:
  """How many runs, which of them came to nothing, and what those took."""
  text = f"All that {_runs(len(spent))} cost, whatever became of them."
  text += _shared_words(spent)
  lost = spent[spent["status"] != "complete"]
  if len(lost):
    kinds = [f"{len(rows)} {status} ({', '.join(rows['run'])})"
             for status, rows in lost.groupby("status")]
    took = [f"{_at_least(name, lost[name])} {_LABELS[name]}"
            for name in costs.known(lost, costs.QUANTITIES)]
    text += (f" Not complete, but paid for and in every total: "
             f"{wording.listed(kinds)}, which took "
             f"{wording.listed(took) or 'nobody knows how much'}.")
  if len(unfinished):
    text += (f" Begun and without a result, and in no total: "
             f"{_runs(len(unfinished))} ({', '.join(unfinished)}).")
  return page.paragraph(text)


def _shared_words(spent: pd.DataFrame) -> str:
  """What runs that branched off others' trunks did not do again."""
  shared = spent[spent["shared"] > 0]
  if not len(shared):
    return ""
  own = spent["flops"].sum()
  return (f" {_runs(len(shared))} branched off another one's trunk, where "
          f"{wording.power(shared['shared'].sum())} FLOPs of their way are "
          f"counted, once: {own / (own + shared['shared'].sum()):.1%} of what "
          "as many runs that share nothing take. What is said of such a run is "
          "its own part.")


def _facts(spent: pd.DataFrame) -> str:
  items = []
  for name in costs.known(spent, costs.QUANTITIES):
    total = costs.Total.of(spent[name])
    missing = f", {_runs(total.unknown)} unknown" if total.unknown else ""
    items.append((_show(name, total.value), f"{_LABELS[name]}{missing}"))
  return page.facts(items)


def _obtained(frame: pd.DataFrame, spent: pd.DataFrame) -> str:
  """Where every total comes from, and what is missing for the others."""
  rows = []
  for name in costs.known(spent, costs.QUANTITIES):
    total = costs.Total.of(spent[name])
    rows.append([_LABELS[name], _show(name, total.value), str(total.known),
                 _how(frame, spent, name)])
  mfu = frame["mfu"]
  if mfu.notna().any():
    rows.append(["MFU", _range(mfu, "{:.1%}"), str(int(mfu.notna().sum())),
                 f"of {_texts(_peaks(frame[mfu.notna()]))}"])
  for label, name in (("hardware", "hardware"), ("region", "region"),
                      ("PUE", "pue")):
    if frame[name].notna().any():
      rows.append([label, _texts(frame[name].dropna().map(str), False),
                   str(int(frame[name].notna().sum())), ""])
  return page.heading("How each number was obtained", 3) + page.table(
      ["", "in all", "runs", "how"], rows, "left wrap") + _unknown(frame, spent)


def _unknown(frame: pd.DataFrame, spent: pd.DataFrame) -> str:
  """What is not known, of how many runs, why, and what to do about it."""
  columns = {**{name: spent[name] for name in costs.QUANTITIES},
             "mfu": frame["mfu"]}
  rows = []
  for name, column in columns.items():
    missing = column.isna()
    if missing.any():
      why = (_texts(frame[_SOURCES[name]][missing].fillna("not said"))
             if name in _EXPLAINED else "not recorded")
      rows.append([_LABELS.get(name, "MFU"), f"{int(missing.sum())} of "
                   f"{len(frame)}", why, _REMEDIES[name]])
  if not rows:
    return ""
  return page.paragraph(
      f"Unknown, and in no sum; {_DASH} in the tables below. What is set is "
      "for runs to come: a record stays as it was written.", "note"
      ) + page.table(["unknown", "runs", "why", "what to set"], rows,
                     "left wrap")


def _how(frame: pd.DataFrame, spent: pd.DataFrame, name: str) -> str:
  known = spent[name].notna()
  if name == "hours":
    return _HOW_HOURS
  if name == "device_hours":
    return _texts(spent["occupied"][known].map(
        {True: _HOW_OCCUPIED, False: _HOW_INSIDE}))
  text = _texts(frame[_SOURCES[name]][known].fillna("not said"))
  return text + {"flops": _HOW_FLOPS, "energy_kwh": _HOW_KWH}.get(name, "")


def _peaks(frame: pd.DataFrame) -> pd.Series:
  """Peak of a device and its source, a text a run."""
  return pd.Series([
      f"{wording.power(peak)} FLOP/s a device" + (f" ({source})" if source
                                                  else "")
      for peak, source in zip(frame["peak_flops_per_second"],
                              frame["peak_source"])], dtype=object)


# --- Predicted and spent -----------------------------------------------------


def _against_forecast(frame: pd.DataFrame, spent: pd.DataFrame,
                      forecast: costs.Forecast | None,
                      unfinished: Sequence[str]) -> str:
  head = page.heading("Predicted and spent", 3)
  if forecast is None:
    return head + page.paragraph(
        f"Nothing was predicted: there is no {costs.FORECAST} beside the runs. "
        "scripts/plan.py --config=EXPERIMENT --workdir=DIRECTORY writes it, "
        "before the sweep runs.") + _spent_alone(spent)
  compared = costs.compare(spent, forecast)
  names = [name for name in costs.QUANTITIES if costs.known(
      compared, [f"{name}_predicted", f"{name}_spent"])]
  cells = [[f"{row['run']}\n{_state(row, unfinished)}",
            *(_pair(row, name) for name in names)]
           for row in compared.to_dict("records")]
  return head + page.paragraph(_forecast_words(frame, forecast)) + page.table(
      ["run", *(_LABELS[name] for name in names)],
      cells + _sums(compared, names), "lines") + page.paragraph(
          f"Predicted {_ARROW} spent (spent / predicted); {_DASH} unknown; ≥ "
          "so much at least, as some runs are unknown. Hours and device-hours "
          f"spent are from claim to result{_inside_words(spent)}.", "note")


def _forecast_words(frame: pd.DataFrame, forecast: costs.Forecast) -> str:
  made = f" on {forecast.created}" if forecast.created else ""
  text = f"Predicted{made} by scripts/plan.py"
  text += f" for {forecast.hardware}" if forecast.hardware else ""
  used = set(frame["hardware"].dropna())
  if forecast.hardware and used - {forecast.hardware}:
    text += f" (runs were on {wording.listed(sorted(used))})"
  text += f"; hours: {forecast.basis}." if forecast.basis else "."
  if wording.known(forecast.hours):
    workers = (f" with {forecast.workers} worker{'s' * (forecast.workers > 1)}"
               if forecast.workers else "")
    text += (f" From start to end{workers} it was to take "
             f"{_duration(forecast.hours)}; ")
    began, ended = (pd.to_datetime(frame[name], errors="coerce", utc=True)
                    for name in ("started_at", "finished_at"))
    between = ended.max() - began.min()
    text += ("when it began and ended is unknown." if pd.isna(between) else
             f"{_duration(between.total_seconds() / 3600)} lie between the "
             "first start and the last end, pauses included.")
  return text


def _inside_words(spent: pd.DataFrame) -> str:
  inside = int((spent["device_hours"].notna() & ~spent["occupied"]).sum())
  return (f", but the device-hours that {_runs(inside)} spent are those inside "
          "training steps" if inside else "")


def _spent_alone(spent: pd.DataFrame) -> str:
  names = costs.known(spent, costs.QUANTITIES)
  rows = [[row["run"], row["status"], *(_show(name, row[name])
                                        for name in names)]
          for row in spent.to_dict("records")]
  return page.table(["run", "", *(_LABELS[name] for name in names)], rows)


def _state(row: dict[str, Any], unfinished: Sequence[str]) -> str:
  if row["status"] is None:
    return ("no result yet" if row["run"] in unfinished else "not begun")
  return row["status"] + ", not predicted" * (not row["planned"])


def _pair(row: dict[str, Any], name: str) -> str:
  predicted, spent, ratio = (row[f"{name}_{end}"] for end in (
      "predicted", "spent", "ratio"))
  return (f"{_show(name, predicted)}\n{_ARROW} {_show(name, spent)}"
          + (f" ({_ratio(ratio)})" if wording.known(ratio) else ""))


def _sums(compared: pd.DataFrame, names: Sequence[str]) -> list[list[str]]:
  """Like with like, then everything, where that is more.

  A forecast is of a run that comes to its end.
  """
  ended = compared["status"].eq("complete")
  both, every = ["complete runs that know both"], ["all"]
  for name in names:
    predicted, real = (compared[f"{name}_{end}"]
                       for end in ("predicted", "spent"))
    shared = ended & predicted.notna() & real.notna()
    sums = {f"{name}_predicted": predicted[shared].sum(min_count=1),
            f"{name}_spent": real[shared].sum(min_count=1)}
    ratio = (sums[f"{name}_spent"] / sums[f"{name}_predicted"]
             if sums[f"{name}_predicted"] > 0 else float("nan"))
    count = f"\n{_runs(int(shared.sum()))}" * (not shared.all())
    both.append(_pair(sums | {f"{name}_ratio": ratio}, name) + count)
    every.append(f"{_at_least(name, predicted[compared['planned']])}\n{_ARROW} "
                 f"{_at_least(name, real[compared['status'].notna()])}")
  numbers = compared[[f"{name}_{end}" for name in names
                      for end in ("predicted", "spent")]]
  if ended.all() and not numbers.isna().any(axis=None):
    return [["all", *both[1:]]]
  return [both, every]


def _at_least(name: str, column: pd.Series) -> str:
  total = costs.Total.of(column)
  return "≥ " * bool(total.known and total.unknown) + _show(name, total.value)


# --- Time --------------------------------------------------------------------


def _time(frame: pd.DataFrame) -> str:
  parts = costs.time_parts(frame)
  if not len(parts):
    return ""
  rows = [[row.part, _duration(row.hours), f"{row.share:.1%}",
           f"{row.least:.1%} to {row.most:.1%}", str(row.runs)]
          for row in parts.itertuples()]
  text = ("Of the wall time from a run's claim to its result; other is what no "
          "part accounts for.")
  known = frame[frame["goodput"].notna() & frame["wall_seconds"].notna()]
  if known["wall_seconds"].sum() > 0:
    share = (known["goodput"] * known["wall_seconds"]).sum() / known[
        "wall_seconds"].sum()
    text = (f"Goodput, the share of time in training steps that were kept: "
            f"{share:.1%} in all, {_range(known['goodput'], '{:.1%}')} by run. "
            f"{text}")
  return page.heading("Where the time went", 3) + page.paragraph(
      text) + page.table(["", "run-hours", "share", "by run", "runs"], rows)


# --- The frontier ------------------------------------------------------------


def _frontier(fit: result.Fit | None, runs: pd.DataFrame,
              spent: pd.DataFrame) -> str:
  head = page.heading("The same loss on the frontier", 3)
  why = costs.no_frontier(fit)
  if why:
    return head + page.paragraph(
        f"What the same losses cost on the frontier is unknown: {why}.")
  rows = costs.off_frontier(fit, runs, spent)
  note = f"{wording.cost(fit)}."
  if len(fit.samples):
    note += (f" Bands are {fit.level:.0%} of "
             f"{min(len(fit.samples), costs.DRAWS)} bootstrap resamples.")
  if fit.status != "converged":
    note += f" The fit is {fit.status.replace('_', ' ')}: illustration only."
  return (head + page.paragraph(_frontier_words(rows)) + _on_frontier(rows)
          + _best(fit, runs, rows) + page.paragraph(note, "note"))


def _frontier_words(rows: pd.DataFrame) -> str:
  good = rows[rows["flops_optimal"].notna()]
  if not len(good):
    return "The fitted law has no least compute for the losses of these runs."
  saved = " and ".join(
      f"{_show(name, good[f'{name}_optimal'].sum())} instead of "
      f"{_show(name, good[name].sum())} {_LABELS[name]}"
      for name in costs.known(good, ("flops", "price_usd", "co2e_kg"))
      if good[name].notna().all())
  return ("For the loss that the fitted law gives each run's N and D, how many "
          "times the least compute the run took, and what it would have cost "
          "with that least compute, at the run's own price, energy and time a "
          f"FLOP. All {_runs(len(good))} together: {saved}. A sweep needs runs "
          "off the frontier to find it.")


def _on_frontier(rows: pd.DataFrame) -> str:
  names = costs.known(rows, ("flops", *costs.BOUGHT))
  cells = []
  for row in rows.sort_values("overhead", ascending=False).itertuples():
    values = row._asdict()
    cells.append([
        row.run, wording.decimal(row.loss, 3), wording.count(row.params),
        wording.count(row.optimal_params), _banded(values), *(
            f"{_show(name, values[name])}\n{_ARROW} "
            f"{_show(name, values[f'{name}_optimal'])}" for name in names)])
  return page.table(["run", "loss", "N", "N*", "C / C*",
                     *(_LABELS[name] for name in names)], cells, "lines")


def _best(fit: result.Fit, runs: pd.DataFrame, rows: pd.DataFrame) -> str:
  """The best run's loss at other sizes than the optimal."""
  best = rows.iloc[int(runs["loss"].to_numpy().argmin())].to_dict()
  if not wording.known(best["overhead"]):
    return ""
  made = costs.other_sizes(fit, best)
  names = costs.known(made, ("flops", *costs.BOUGHT))
  cells = [[f"{row['factor']:g} N*", wording.count(row["params"]),
            _or_never(row["tokens"], wording.count),
            _banded(row), *(
                _or_never(row[name], lambda value, name=name: _show(
                    name, value)) for name in names)]
           for row in made.to_dict("records")]
  return page.heading("The best run's loss at other sizes", 3) + page.paragraph(
      f"What the loss of {best['run']} ({best['loss']:.3f} nats a token by the "
      "law) costs with models smaller and larger than the optimal, at that "
      "run's own rates.") + page.table(
          ["", "N", "D", "C / C*", *(_LABELS[name] for name in names)], cells,
          "lines")


# --- Details -----------------------------------------------------------------


def _show(name: str, value: float | None) -> str:
  if not wording.known(value):
    return _DASH
  return (wording.power(value) if name == "flops"
          else wording.number(value, 3))


def _times(value: float) -> str:
  return f"× {_ratio(value)}" if wording.known(value) else ""


def _ratio(value: float) -> str:
  return f"{value:.2f}" if 0.1 <= value < 10 else wording.number(value, 3)


def _or_never(value: float, show: Callable[[float], str]) -> str:
  return "never" if value == float("inf") else show(value)


def _banded(row: dict[str, Any]) -> str:
  """Times the least compute, and below it between what."""
  text, low, high = (_or_never(row[name], _times) for name in (
      "overhead", "overhead_low", "overhead_high"))
  return text + f"\n{low} to {high}".replace("× ", "") * bool(low and high)


def _range(column: pd.Series, form: str) -> str:
  low, high = form.format(column.min()), form.format(column.max())
  return low if low == high else f"{low} to {high}"


def _texts(column: pd.Series, counted: bool = True) -> str:
  """The distinct texts, with how many runs say so where they differ."""
  counts = column.value_counts()
  counted = counted and len(counts) > 1
  return "; ".join(text + f" ({_runs(count)})" * counted
                   for text, count in counts.items())


def _duration(hours: float) -> str:
  return wording.duration(3600 * hours)


def _runs(count: int) -> str:
  return f"{count} run{'s' * (count != 1)}"
