# SPDX-License-Identifier: Apache-2.0
"""What scripts/plan.py prints: tables and units. The learning-rate curve
is in plan_curve.py."""

import dataclasses
import math
from typing import Any, Sequence

from rich import console as console_lib
from rich import table as table_lib
from rich import text as text_lib

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.cost import estimates
from tfjax.sweep import forecast as forecast_lib
from tfjax.train import sharding
from tfjax.train import ways_out

_CLOSE = 0.1  # how good an estimate of memory is
_MEMORY_KINDS = {"optimizer": "optimizer state"}


def line(console: console_lib.Console, text: str) -> None:
  console.print(text, markup=False, highlight=False, soft_wrap=True)


def binary(size: float | None) -> str:
  """Bytes as hardware counts them: '15.8 GiB'."""
  if size is None:
    return "unknown"
  for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
    if size >= 1 << power:
      return f"{size / (1 << power):.4g} {unit}"
  return f"{size:.0f} B"


def si(value: float | None, unit: str) -> str:
  """Three digits and a decimal prefix; None: unknown."""
  if value is None:
    return "unknown"
  power = max(0, min(18, 3 * math.floor(
      math.log10(abs(value) * 1.0005) / 3))) if value else 0
  prefix = " kMGTPE"[power // 3].strip()
  return f"{value / 10.0**power:.3g} {prefix}{unit}"


def table(console: console_lib.Console, title: str, header: list[str],
               rows: list[list[str]]) -> None:
  result = table_lib.Table(title=title, title_justify="left", box=None,
                           pad_edge=False, padding=(0, 1),
                           header_style="dim")
  for position, name in enumerate(header):
    result.add_column(name, justify="right" if position else "left")
  for row in rows:
    result.add_row(*map(text_lib.Text, row))
  console.print(result)


def flags_of(changes: dict[str, Any]) -> str:
  """Changes as they are given on the command line."""
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())




# --- Units -------------------------------------------------------------------


def exponent(value: float) -> str:
  """'3.19e23', which FLOPs are better known by than by prefixes."""
  mantissa, power = f"{value:.2e}".split("e")
  return f"{mantissa}e{int(power)}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
  """'5.4 min', '21.3 h', '34.0 days'."""
  if seconds is None:
    return "unknown"
  for unit, name in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
    if seconds >= unit:
      return f"{seconds / min(unit, 86400):,.3g} {name}"
  return f"{seconds:.3g} s"


def money(usd: float | None) -> str:
  if usd is None:
    return "unknown"
  return f"${usd:,.0f}" if usd >= 100 else f"${usd:,.3g}"


def quantity(value: float | None, unit: str) -> str:
  if value is None:
    return "unknown"
  return (f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}")


# --- A run -------------------------------------------------------------------


def run(console: console_lib.Console, config: config_lib.ExperimentConfig,
        one: estimates.Estimate, largest_batch: int | None) -> None:
  """All that is known of one run."""
  budget = one.budget
  line(console, f"{one.name}: {one.family}, {config.objective.name}, "
       f"{config.train.dtype}, remat {config.model.remat}, layers "
       f"{'scanned' if config.model.scan_layers else 'unrolled'}")
  line(console, machine_words(one))
  facts(console, "run", [
      ("parameters", f"{budget.params_total:,}",
       f"{budget.params_embedding:,} embedding, "
       f"{budget.params_non_embedding:,} other"
       + (f", {budget.params_head:,} in the head"
          if budget.params_head else "")),
      ("tokens", f"{budget.tokens:,}",
       f"{budget.tokens_per_parameter:.3g} a parameter; "
       + ("unique tokens and epochs unknown: no data was read"
          if budget.epochs is None else
          f"{budget.unique_tokens:,} of them unique, {budget.epochs:.3g} "
          "epochs")),
      ("steps", f"{budget.steps:,}",
       f"of {budget.batch_tokens:,} tokens in {config.train.batch_size:,} "
       "sequences"),
      ("FLOPs", exponent(budget.flops_total), one.flops_convention)])
  flops(console, [one])
  memory(console, one)
  if largest_batch is not None:
    line(console, f"the largest batch that fits: {largest_batch:,} sequences "
         "on these devices (estimate)")
  facts(console, "cost", cost_rows(one, one.seconds, one.seconds_source))


