# SPDX-License-Identifier: Apache-2.0
"""What a whole sweep will cost, run by run and in total, before it runs.

Also the file that keeps it in the sweep's directory, so that a report can set
what was spent beside what was predicted. One run's cost is worked out in
`tfjax.cost.estimates`, real steps are timed in `tfjax.sweep.calibrate`.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Collection, Sequence

import jax

from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib
from tfjax.cost import estimates
from tfjax.cost import footprint as footprint_lib
from tfjax.cost import hardware as hardware_lib
from tfjax.sweep import branch
from tfjax.sweep import calibrate
from tfjax.sweep import pace as pace_lib
from tfjax.sweep.specs import RunSpec
from tfjax.train import out_of_memory
from tfjax.train import records
from tfjax.train import sharding
from tfjax.train import tuning

FILE = "cost.json"
_AMOUNTS = ("price_usd", "energy_kwh", "co2e_kg")


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Every run of a sweep with its estimate, in the plan's order.

  A run that branches off another one's trunk (`tfjax.sweep.branch`) has the
  estimate of its own part, so that sums count nothing twice; its spec has the
  budget of its whole way.

  Attributes:
    workers: runs that go on at the same time.
    seconds: from the launch to the end of the last run; None: not known.
    basis: how hours were obtained.
  """

  specs: tuple[RunSpec, ...]
  estimates: tuple[estimates.Estimate, ...]
  workers: int
  seconds: float | None
  basis: str

  @property
  def fits(self) -> bool | None:
    """Whether every run does; None: that is not known of some."""
    found = {one.fits for one in self.estimates}
    return False if False in found else None if None in found else True

  @property
  def flops_whole(self) -> float:
    """Of all runs, each as if it were alone."""
    return sum(spec.budget.flops_total for spec in self.specs)

  def total(self) -> dict[str, Any]:
    """Sums over the runs; None: not known of some."""
    return dict(
        runs=len(self.specs),
        tokens=sum(one.budget.tokens for one in self.estimates),
        flops=sum(one.budget.flops_total for one in self.estimates),
        hours=None if self.seconds is None else self.seconds / 3600,
        device_seconds=footprint_lib.total(
            one.device_seconds for one in self.estimates),
        **{name: footprint_lib.total(
            _amount(one, name) for one in self.estimates)
           for name in _AMOUNTS})

  def to_dict(self) -> dict[str, Any]:
    """All of it, ready for JSON."""
    return dict(
        created=records.now(), basis=self.basis,
        hardware=self.estimates[0].hardware, workers=self.workers,
        total=self.total(),
        runs=[_row(spec, one)
              for spec, one in zip(self.specs, self.estimates)])

  def write(self, workdir: str | os.PathLike[str]) -> None:
    """Keeps it in the sweep's directory, whole or not at all."""
    directory = pathlib.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    records.write_json(directory / FILE, self.to_dict())


def assumed(specs: Sequence[RunSpec], num_devices: int | None,
            mfu: float | None, workers: int | None,
            alone: Collection[str] = ()) -> Forecast:
  """On the machine that config.cost.hardware names: hours from an MFU.

  Args:
    num_devices: of each run.
    workers: machines of so many devices, which share the runs; unset: one.
    alone: as for `branch.own_parts`.

  Raises:
    ConfigError: as `tfjax.cost.estimate` does.
  """
  found = tuple(estimates.estimate(
      own.config, num_devices=num_devices, mfu=mfu, budget=own.budget)
                for own in branch.own_parts(specs, alone))
  workers = min(workers or 1, len(specs))
  seconds = [one.seconds for one in found]
  return Forecast(tuple(specs), found, workers, makespan(seconds, workers),
                  found[0].seconds_source)


def here(specs: Sequence[RunSpec], workers: int | None,
         calibration: calibrate.Calibration | None = None,
         alone: Collection[str] = ()) -> Forecast:
  """On this machine.

  Args:
    workers: as for `tfjax.sweep.launch`.
    calibration: None: hours are not known.
    alone: as for `branch.own_parts`.
  """
  own = branch.own_parts(specs, alone)
  if calibration is None:
    return _here(specs, own, workers, [None] * len(specs), "unknown: not timed")
  seconds, total = calibrate.pack(own, calibration)
  return dataclasses.replace(
      _here(specs, own, workers, seconds, _basis(specs, calibration),
            calibration), seconds=total)


def at_once(specs: Sequence[RunSpec], workers: int | None,
            workdir: str | os.PathLike[str],
            alone: Collection[str] = ()) -> Forecast:
  """What is known without any timing, by the best of what there is.

  Where config.cost.hardware names another machine, as `assumed` has it. On
  this one hours are by the pace of the runs in `workdir`; else as `FILE` there
  has them of every run; else from the measured peak and an assumed MFU.

  Args:
    alone: as for `branch.own_parts`.

  Raises:
    ConfigError: as `tfjax.cost.estimate` does.
    RecordError: a result in `workdir` is damaged.
  """
  if is_elsewhere(specs[0].config.cost):
    return assumed(specs, None, None, workers, alone)
  own = branch.own_parts(specs, alone)
  if known := pace_lib.of(workdir):
    return _here(specs, own, workers, [known.seconds(one) for one in own],
                 known.basis)
  kept = read(workdir)
  if kept and all(kept.get(spec.run_id) is not None for spec in specs):
    # Kept as planned; of what is alone after all there is as much more.
    return _here(specs, own, workers, [
        kept[one.run_id] * one.budget.flops_total / planned.budget.flops_total
        for one, planned in zip(own, branch.own_parts(specs))],
                 f"as scripts/plan.py has them in {FILE}")
  return _here(specs, own, workers, [None] * len(specs), "", assume=True)


