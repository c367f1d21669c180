# SPDX-License-Identifier: Apache-2.0
"""What machines can do and what they take: peak rates, memory, links, power,
price; and which entry of the table a device of JAX's belongs to.

The figures are in hardware.toml, each with its source; a file of the user's
own adds entries or replaces figures. What nobody states is None, never a
guess. Where the table has no peak, `peak` gives what `scripts/bench.py --peak`
measured on this host (`tfjax.cost.peaks`).
"""

from collections.abc import Mapping
import dataclasses
import datetime
import difflib
import functools
import math
import os
import pathlib
import tomllib
from typing import Any

from tfjax import config as config_lib
from tfjax.cost import peaks

_TABLE = pathlib.Path(__file__).with_name("hardware.toml")
DTYPES = ("bfloat16", "float16", "float32", "tensorfloat32", "int8", "float8")


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Figures of one chip, as it is sold; None: not known.

  Attributes:
    label: its full name.
    aliases: other names that `find` takes.
    device_kinds: `jax.Device.device_kind` of it.
    devices_per_chip: as how many devices JAX shows it. None: that depends on
      the machine, as on CPUs.
    float32_computed_as: the type that JAX multiplies float32 matrices in at
      its default precision (jax.lax.Precision).
    peak_flops_per_second: by DTYPES, dense matrix products without sparsity.
    memory_bytes: what the runtime reserves included.
    link_bandwidth_bytes_per_second: that it sends over all its links to other
      chips of the slice or node together; vendors state twice that, the sum
      of both directions.
    tdp_watts: thermal design power, or board power where that is stated.
    price_usd_per_hour: list price, on demand; ISO `price_date`: its date.
    sources: where a figure is from, by its field's name.
  """

  name: str
  label: str
  aliases: tuple[str, ...] = ()
  device_kinds: tuple[str, ...] = ()
  devices_per_chip: float | None = None
  float32_computed_as: str = "float32"
  peak_flops_per_second: Mapping[str, float] = dataclasses.field(
      default_factory=dict)
  memory_bytes: int | None = None
  memory_bandwidth_bytes_per_second: float | None = None
  link_bandwidth_bytes_per_second: float | None = None
  tdp_watts: float | None = None
  price_usd_per_hour: float | None = None
  price_date: str | None = None
  sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def peak_of(self, dtype: str) -> float | None:
    """FLOP/s of a chip for products that a config's `dtype` asks for."""
    if dtype == "float32":
      dtype = self.float32_computed_as
    return self.peak_flops_per_second.get(dtype)


@dataclasses.dataclass(frozen=True)
class Device:
  """The same of one device as JAX shows it, in bytes and seconds; None: not
  known."""

  flops: float | None = None
  memory_bytes: int | None = None
  memory_bandwidth: float | None = None
  link_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Peak:
  """Peak FLOP/s of one JAX device, and where that is from; None: not known."""

  flops_per_second: float | None = None
  source: str | None = None


# --- Which hardware ----------------------------------------------------------


def entries(file: str = "") -> dict[str, Hardware]:
  """All hardware by name, that of the user's `file` first.

  Raises:
    ConfigError: the file is wrong ("cost.hardware_file").
  """
  table, own = _table(), _read(pathlib.Path(file)) if file else {}
  aliases = {alias: name for name, values in table.items()
             for alias in values.get("aliases", ())}
  merged = {}
  for name, values in own.items():
    if name in aliases:
      raise _error(file, name, "", f"is another name of {aliases[name]}; write "
                   f"[{aliases[name]}]")
    merged[name] = _over(table.get(name, {}), values)
    if merged[name]["sources"] and "devices_per_chip" not in merged[name]:
      raise _error(file, name, "devices_per_chip", "is missing; say as how "
                   "many devices JAX shows one: a CPU as one a core")
  # The first says in which order, the last which figures.
  everything = {**merged, **table, **merged}
  return {name: _hardware(name, values) for name, values in everything.items()}


def find(name: str, file: str = "") -> Hardware:
  """The entry of that name or alias, in the user's `file` or the table.

  Raises:
    ConfigError: there is none ("cost.hardware"), or the file is wrong
      ("cost.hardware_file").
  """
  by_name = {key.lower(): entry for entry in reversed(entries(file).values())
             for key in (*entry.aliases, entry.name)}
  found = by_name.get(name.strip().lower())
  if found is None:
    close = difflib.get_close_matches(name.lower(), by_name, 3)
    raise config_lib.ConfigError(
        "cost.hardware", f"{name!r} is in no table; " + (
            f"did you mean {' or '.join(close)}? " if close else
            f"there are {', '.join(sorted(by_name))}. ") +
        "Hardware of your own goes into a file, cost.hardware_file")
  return found