def machine_words(one: estimates.Estimate) -> str:
  machine = one.machine
  kind = one.hardware or machine.device_kind or "an unknown device"
  if machine.device_kind not in (None, kind):
    kind += f" ({machine.device_kind})"
  return (f"on {machine.num_devices:,} x {kind}: "
          f"{sharding.product(one.mesh)}")


def cost_rows(one: estimates.Estimate, seconds: float | None,
              source: str) -> list[tuple[str, str, str]]:
  """Time, price, energy and carbon of a run, each with how."""
  spent = one.footprint
  peak = si(one.peak_flops_per_second, "FLOP/s")
  rows = [("time", duration(seconds), source),
          ("peak", peak, f"a device; {one.peak_source}")]
  if one.mfu is not None:
    rows.append(("MFU", f"{one.mfu:.1%}", "without what is recomputed, "
                 f"{one.flops_recompute / one.budget.flops_total:.1%} on top"))
  if spent is None:
    return rows + [("price, kWh, CO2e", "unknown", "the time is")]
  return rows + [
      ("device-hours", quantity(spent.device_hours, "h"),
       f"{one.machine.num_devices:,} device(s), occupied from start to end"),
      ("price", money(spent.price_usd), spent.price_source),
      ("energy", quantity(spent.energy_kwh, "kWh"), spent.energy_source),
      ("CO2e", quantity(spent.co2e_kg, "kg"), spent.co2e_source)]


def facts(console: console_lib.Console, title: str,
          rows: Sequence[tuple[str, str, str]]) -> None:
  """Names, values and remarks, which wrap."""
  result = table_lib.Table(title=title, title_justify="left", box=None,
                           show_header=False, pad_edge=False)
  result.add_column(style="bold", no_wrap=True, min_width=12)
  result.add_column(justify="right", no_wrap=True, min_width=18)
  result.add_column(style="dim")
  for row in rows:
    result.add_row(*map(text_lib.Text, row))
  console.print(result)


def flops(console: console_lib.Console,
          found: Sequence[estimates.Estimate]) -> None:
  """By component and by convention, summed over runs."""
  total = sum(one.budget.flops_total for one in found)
  parts = _summed(one.flops_by_component for one in found)
  recompute = sum(one.flops_recompute for one in found)
  table(console, "FLOPs by component, forward and backward",
        ["component", "FLOPs", "share"], [
            [name, exponent(value), f"{value / total:.1%}"]
            for name, value in parts.items()] + [
                ["together", exponent(total), "100%"],
                ["recomputed besides (remat)", exponent(recompute),
                 f"{recompute / total:.1%}"]])
  table(console, "FLOPs by convention", ["convention", "FLOPs", "ratio"], [
      [name + (" (used here)" if name == found[0].flops_convention else ""),
       exponent(value), f"{value / total:.3f}"] for name, value in
      _summed(one.flops_by_convention for one in found).items()])


def memory(console: console_lib.Console, one: estimates.Estimate) -> None:
  """By kind, and what there is."""
  total = one.memory_bytes["total"]
  rows = [[_MEMORY_KINDS.get(kind, kind), binary(size), f"{size / total:.1%}"]
          for kind, size in one.memory_bytes.items()]
  available = one.machine.available_bytes
  table(console, "memory of a device (estimate)",
        ["kind", "bytes", "share"],
        rows + [["available", binary(available), ""]])
  line(console, f"available: {one.machine.available_source}")


def _summed(found: Any) -> dict[str, float]:
  """Dictionaries added up, in the order of the first."""
  result: dict[str, float] = {}
  for values in found:
    for name, value in values.items():
      result[name] = result.get(name, 0.0) + value
  return result


# --- A sweep -----------------------------------------------------------------