def is_elsewhere(cost: config_lib.CostConfig) -> bool:
  """Whether the config's hardware is another machine than this one."""
  if cost.hardware is None or tuning.has_accelerator():
    return False
  # What the config says of a CPU is said of this one.
  kinds = hardware_lib.find(cost.hardware, cost.hardware_file).device_kinds
  return bool(kinds) and "cpu" not in kinds


def read(workdir: str | os.PathLike[str]) -> dict[str, float | None]:
  """Seconds by run id that `Forecast.write` has kept; empty: it has not."""
  try:
    kept = json.loads((pathlib.Path(workdir) / FILE).read_text("utf-8"))
    return {row["run_id"]: row["seconds"] for row in kept["runs"]}
  except (OSError, ValueError, KeyError, TypeError):
    return {}  # A forecast that cannot be read is none.


def makespan(seconds: Sequence[float | None], workers: int) -> float | None:
  """When the last of some runs ends, the longest of them first."""
  if None in seconds:
    return None
  free = [0.0] * workers
  for one in sorted(seconds, reverse=True):
    free[free.index(min(free))] += one
  return max(free)


def cpu_devices(config: config_lib.ExperimentConfig, workers: int) -> int:
  """Devices that JAX shows a worker of this machine without accelerators."""
  environment = tuning.process_environment(
      config.runtime, cores=_worker_cores(workers), mesh=config.mesh)
  return int(environment.get("JAX_NUM_CPU_DEVICES", 1))


def _worker_cores(workers: int) -> int:
  return max(1, len(cores_lib.usable()) // workers)


# --- Details -----------------------------------------------------------------


def _here(specs: Sequence[RunSpec], own: Sequence[RunSpec],
          workers: int | None, seconds: Sequence[float | None], basis: str,
          calibration: calibrate.Calibration | None = None,
          assume: bool = False) -> Forecast:
  """Of these seconds; with `assume`, of those that an MFU gives."""
  count = calibrate.num_workers(specs, workers)
  found = []
  for spec, one in zip(own, seconds):
    machine, config = _machine_here(spec.config, count, calibration)
    found.append(estimates.estimate(
        config, seconds=one, seconds_source=basis, budget=spec.budget,
        machine=dataclasses.replace(machine, is_assumed=assume)))
  seconds = [one.seconds for one in found]
  return Forecast(tuple(specs), tuple(found), count, makespan(seconds, count),
                  found[0].seconds_source if assume else basis)


def _machine_here(
    config: config_lib.ExperimentConfig, workers: int,
    calibration: calibrate.Calibration | None,
) -> tuple[estimates.Machine, config_lib.ExperimentConfig]:
  """What a worker of this machine has, and the config over all of it."""
  timed = calibration and calibration.timed.get(
      calibrate.speed_key(config), next(iter(calibration.timed.values())))
  if timed:
    kind, mesh, available = (timed.device_kind, timed.mesh,
                             timed.available_bytes)
    source = "as JAX says"
  elif tuning.has_accelerator():
    kind, mesh, available = None, None, None
    source = "unknown: accelerators are asked when steps are timed"
  else:
    kind, available = "cpu", None
    mesh = dict(sharding.make_mesh(
        config, jax.devices()[:cpu_devices(config, workers)]).shape)
  count = math.prod(mesh.values()) if mesh else 1
  if mesh:
    config = dataclasses.replace(config, mesh=config_lib.MeshConfig(**mesh))
  if kind == "cpu" and available is None:
    total = out_of_memory.host_bytes()
    available = None if total is None else total // workers // count
    source = f"this machine's, shared by {workers * count} device(s)"
  # A worker's share of the cores, whatever this process shows of them.
  hardware = hardware_lib.resolve(
      config.cost, kind or "",
      _worker_cores(workers) / cpu_devices(config, workers))
  return estimates.Machine(hardware, kind, count, available, source,
                           is_assumed=False), config


def _basis(specs: Sequence[RunSpec],
           calibration: calibrate.Calibration) -> str:
  keys = {calibrate.speed_key(spec.config) for spec in specs}
  text = (f"measured: {len(calibration.timed)} of {len(keys)} models timed "
          f"here for {calibration.took_seconds:.0f} s, {calibration.workers} "
          f"worker{'s' * (calibration.workers > 1)} at work")
  if len(calibration.timed) < len(keys):
    text += "; the others scaled by their FLOPs from the nearest"
  return text


def _amount(one: estimates.Estimate, name: str) -> float | None:
  return one.footprint and getattr(one.footprint, name)


def _row(spec: RunSpec, one: estimates.Estimate) -> dict[str, Any]:
  """A run as the file has it: tokens and steps of its whole way, FLOPs and
  what follows of its own part; `shared_flops` are those of its trunk."""
  return dict(
      run_id=spec.run_id, overrides=dict(spec.overrides),
      params_total=spec.budget.params_total, tokens=spec.budget.tokens,
      steps=spec.budget.steps, flops=one.budget.flops_total,
      shared_flops=spec.budget.flops_total - one.budget.flops_total,
      seconds=one.seconds, device_seconds=one.device_seconds,
      **{name: _amount(one, name) for name in _AMOUNTS},
      estimate=one.to_dict())