def of_device(device_kind: str, file: str = "") -> Hardware | None:
  """The entry of `jax.Device.device_kind`, None where no table has it."""
  return next((entry for entry in entries(file).values()
               if device_kind in entry.device_kinds), None)


def resolve(cost: config_lib.CostConfig, device_kind: str,
            cores_per_device: float | None = None) -> Hardware | None:
  """What a run is on: as its config says, else by what JAX calls the device.

  Of CPUs the chip is this machine, all of its cores together: it is what has
  a price and draws power. Where the config and JAX disagree, the label says so.

  Args:
    cores_per_device: of CPUs; unset: as many as this process has.

  Raises:
    ConfigError: the config names hardware that is in no table.
  """
  found = (of_device(device_kind, cost.hardware_file) if cost.hardware is None
           else find(cost.hardware, cost.hardware_file))
  if contradicted(cost, device_kind):
    return dataclasses.replace(found, label=(
        f"{found.label} (as cost.hardware says of {device_kind!r})"))
  if device_kind != "cpu" or found is None or found.devices_per_chip:
    return found
  cores = cores_per_device or peaks.cores_per_device(device_kind)
  return dataclasses.replace(
      found, devices_per_chip=(os.cpu_count() or 1) / cores)


def contradicted(cost: config_lib.CostConfig,
                 device_kind: str) -> Hardware | None:
  """What the device is by the tables, where the config names other hardware.

  Raises:
    ConfigError: as `resolve`.
  """
  if cost.hardware is None:
    return None
  kinds = find(cost.hardware, cost.hardware_file).device_kinds
  return (None if not kinds or device_kind in kinds else
          of_device(device_kind, cost.hardware_file))


def check(cost: config_lib.CostConfig) -> None:
  """Raises where `resolve` would.

  Raises:
    ConfigError: the config names hardware that is in no table, or a file that
      is wrong.
  """
  if cost.hardware is not None:
    find(cost.hardware, cost.hardware_file)
  elif cost.hardware_file:
    entries(cost.hardware_file)


# --- What one device can do --------------------------------------------------


def peak(device_kind: str, dtype: str,
         cost: config_lib.CostConfig | None = None) -> Peak:
  """Peak FLOP/s of one JAX device: the table's, else what was measured here.

  Args:
    device_kind: `jax.Device.device_kind`.
    dtype: what a config's matrix products are computed in.
    cost: a config's choice of hardware and file; None: the table alone.
  """
  found = (of_device(device_kind) if cost is None
           else resolve(cost, device_kind))
  stated = found.peak_of(dtype) if found else None
  if stated:
    source = f"{found.label}: {found.sources['peak_flops_per_second']}"
    if dtype == "float32" and found.float32_computed_as != dtype:
      source += (f" (float32 products in {found.float32_computed_as}, JAX's "
                 "default precision)")
    return Peak(stated / found.devices_per_chip, source)
  # This host's device says nothing of other hardware that a config names.
  if found and found.device_kinds and device_kind not in found.device_kinds:
    return Peak()
  measured = peaks.find(device_kind)
  if measured is None or dtype not in measured.flops_per_second:
    return Peak()
  return Peak(measured.flops_per_second[dtype], measured.source)


def device(kind: str, dtype: str, devices_per_chip: int | None = None) -> (
    Device):
  """What the table says of one device.

  Args:
    kind: `jax.Device.device_kind`.
    dtype: what the matrix products are computed in.
    devices_per_chip: where it is not what JAX shows on the machine itself, as
      in compile-only topologies.
  """
  chip = of_device(kind)
  share = chip and (devices_per_chip or chip.devices_per_chip)
  if not share:
    return Device()

  def part(amount: float | None) -> float | None:
    return None if amount is None else amount / share

  return Device(
      flops=part(chip.peak_of(dtype)),
      memory_bytes=chip.memory_bytes and chip.memory_bytes // share,
      memory_bandwidth=part(chip.memory_bandwidth_bytes_per_second),
      link_bandwidth=part(chip.link_bandwidth_bytes_per_second))


# --- Reading -----------------------------------------------------------------

