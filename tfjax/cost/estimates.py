# SPDX-License-Identifier: Apache-2.0
"""What one run will cost, before there is one: parameters, tokens, FLOPs,
memory, time, price, energy and CO2e, each with how it was obtained.

Nothing is run or compiled, and no data is read. Seconds are those that the
caller measured, or follow from an assumed MFU. Timing of real steps, and
sweeps, are in `tfjax.sweep`.
"""

import dataclasses
import math
from typing import Any

from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import footprint as footprint_lib
from tfjax.cost import hardware as hardware_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import memory as memory_lib
from tfjax.data import vocabulary

# Of published runs of dense models most lie between 0.3 and 0.5.
DEFAULT_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Machine:
  """What runs are meant for: devices of one kind.

  Attributes:
    hardware: None: in no table.
    device_kind: as JAX has it; None where the table does not say.
    num_devices: that a run has.
    available_bytes: of a device; None: not known.
    is_assumed: whether it is not the machine that is planned on, so that a
      time can only be worked out.
  """

  hardware: hardware_lib.Hardware | None
  device_kind: str | None
  num_devices: int
  available_bytes: int | None
  available_source: str
  is_assumed: bool

  @property
  def backend(self) -> str:
    """tpu, gpu or cpu: whose layout and implementations are meant."""
    kind = self.device_kind or ""
    return ("tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu"
            else "gpu")


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A run before it runs. Unknown is None, and its source says why.

  FLOPs are of the whole run; those by component are of training (forward and
  backward), in the default convention. What rematerialisation computes again
  is in `flops_recompute` alone. Devices are what JAX calls so.

  Attributes:
    mesh: devices along each axis.
    memory_bytes: of a device, by kind, and `total`.
    fits: whether that is there; None: not known.
    mfu: assumed, or of the seconds that were given; None where the peak is
      unknown.
    peak_flops_per_second: of a device.
    seconds: of the whole run.
    device_seconds: those times the devices.
  """

  name: str
  family: str
  budget: budget_lib.Budget
  flops_convention: str
  flops_by_component: dict[str, float]
  flops_by_convention: dict[str, float]
  flops_recompute: float
  machine: Machine
  mesh: dict[str, int]
  memory_bytes: dict[str, int]
  fits: bool | None
  peak_flops_per_second: float | None
  peak_source: str
  mfu: float | None
  seconds: float | None
  seconds_source: str
  device_seconds: float | None
  footprint: footprint_lib.Footprint | None

  @property
  def hardware(self) -> str | None:
    """Its name in the table."""
    return self.machine.hardware and self.machine.hardware.name

  def to_dict(self) -> dict[str, Any]:
    """All of it, ready for JSON."""
    machine = dataclasses.asdict(self.machine) | dict(hardware=self.hardware)
    budget = dataclasses.asdict(self.budget) | dict(
        flops_total=self.budget.flops_total)
    return dataclasses.asdict(self) | dict(machine=machine, budget=budget)


def estimate(
    config: config_lib.ExperimentConfig,
    hardware: str | None = None,
    num_devices: int | None = None,
    *,
    mfu: float | None = None,
    seconds: float | None = None,
    seconds_source: str = "given",
    budget: budget_lib.Budget | None = None,
    machine: Machine | None = None,
) -> Estimate:
  """What a run of `config` costs on some hardware.

  Hours are FLOPs / (peak FLOP/s x MFU x devices) unless `seconds` is given.
  Price, energy and CO2e follow from config.cost (`tfjax.cost.footprint`).

  Args:
    hardware: name in tfjax/cost/hardware.toml; unset: config.cost.hardware.
    num_devices: of a run; unset: runtime.num_devices, else those of the mesh.
    mfu: model FLOPs over peak FLOPs, above 0 and at most 1; unset:
      DEFAULT_MFU, and said to be assumed.
    seconds: of the whole run, where somebody has measured or knows them.
    seconds_source: how.
    budget: of the run; unset: as far as it is known without the data.
    machine: in place of hardware and num_devices.

  Raises:
    ConfigError: the hardware or region is unknown, or the mesh does not suit
      the devices, batch or sequences.
    ValueError: num_devices, mfu or seconds cannot be.
  """
  _check(num_devices, mfu, seconds)
  config = with_vocabulary(config)
  if hardware is not None:
    config = _with_cost(config, hardware=hardware)
  footprint_lib.check(config.cost)
  machine = machine or machine_of(config, num_devices)
  budget = budget or budget_lib.plan(config, None)
  mesh = mesh_shape(config, machine.num_devices)
  memory = memory_lib.estimate(config, mesh, machine.backend)
  peak = _peak(config, machine)
  if seconds is not None:
    mfu = _achieved(budget, peak, machine, seconds)
  else:
    seconds, seconds_source, mfu = _assumed(budget, peak, machine, mfu)
  device_seconds = None if seconds is None else seconds * machine.num_devices
  available = machine.available_bytes
  return Estimate(
      name=config.name, family=config.model.family, budget=budget,
      flops_convention=flops_lib.CONVENTION, **_flops(config, budget),
      machine=machine, mesh=mesh,
      memory_bytes=dataclasses.asdict(memory) | dict(total=memory.total),
      fits=None if available is None else memory.total <= available,
      peak_flops_per_second=peak.flops_per_second,
      peak_source=peak.source or "unknown: no table has one",
      mfu=mfu, seconds=seconds, seconds_source=seconds_source,
      device_seconds=device_seconds,
      footprint=None if device_seconds is None else footprint_lib.footprint(
          device_seconds, machine.hardware, config.cost))


def with_vocabulary(
    config: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
  """The config with the embedding's rows set, from the tokenizer's settings
  where model.vocab_size is not."""
  if config.model.vocab_size is not None:
    return config
  return budget_lib.with_vocabulary(config, vocabulary.size(config))


def machine_of(config: config_lib.ExperimentConfig,
               num_devices: int | None = None) -> Machine:
  """The machine that config.cost.hardware names, which need not be here.

  Raises:
    ConfigError: no table has it, or none is named ("cost.hardware").
  """
  cost = config.cost
  if cost.hardware is None:
    raise config_lib.ConfigError(
        "cost.hardware", "is not set, so that nothing is known of the machine; "
        "name one of tfjax/cost/hardware.toml")
  found = hardware_lib.find(cost.hardware, cost.hardware_file)
  share, source = None, f"unknown: no memory of {found.label} is known"
  if found.memory_bytes and found.devices_per_chip:
    share = found.memory_bytes // found.devices_per_chip
    source = f"{found.label}: {found.sources.get('memory_bytes', 'its table')}"
  return Machine(
      hardware=found, device_kind=next(iter(found.device_kinds), None),
      num_devices=(num_devices or config.runtime.num_devices or
                   config.mesh.num_devices),
      available_bytes=share, available_source=source, is_assumed=True)


def mesh_shape(config: config_lib.ExperimentConfig,
               num_devices: int) -> dict[str, int]:
  """Devices along each axis, mesh.data as many as the others leave.

  The mesh itself is `tfjax.train.sharding`'s.

  Raises:
    ConfigError: the axes do not make up the devices.
  """
  mesh = config.mesh
  others = mesh.fsdp * mesh.sequence * mesh.tensor
  data = mesh.data or num_devices // others
  if data * others != num_devices:
    raise config_lib.ConfigError(
        "mesh", f"data {mesh.data or 'unset'} x fsdp {mesh.fsdp} x sequence "
        f"{mesh.sequence} x tensor {mesh.tensor} does not make up "
        f"{num_devices} devices; leave mesh.data unset, and choose others "
        f"that divide {num_devices}")
  return dict(data=data, fsdp=mesh.fsdp, sequence=mesh.sequence,
              tensor=mesh.tensor)


# --- Details -----------------------------------------------------------------


def _check(num_devices: int | None, mfu: float | None,
           seconds: float | None) -> None:
  if num_devices is not None and num_devices < 1:
    raise ValueError(f"num_devices: {num_devices} is not at least 1")
  if mfu is not None and not 0 < mfu <= 1:
    raise ValueError(f"mfu: {mfu} is not above 0 and at most 1")
  if seconds is not None and not 0 <= seconds < math.inf:
    raise ValueError(f"seconds: {seconds} is not a finite time")


def _with_cost(config: config_lib.ExperimentConfig,
               **changes: Any) -> config_lib.ExperimentConfig:
  return dataclasses.replace(
      config, cost=dataclasses.replace(config.cost, **changes))


def _flops(config: config_lib.ExperimentConfig,
           budget: budget_lib.Budget) -> dict[str, Any]:
  """FLOPs of the run in their parts."""
  lengths = lengths_lib.of(config)
  per_token = flops_lib.training_flops_per_token(config.model, lengths)
  # Of pairs more tokens are computed than are read.
  tokens = budget.flops_total / per_token.total
  return dict(
      flops_by_component={
          one.name: tokens * (one.forward + one.backward)
          for one in flops_lib.components(config.model, lengths)},
      flops_by_convention={
          name: tokens * value for name, value in
          flops_lib.by_convention(config.model, lengths).items()},
      flops_recompute=budget.flops.recompute)


def _peak(config: config_lib.ExperimentConfig,
          machine: Machine) -> hardware_lib.Peak:
  kind = machine.device_kind or (machine.hardware and machine.hardware.name)
  if kind is None:
    return hardware_lib.Peak(None, None)
  return hardware_lib.peak(kind, config.train.dtype, config.cost)


def _achieved(budget: budget_lib.Budget, peak: hardware_lib.Peak,
              machine: Machine, seconds: float) -> float | None:
  """The MFU of a whole run, all that is not a step included."""
  if peak.flops_per_second is None or not seconds:
    return None
  return budget.flops_total / (
      seconds * peak.flops_per_second * machine.num_devices)


def _assumed(budget: budget_lib.Budget, peak: hardware_lib.Peak,
             machine: Machine, mfu: float | None
             ) -> tuple[float | None, str, float | None]:
  """Seconds from an MFU, how, and that MFU; or why there are none."""
  if not machine.is_assumed and mfu is None:
    return None, "unknown: not timed", None
  if peak.flops_per_second is None:
    return None, "unknown: the peak FLOP/s is", None
  word = "given" if mfu else "assumed"
  mfu = mfu or DEFAULT_MFU
  rate = peak.flops_per_second * mfu * machine.num_devices
  return (budget.flops_total / rate,
          f"FLOPs / (peak x MFU {mfu:g}, {word}, x devices); start, "
          "compilation, evaluation and checkpoints are not in it", mfu)