def sweep_of_runs(console: console_lib.Console,
                  forecast: forecast_lib.Forecast) -> None:
  """Every cell, and all of them together."""
  found, total = forecast.estimates, forecast.total()
  largest = max(found, key=lambda one: one.memory_bytes["total"])
  line(console, f"{total['runs']} runs, {forecast.workers} at a time, each "
       + machine_words(largest))
  cells(console, forecast)
  whole = forecast.flops_whole
  if total["flops"] < whole:
    line(console, f"shared: {exponent(whole - total['flops'])} FLOPs of "
         f"{exponent(whole)}, {1 - total['flops'] / whole:.0%}, are a trunk's "
         f"and are spent once; {exponent(total['flops'])} are to be spent")
  flops(console, found)
  line(console, f"the most memory is that of {_label(forecast, largest)}")
  memory(console, largest)
  sources = cost_rows(largest, forecast.seconds, forecast.basis)
  values = {
      "device-hours": quantity(_hours(total["device_seconds"]), "h"),
      "price": money(total["price_usd"]),
      "energy": quantity(total["energy_kwh"], "kWh"),
      "CO2e": quantity(total["co2e_kg"], "kg")}
  facts(console, "cost of the sweep", [
      (name, values.get(name, value), how) for name, value, how in sources
      if name != "MFU"])


def cells(console: console_lib.Console,
          forecast: forecast_lib.Forecast) -> None:
  """A row a run: what it is and what it costs. What branches share with their
  trunks is in D and FLOPs of each, and in the time and costs of trunks alone."""
  total = forecast.total()
  names = ["run", "N", "embedding", "D", "D/N", "steps", "FLOPs", "memory",
           "time", "price", "kWh", "kg CO2e"]
  footers = ["all", "", "",
             si(sum(spec.budget.tokens for spec in forecast.specs), ""), "", "",
             exponent(forecast.flops_whole), "", duration(forecast.seconds),
             money(total["price_usd"]), quantity(total["energy_kwh"], ""),
             quantity(total["co2e_kg"], "")]
  labels = _labels(forecast)
  rows = [_cell(labels[spec.run_id], spec, one)
          for spec, one in zip(forecast.specs, forecast.estimates)]
  # What is unknown of every run takes no column.
  kept = [place for place in range(len(names))
          if any(row[place] != "unknown" for row in rows)]

  def part(places: Sequence[int]) -> table_lib.Table:
    result = table_lib.Table(box=None, pad_edge=False, padding=(0, 1),
                             show_footer=True, header_style="dim",
                             footer_style="bold")
    for place in places:
      result.add_column(names[place], footers[place].strip(), no_wrap=True,
                        justify="right" if place else "left",
                        overflow="ellipsis")
    for row in rows:
      result.add_row(*(text_lib.Text(row[place].strip()) for place in places))
    return result

  whole = part(kept)
  # Measured for a console without an end, else it is never too wide.
  endless = console.options.update(max_width=1000)
  if console.measure(whole, options=endless).maximum <= console.width:
    console.print(whole)
    return
  costs = names.index("time")
  console.print(part([place for place in kept if place < costs]))
  console.print(part([0, *(place for place in kept if place >= costs)]))


def _cell(label: str, spec: sweep.RunSpec,
          one: estimates.Estimate) -> list[str]:
  budget, spent = spec.budget, one.footprint
  costs = ["unknown"] * 3 if spent is None else [
      money(spent.price_usd), quantity(spent.energy_kwh, ""),
      quantity(spent.co2e_kg, "")]
  return [label, si(budget.params_total, ""),
          f"{budget.params_embedding / budget.params_total:.0%}",
          si(budget.tokens, ""), f"{budget.tokens_per_parameter:.3g}",
          f"{budget.steps:,}", exponent(budget.flops_total),
          binary(one.memory_bytes["total"]) + "!" * (one.fits is False),
          duration(one.seconds), *costs]


