# SPDX-License-Identifier: Apache-2.0
"""What a run spends: time on devices, energy, and what these amount to in
money and CO2e.

A checkpoint's counters hold all of it up to there. What was spent after the
newest checkpoint, and is lost when the run is killed, is told by the rows of
metrics.jsonl and by spent.json beside them: how the part that wrote them
began, or ended.
"""

import copy
import dataclasses
import json
import logging
import os
import pathlib
import socket
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from tfjax import config as config_lib
from tfjax.cost import energy
from tfjax.cost import flops as flops_lib
from tfjax.cost import footprint as footprint_lib
from tfjax.cost import hardware as hardware_lib
from tfjax.train import claim
from tfjax.train import clock as clock_lib
from tfjax.train import cluster
from tfjax.train import records
from tfjax.train import tuning

_LOG = logging.getLogger("tfjax")

FILE = "spent.json"
NOTHING = clock_lib.NOTHING | dict(
    devices=0, device_kind=None, measuring=False, measured_kwh=0.0,
    measured_sources=[], unmeasured_device_seconds={}, energy_kwh=0.0)


class Spent:
  """What one run has spent, in its parts before and in this one.

  Attributes:
    clock: of the run.
    peak: of one device of this part, where it is known.
  """

  def __init__(self, config: config_lib.ExperimentConfig, mesh: Mesh,
               run_dir: pathlib.Path, clock: clock_lib.Clock,
               meter: energy.Meter):
    """A part on `mesh` has begun; `meter` measures this process's share.

    Raises:
      ConfigError: unknown hardware or region, a bad file, an absurd factor.
    """
    self.clock = clock
    self._cost, self._path, self._meter = config.cost, run_dir / FILE, meter
    self._devices = mesh.size
    self._kind = mesh.devices.flat[0].device_kind
    self._hardware: dict[str, hardware_lib.Hardware | None] = {}
    self._kwh_per_device_second: dict[str, float | None] = {}
    self._gathered_kwh: float | None = None
    self._why: str | None = None  # nothing is measured, though it could be
    self._started = False
    # With several processes only once all have told.
    self._measuring = jax.process_count() == 1 and meter.kwh() is not None
    self.peak = hardware_lib.peak(
        self._kind, config.train.dtype, config.cost)
    other = hardware_lib.contradicted(config.cost, self._kind)
    if other:
      _LOG.warning("cost.hardware is %s, but JAX trains on %r, which is %s: "
                   "price, energy and MFU are not of what it runs on",
                   config.cost.hardware, self._kind, other.name)
    self._go_on(NOTHING)

  def start(self, saved: dict[str, Any] | None, step: int) -> None:
    """Training goes on from the state after `step`; by all processes.

    `saved`: the counters of that step's checkpoint, None at the start.
    """
    self._go_on(resumed(
        saved, claim.shared(lambda: _noted(self._path)), step))
    self._started = True
    self._gathered_kwh = _over_processes(self._meter.kwh())
    self._measuring = self._gathered_kwh is not None
    if not self._measuring and self._meter.kwh() is not None:
      self._why = "not each process has a counter for its share of the machine"
    self._write(step)

  def _go_on(self, before: dict[str, Any]) -> None:
    self._before = before
    self.clock.go_on(self._devices, self._kind, before)
    # Looked up now, as the user's file may be gone at the end.
    for kind in {*before["occupied_device_seconds"], self._kind}:
      cost = _of_kind(kind, self._kind, self._cost)
      self._hardware[kind] = hardware_lib.resolve(cost, kind)
      self._kwh_per_device_second[kind] = footprint_lib.footprint(
          1.0, self._hardware[kind], cost).energy_kwh

  # --- While it goes on ------------------------------------------------------

  def columns(self) -> dict[str, float | None]:
    """Of a row: what is occupied and drawn until now, by all parts."""
    occupied = self.clock.occupied_device_seconds()
    kwh = None
    if not self._measuring or jax.process_count() == 1:
      kwh = self._energy_kwh(self._part_kwh(), occupied)
    # Else the other processes have measured too, and are not asked for a row.
    return dict(device_seconds=sum(occupied.values()), energy_kwh=kwh)

  def mfu(self, tokens_per_second: float | None,
          flops_per_token: float) -> float | None:
    """Of this part's devices; None where their peak is unknown."""
    if tokens_per_second is None:
      return None
    return flops_lib.model_flops_utilization(
        tokens_per_second, flops_per_token, self._devices,
        self.peak.flops_per_second)

  def gather(self) -> None:
    """Sums what all processes have measured; by all of them."""
    if self._measuring:
      self._gathered_kwh = _over_processes(self._meter.kwh(fresh=True))

  def counters(self) -> dict[str, Any]:
    """What a resume goes on from; energy of all processes as gathered."""
    kwh, count = self._part_kwh(fresh=True), jax.process_count()
    sources = set(self._before["measured_sources"])
    if kwh is not None:
      sources.add(self._meter.source + (
          f"; so at each of {count} processes" if count > 1 else ""))
    found = self.clock.counters()
    occupied = found["occupied_device_seconds"]
    return found | dict(
        devices=self._devices, device_kind=self._kind,
        measuring=kwh is not None,
        measured_kwh=self._before["measured_kwh"] + (kwh or 0.0),
        measured_sources=sorted(sources),
        unmeasured_device_seconds=self._unmeasured(kwh, occupied),
        energy_kwh=self._energy_kwh(kwh, occupied))

  def note(self, step: int | None) -> None:
    """Keeps this beside the rows, where the state is of `step`; by all
    processes, of which the main one writes."""
    self.gather()
    self._write(step)

  def _write(self, step: int | None) -> None:
    if cluster.is_main():
      try:
        records.write_json(self._path, dict(
            step=step, counters=self.counters()))
      except records.WriteError as error:
        # Of the files that a run cannot do without, the next will tell.
        _LOG.warning("%s", error)

  def _part_kwh(self, fresh: bool = False) -> float | None:
    """Measured in this part, or None; up to a second old, unless `fresh`."""
    if not self._measuring:
      return None
    return (self._meter.kwh(fresh) if jax.process_count() == 1 else
            self._gathered_kwh)

  def _unmeasured(self, part_kwh: float | None,
                  occupied: dict[str, float]) -> dict[str, float]:
    """Device-seconds in which nothing was measured, by kind of device."""
    found, kind = dict(self._before["unmeasured_device_seconds"]), self._kind
    if part_kwh is None:
      before = self._before["occupied_device_seconds"].get(kind, 0.0)
      found[kind] = found.get(kind, 0.0) + occupied[kind] - before
    return found

  def _energy_kwh(self, part_kwh: float | None,
                  occupied: dict[str, float]) -> float | None:
    """What was measured, and the rest by its hardware's power, in kWh."""
    rest = self._unmeasured(part_kwh, occupied)
    estimates = [_product(seconds, self._kwh_per_device_second[kind])
                 for kind, seconds in rest.items()]
    return footprint_lib.total(
        [self._before["measured_kwh"], part_kwh or 0.0, *estimates])

  # --- At its end ------------------------------------------------------------

  def fail(self) -> dict[str, Any]:
    """As `amounts`, of a part that has failed, maybe before `start`."""
    if not self._started:
      noted = _noted(self._path)
      self._go_on(resumed(None, noted, noted and noted["step"]))
    # The other processes may be gone.
    if jax.process_count() > 1:
      self._measuring = False
      self._why = "what each process measured was not told"
    found = self.amounts()
    self._write(None)  # from that state nothing goes on
    return found

  def amounts(self) -> dict[str, Any]:
    """The fields of the record that tell of time, money, energy and CO2e."""
    counters = self.counters()
    phases = counters["phase_seconds"]
    found = footprint(counters, self._hardware, self._cost,
                      self._why or self._meter.source)
    last = self._hardware[self._kind]
    return dict(
        {f"{phase}_seconds": phases[phase] for phase in clock_lib.PHASES
         if phase != "other"},
        wall_seconds=clock_lib.wall_seconds(counters),
        lost_seconds=counters["lost_seconds"],
        goodput=clock_lib.goodput(counters),
        occupied_device_seconds=sum(
            counters["occupied_device_seconds"].values()),
        hardware=None if last is None else last.name,
        **{name: getattr(found, name) for name in (
            "price_usd", "price_source", "energy_kwh", "energy_source",
            "region", "pue", "co2e_kg", "co2e_source")})