# Smallest and largest that is taken for a figure and not for a slip of a unit.
_RANGES = {
    "peak_flops_per_second": (1e9, 1e17),
    "memory_bytes": (1e8, 1e14),
    "memory_bandwidth_bytes_per_second": (1e9, 1e15),
    "link_bandwidth_bytes_per_second": (1e8, 1e14),
    "tdp_watts": (1, 1e5),
    "price_usd_per_hour": (0, 1e4),
}
_FIELDS = {entry.name for entry in dataclasses.fields(Hardware)} - {"name"}


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
  return _read(_TABLE)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
  """An entry of the table with the user's figures in place of its own."""
  both = {key: base.get(key, {}) | own.get(key, {})
          for key in ("peak_flops_per_second", "sources")}
  return {**base, **own, **both}


def _hardware(name: str, values: dict[str, Any]) -> Hardware:
  texts = {key: tuple(values[key]) for key in ("aliases", "device_kinds")
           if key in values}
  if "price_date" in values:
    texts["price_date"] = values["price_date"].isoformat()
  return Hardware(**{"name": name, "label": name, **values, **texts})


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """A file's entries, every field checked."""
  try:
    text = path.read_text(encoding="utf-8")
    entries = tomllib.loads(text)
  except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
    raise config_lib.ConfigError(
        "cost.hardware_file", f"{path} cannot be read: {error}") from error
  names: dict[str, str] = {}
  for name, values in entries.items():
    if not isinstance(values, dict):
      raise _error(path, name, "", "is not a table; write [NAME] above its "
                   "fields")
    _check(path, name, values)
    sources = values.get("sources", {})
    sheet = sources.pop("sheet", f"your file {path}")
    values["sources"] = {key: sources.get(key, sheet)
                         for key in _RANGES if key in values}
    for other in (name, *values.get("aliases", ()),
                  *values.get("device_kinds", ())):
      if names.setdefault(other, name) != name:
        raise _error(path, name, "", f"{other!r} is a name or device kind of "
                     f"{names[other]} too")
  return entries


def _check(path: pathlib.Path, name: str, values: dict[str, Any]) -> None:
  """Raises a ConfigError for a field that is unknown or cannot be."""
  for key, value in values.items():
    if key not in _FIELDS:
      close = difflib.get_close_matches(key, _FIELDS, 1)
      raise _error(path, name, key, "is not a field" + (
          f"; did you mean {close[0]}?" if close else
          f"; there are {', '.join(sorted(_FIELDS))}"))
    problem = _problem(key, value)
    if problem:
      raise _error(path, name, key, problem)
  if "price_usd_per_hour" in values and "price_date" not in values:
    raise _error(path, name, "price_date", "is missing; a price needs its "
                 "date, as 2025-01-31")


def _problem(key: str, value: Any) -> str | None:
  """What is wrong with a field's value."""
  if key == "label":
    return None if isinstance(value, str) and value else "is not a text"
  if key == "float32_computed_as":
    return (None if value in DTYPES else
            f"{value!r} is not one of {', '.join(DTYPES)}")
  if key in ("aliases", "device_kinds"):
    good = isinstance(value, list) and all(
        isinstance(x, str) and x for x in value)
    return None if good else "is not a list of texts"
  if key == "devices_per_chip":
    good = type(value) is int and 0 < value <= 1024
    return None if good else f"{value!r} is not a number of devices"
  if key == "price_date":
    good = type(value) is datetime.date
    return None if good else (
        f"{value!r} is not a date; write it without quotes, as 2025-01-31")
  if key == "sources":
    good = isinstance(value, dict) and all(
        name in ("sheet", *_RANGES) and isinstance(text, str) and text
        for name, text in value.items())
    return None if good else "is not a table of texts by figure: " + ", ".join(
        ("sheet", *_RANGES))
  if key != "peak_flops_per_second":
    return _out_of_range(key, value)
  if not isinstance(value, dict):
    return "is not a table of FLOP/s by dtype"
  for dtype, flops in value.items():
    if dtype not in DTYPES:
      return f"{dtype!r} is not one of {', '.join(DTYPES)}"
    if problem := _out_of_range(key, flops):
      return f"{dtype} {problem}"
  return None


def _out_of_range(key: str, value: Any) -> str | None:
  least, most = _RANGES[key]
  if type(value) not in (int, float):  # bool is an int, and no figure
    return f"{value!r} is not a number"
  if not (math.isfinite(value) and least <= value <= most):
    return (f"{value!r} cannot be; it is in {key.rpartition('_per_')[0] or key}"
            f", and from {least:g} to {most:g}")
  return None


def _error(file: pathlib.Path | str, name: str, field: str,
           problem: str) -> config_lib.ConfigError:
  where = f"{field} " if field else ""
  return config_lib.ConfigError("cost.hardware_file",
                                f"{file}: [{name}] {where}{problem}")