def _labels(forecast: forecast_lib.Forecast) -> dict[str, str]:
  """What tells runs apart beside their length: as few overrides as do."""
  specs = forecast.specs
  kept: list[str] = []

  def values(spec: sweep.RunSpec, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(_short(spec.overrides.get(key)) for key in keys)

  for key in dict.fromkeys(key for spec in specs for key in spec.overrides):
    more = {values(spec, [*kept, key]) for spec in specs}
    if not key.startswith("duration.") and len(more) > len(
        {values(spec, kept) for spec in specs}):
      kept.append(key)
  return {spec.run_id: f"{number} " + " ".join(
      f"{key.rpartition('.')[2]}={value}"
      for key, value in zip(kept, values(spec, kept)))
          for number, spec in enumerate(specs, 1)}


def _label(forecast: forecast_lib.Forecast, one: estimates.Estimate) -> str:
  spec = forecast.specs[forecast.estimates.index(one)]
  return f"run {_labels(forecast)[spec.run_id]}"


def _short(value: Any) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _hours(seconds: float | None) -> float | None:
  return None if seconds is None else seconds / 3600


# --- Ways out ----------------------------------------------------------------


def ways(console: console_lib.Console, found: Sequence[ways_out.Way]) -> None:
  """Each as flags, and what it costs."""
  if not found:
    line(console, "no way out was found: neither cutting, recomputing and "
         "smaller batches do, nor up to 64 times the devices of --hardware")
    return
  line(console, "it fits (by estimate), the cheapest first, with:")
  for number, way in enumerate(found, 1):
    line(console, f"  {number}. {way_flags(way)}")
    line(console, f"     {way_words(way)}")


def way_flags(way: ways_out.Way) -> str:
  """As given on the command line, over what was given."""
  parts = [f"--hardware={way.hardware}"] if way.hardware else []
  parts += [f"--num_devices={way.num_devices}"] if way.num_devices else []
  return " ".join([*parts, flags_of(way.changes)]).strip()


def way_words(way: ways_out.Way) -> str:
  """What a way costs, in words."""
  words = [f"{binary(way.memory_bytes)} of {binary(way.available_bytes)} a "
           "device"]
  words.append(f"{way.extra_flops:.0%} more FLOPs by recomputation"
               if way.extra_flops else "no more FLOPs")
  words += [words_ for key, words_ in _WAY_WORDS.items()
            if _matters(way.changes.get(key))]
  if way.devices_ratio != 1:
    words.append(f"{way.devices_ratio:g} times the devices, at the same MFU "
                 "for the same price in less time")
  if way.hardware:
    words.append("price unknown" if way.price_ratio is None else
                 f"{way.price_ratio:.2g} times the price at the same MFU")
  return "; ".join(words)


def _matters(value: Any) -> bool:
  return value is not None and value != 1


_WAY_WORDS = {
    "mesh.fsdp": "parameters travel over the links in every step",
    "mesh.tensor": "activations do in every layer",
    "train.accumulation_steps": "smaller products, one after another",
    "model.scan_layers": "layers compiled as one",
    "train.batch_size": "another batch is another experiment: the learning "
                        "rate may need to follow",
}


def way_dict(way: ways_out.Way) -> dict[str, Any]:
  """A way as JSON has it."""
  return dataclasses.asdict(way) | dict(flags=way_flags(way))


def verdict(forecast: forecast_lib.Forecast) -> str:
  """The answer, in a line."""
  most = max(forecast.estimates, key=lambda one: one.memory_bytes["total"])
  needed = binary(most.memory_bytes["total"])
  have = f"{binary(most.machine.available_bytes)} a device"
  text = {True: f"fits: {needed} of {have}",
          False: f"does not fit: {needed} of {have}",
          None: f"whether it fits is unknown: it takes {needed} a device, "
                "whose memory is not known"}[forecast.fits]
  available = most.machine.available_bytes
  if available and abs(most.memory_bytes["total"] / available - 1) < _CLOSE:
    text += ", so close that only a compiler can tell"
  if forecast.fits is False:
    return f"{text} (estimate)"
  total = forecast.total()
  words = [f"{duration(forecast.seconds)}"
           if forecast.seconds is not None else "hours unknown"]
  words += [value for value in (
      money(total["price_usd"]), quantity(total["energy_kwh"], "kWh"),
      quantity(total["co2e_kg"], "kg CO2e")) if value != "unknown"]
  return f"{text}; {', '.join(words)} (estimate)"