def footprint(
    counters: dict[str, Any],
    hardware: dict[str, hardware_lib.Hardware | None],
    cost: config_lib.CostConfig, why: str | None) -> footprint_lib.Footprint:
  """Of all parts, each by its own devices, measured or not.

  Args:
    hardware: by kind of device. What `cost` says of it holds for that of the
      last part, what it says of the place for all.
    why: nothing was measured, if it is known.
  """
  occupied = counters["occupied_device_seconds"]
  rest = {kind: seconds for kind, seconds in
          counters["unmeasured_device_seconds"].items() if seconds > 0}
  measured = "; ".join(counters["measured_sources"])

  def of(kind: str, seconds: float, **others: Any) -> footprint_lib.Footprint:
    return footprint_lib.footprint(
        seconds, hardware[kind], _of_kind(kind, counters["device_kind"], cost),
        **others)

  if len(occupied) == 1 and not (measured and rest):
    (kind, seconds), = occupied.items()
    return of(kind, seconds,
              measured_kwh=counters["measured_kwh"] if measured else None,
              measured_source=measured or why)
  parts = {kind: of(kind, seconds) for kind, seconds in occupied.items()}
  estimates = {kind: of(kind, seconds) for kind, seconds in rest.items()}
  kwh = footprint_lib.total([
      counters["measured_kwh"], *(part.energy_kwh for part in estimates.values())])
  said = ([f"{counters['measured_kwh']:.4g} kWh {measured}"]
          if measured else [])
  said += [f"{part.device_hours:.4g} device-hours on {kind} "
           f"{part.energy_source}" for kind, part in estimates.items()]
  source = "; ".join(["unknown: the parts are not all known"
                      ] * (kwh is None) + said)
  whole = footprint_lib.footprint(
      sum(occupied.values()), None, cost, measured_kwh=kwh,
      measured_source=source)
  return dataclasses.replace(
      whole, energy_source=source,
      price_usd=footprint_lib.total(part.price_usd for part in parts.values()),
      price_source="; ".join(f"{kind}: {part.price_source}"
                             for kind, part in parts.items()))


