# SPDX-License-Identifier: Apache-2.0
"""What to change where a step does not fit, by the estimate of its memory.

Nothing is compiled, so that the machine may be any. Where there is a compiler
for it, `tfjax.train.remedies` has its word.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

from tfjax import config as config_lib
from tfjax.cost import estimates
from tfjax.cost import flops as flops_lib
from tfjax.cost import hardware as hardware_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import memory as memory_lib
from tfjax.train import remedies


@dataclasses.dataclass(frozen=True)
class Way:
  """What would fit by its estimate, and what it costs.

  Attributes:
    changes: values of config keys, over what was asked for.
    num_devices, hardware: None: as they were.
    memory_bytes, available_bytes: of a device.
    extra_flops: share of FLOPs that are computed besides, by recomputation.
    devices_ratio: devices over those that were asked for.
    price_ratio: of the same FLOPs at the same MFU; None: not known.
  """

  changes: dict[str, Any]
  num_devices: int | None
  hardware: str | None
  memory_bytes: int
  available_bytes: int
  extra_flops: float
  devices_ratio: float = 1.0
  price_ratio: float | None = 1.0


# For the order alone: what a way is taken to slow a step down by, besides what
# it computes again. Cutting by tensor talks in every layer, fsdp once a step
# and layer, parts and scanned layers only make products smaller.
_SLOWER = {"mesh.tensor": 0.05, "mesh.fsdp": 0.02,
           "train.accumulation_steps": 0.01, "model.scan_layers": 0.01}


# Of a device's memory, what a way may take: the estimate errs by a tenth.
_SAFE = 0.9


def find(config: config_lib.ExperimentConfig, machine: estimates.Machine,
         most: int = 3) -> list[Way]:
  """The cheapest changes after which a step fits, by the memory's estimate
  and with a tenth to spare.

  At most all but one are for the same machine, the cheapest first; then a
  smaller batch, which changes the result, and other machines, by price.

  Args:
    config: with its vocabulary; the memory of the machine's devices is known.
  """
  same = _same_machine(config, machine)
  others = [way for way in (_smaller_batch(config, machine),) if way]
  others += sorted(_other_machines(config, machine), key=lambda way: (
      way.price_ratio or float("inf"), way.devices_ratio))
  return [*same[:max(most - 1, most - len(others))], *others][:most]


def _same_machine(config: config_lib.ExperimentConfig,
                  machine: estimates.Machine) -> list[Way]:
  """Ways that keep machine and result, none of which contains another."""
  found = []
  for mesh in _meshes(config, machine.num_devices):
    for remat in remedies.REMAT[remedies.REMAT.index(config.model.remat):]:
      for scan in {config.model.scan_layers, True}:
        wanted = {**mesh, "model.remat": remat, "model.scan_layers": scan}
        for parts in _parts(config.train):
          way = _way(config, machine, {
              **wanted, "train.accumulation_steps": parts})
          if way:
            found.append(way)
            break
  found.sort(key=lambda way: way.extra_flops + sum(
      _SLOWER.get(key, 0) * _doublings(value) for key, value in
      way.changes.items()))
  return [way for number, way in enumerate(found)
          if not any(one.changes.items() <= way.changes.items()
                     for one in found[:number])]


def _meshes(config: config_lib.ExperimentConfig,
            devices: int) -> Iterator[dict[str, Any]]:
  """The mesh as it is, then parameters cut over as many devices as their
  width divides into, then layers too."""
  yield {}
  cut = devices // config.mesh.sequence
  for tensor in (1, 2, 4, 8, 16):
    if cut % tensor == 0 and tensor >= config.mesh.tensor:
      fsdp = math.gcd(cut // tensor, config.model.d_model)
      yield {"mesh.data": cut // tensor // fsdp, "mesh.fsdp": fsdp,
             "mesh.tensor": tensor}


def _parts(train: config_lib.TrainConfig) -> list[int]:
  return [parts for parts in
          range(train.accumulation_steps, train.batch_size + 1)
          if train.batch_size % parts == 0]


def _way(config: config_lib.ExperimentConfig, machine: estimates.Machine,
         wanted: dict[str, Any], **others: Any) -> Way | None:
  """The changes as a way, if they are valid and fit."""
  candidate = remedies.changed(config, wanted)
  try:
    mesh = estimates.mesh_shape(candidate, machine.num_devices)
    needed = memory_lib.estimate(candidate, mesh, machine.backend).total
  except config_lib.ConfigError:  # it does not divide over the mesh
    return None
  if needed > _SAFE * machine.available_bytes:
    return None
  kept = {key: value for key, value in wanted.items()
          if value != _value(config, key)}
  return Way(
      changes=kept, num_devices=others.pop("num_devices", None),
      hardware=others.pop("hardware", None), memory_bytes=needed,
      available_bytes=machine.available_bytes,
      extra_flops=_recomputed(candidate) - _recomputed(config), **others)


def _smaller_batch(config: config_lib.ExperimentConfig,
                   machine: estimates.Machine) -> Way | None:
  mesh = estimates.mesh_shape(config, machine.num_devices)
  size = memory_lib.largest_batch(
      config, mesh, int(_SAFE * machine.available_bytes), machine.backend)
  if size is None or size >= config.train.batch_size:
    return None
  return _way(config, machine, {"train.batch_size": size})


def _other_machines(config: config_lib.ExperimentConfig,
                    machine: estimates.Machine) -> Iterator[Way]:
  """More devices, and as many with more memory; this machine is as it is."""
  if not machine.is_assumed:
    return
  for factor in (2, 4, 8, 16, 32, 64):
    count = machine.num_devices * factor
    more = dataclasses.replace(machine, num_devices=count)
    way = next(filter(None, (
        _way(config, more, mesh, num_devices=count, devices_ratio=factor)
        for mesh in _meshes(config, count))), None)
    if way:
      yield way
      break
  for name in hardware_lib.entries(config.cost.hardware_file):
    larger = estimates.machine_of(
        remedies.changed(config, {"cost.hardware": name}), machine.num_devices)
    if (larger.available_bytes or 0) > machine.available_bytes:
      way = next(filter(None, (
          _way(config, larger, mesh, hardware=name,
               price_ratio=_price_ratio(config, machine, larger))
          for mesh in _meshes(config, machine.num_devices))), None)
      if way:
        yield way


def _price_ratio(config: config_lib.ExperimentConfig,
                 machine: estimates.Machine,
                 other: estimates.Machine) -> float | None:
  """Of the same FLOPs at the same MFU, by list prices."""
  def price(hardware: hardware_lib.Hardware) -> float | None:
    peak = hardware.peak_of(config.train.dtype)
    return (hardware.price_usd_per_hour / peak
            if peak and hardware.price_usd_per_hour else None)
  before, after = price(machine.hardware), price(other.hardware)
  return after / before if before and after else None


def _recomputed(config: config_lib.ExperimentConfig) -> float:
  flops = flops_lib.training_flops_per_token(
      config.model, lengths_lib.of(config))
  return flops.recompute / flops.total


def _doublings(value: Any) -> float:
  return math.log2(value) if isinstance(value, int) and value > 1 else 1.0


def _value(config: config_lib.ExperimentConfig, key: str) -> Any:
  group, name = key.split(".")
  return getattr(getattr(config, group), name)