# --- Over interruptions ------------------------------------------------------


def resumed(saved: dict[str, Any] | None, noted: dict[str, Any] | None,
            step: int | None) -> dict[str, Any]:
  """What all parts so far have spent, with what is lost of it.

  Args:
    saved: the counters of the checkpoint of `step`; None: there is none.
    noted: as the part before left it, see `_noted`; None: nothing.
  """
  base = saved or NOTHING
  if noted is None:
    return base
  last = noted["counters"]
  latest = max(base, last, key=clock_lib.wall_seconds)
  # That part has got no further than its begin, or has come to a good end.
  base = latest if noted["step"] == step else base
  reached = _advanced(latest, last, noted["row"])
  lost = clock_lib.wall_seconds(reached) - clock_lib.wall_seconds(base)
  return reached | {name: base[name] for name in (
      "phase_seconds", "undone_seconds", "device_seconds", "clock_tokens")} | {
          "others_seconds": base.get("others_seconds", 0.0),
          "lost_seconds": base["lost_seconds"] + lost}


def _advanced(counters: dict[str, Any], part: dict[str, Any],
              row: dict[str, Any]) -> dict[str, Any]:
  """Counters as they were at a part's last row."""
  extra = row["device_seconds"] - sum(
      counters["occupied_device_seconds"].values())
  if extra <= 0:
    return counters
  found, kind = copy.deepcopy(counters), part["device_kind"]
  found["lost_seconds"] += extra / part["devices"]
  before, after = counters["energy_kwh"], row["energy_kwh"]
  known = part["measuring"] and None not in (before, after)
  if known:
    found["measured_kwh"] += max(0.0, after - before)
  for name in ("occupied_device_seconds",
               *(() if known else ("unmeasured_device_seconds",))):
    found[name][kind] = found[name].get(kind, 0.0) + extra
  return found


def _noted(path: pathlib.Path) -> dict[str, Any] | None:
  """What `Spent.note` wrote, and as `row` how far its part then came.

  Raises:
    RecordError: a file is damaged.
  """
  try:
    noted = json.loads(path.read_bytes())
    if set(NOTHING) - set(noted["counters"]) or "step" not in noted:
      raise ValueError("it lacks numbers")
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError) as error:
    raise records.RecordError(
        f"{path} is damaged ({error}); delete it, and what was spent after "
        "the newest checkpoint is forgotten") from error
  metrics = path.with_name("metrics.jsonl")
  rows = records.read_metrics(metrics) if metrics.exists() else []
  last = max((row for row in rows if row.get("device_seconds")),
             key=lambda row: row["device_seconds"], default={})
  return noted | dict(row=dict(
      device_seconds=last.get("device_seconds", 0.0),
      energy_kwh=last.get("energy_kwh")))


# --- Details -----------------------------------------------------------------


def _of_kind(kind: str, last: str,
             cost: config_lib.CostConfig) -> config_lib.CostConfig:
  """What a config says of a kind of device: what it says of hardware is of
  the last part's, what it says of the place is of all."""
  if kind == last:
    return cost
  return dataclasses.replace(cost, hardware=None, tdp_watts=None,
                             price_usd_per_chip_hour=None)


def _over_processes(kwh: float | None) -> float | None:
  """The sum over processes; None where one measures nothing, or where those
  of one host share its cores, whose energy each would count."""
  if jax.process_count() == 1:
    return kwh
  own = np.array([
      np.nan if kwh is None else kwh, os.cpu_count() or 1,
      tuning.available_cores(), zlib.crc32(socket.gethostname().encode())])
  cluster.barrier()  # a collective would not wait for the slowest to restore
  # As words: JAX would make them singles.
  words = multihost_utils.process_allgather(own.view(np.uint32))
  amounts, cores, usable, hosts = np.ascontiguousarray(words).view(
      np.float64).reshape(-1, own.size).T
  shared = any(usable[hosts == host].sum() > cores[hosts == host].max()
               for host in hosts)
  return None if shared or np.isnan(amounts).any() else float(amounts.sum())


def _product(left: float, right: float | None) -> float | None:
  return None if right is None else left * right
