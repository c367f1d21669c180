# SPDX-License-Identifier: Apache-2.0
"""Money, energy and carbon of the time that machines were occupied.

Three products, and where their factors come from. What a piece of hardware
draws and costs is in `tfjax.cost.hardware`, what a grid emits in
`tfjax.cost.regions`; `tfjax.cost.energy` measures.
"""

from collections.abc import Iterable
import dataclasses
import math

from tfjax import config as config_lib
from tfjax.cost import hardware as hardware_lib
from tfjax.cost import regions

# Above any chip: milliwatts, or the price of a cluster.
_MOST_WATTS = 1e5
_MOST_USD_PER_CHIP_HOUR = 1e4
# Above any grid and any building: a factor in grams, or a percentage.
_MOST_KG_CO2E_PER_KWH = 3.0
_MOST_PUE = 10.0


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What some time on a machine cost. Unknown is None; each source says how
  its number was obtained, or what is missing.

  Attributes:
    device_hours: of devices as JAX counts them.
    energy_kwh: of the machine alone.
    pue: power usage effectiveness, what the building draws over what the
      machine draws.
    co2e_kg: energy_kwh times pue (left out where it is unknown) times the
      region's carbon intensity.
  """

  device_hours: float
  price_usd: float | None
  price_source: str
  energy_kwh: float | None
  energy_source: str
  region: str | None
  pue: float | None
  co2e_kg: float | None
  co2e_source: str


def kwh_of(chip_hours: float, watts: float, fraction: float = 1.0) -> float:
  """Energy in kWh of chips that draw `fraction` of `watts` each.

  As Touvron et al. 2023 (LLaMA, §6) have it, without their PUE:
  Wh = GPU-h x (GPU power consumption).

  Raises:
    ValueError: an argument is negative or no number, or the fraction above 1.
  """
  _checked("chip_hours", chip_hours)
  _checked("watts", watts)
  _checked("fraction", fraction, most=1.0)
  return chip_hours * watts * fraction / 1000


def co2e_kg_of(energy_kwh: float, kg_co2e_per_kwh: float,
               pue: float = 1.0) -> float:
  """CO2 equivalents in kg: energy x PUE x carbon intensity of the grid.

  Patterson et al. 2021, §2.1: footprint = electrical energy x gCO2e a kWh,
  the energy being that of the processors times the PUE of the data centre.

  Raises:
    ValueError: an argument is negative, no number, or absurd.
  """
  _checked("energy_kwh", energy_kwh)
  _checked("kg_co2e_per_kwh", kg_co2e_per_kwh, most=_MOST_KG_CO2E_PER_KWH)
  _checked("pue", pue, least=1.0, most=_MOST_PUE)
  return energy_kwh * pue * kg_co2e_per_kwh


def price_usd_of(chip_hours: float, usd_per_chip_hour: float) -> float:
  """Price in US dollars of chips by the hour.

  Raises:
    ValueError: an argument is negative or no number.
  """
  _checked("chip_hours", chip_hours)
  _checked("usd_per_chip_hour", usd_per_chip_hour)
  return chip_hours * usd_per_chip_hour


def footprint(
    device_seconds: float,
    hardware: hardware_lib.Hardware | None,
    cost: config_lib.CostConfig,
    *,
    measured_kwh: float | None = None,
    measured_source: str | None = None,
) -> Footprint:
  """Price, energy and CO2e of devices that were occupied for some time.

  Args:
    device_seconds: occupied, summed over devices as JAX counts them.
    hardware: what they are; None: unknown, and so is what follows from it.
    cost: prices and factors that come before those of the tables.
    measured_kwh: what counters have measured in that time, if anything.
    measured_source: by which counters; without a measured_kwh, why there is
      none.

  Raises:
    ValueError: device_seconds, measured_kwh or measured_source is missing,
      negative or no number.
    ConfigError: a field of `cost` is, or its region is unknown.
  """
  _checked("device_seconds", device_seconds)
  check(cost)
  region = None if cost.region is None else regions.find(cost.region)
  device_hours = device_seconds / 3600
  chip_hours = None
  if hardware is not None and hardware.devices_per_chip is not None:
    chip_hours = device_hours / hardware.devices_per_chip
  price_usd, price_source = _price(chip_hours, hardware, cost)
  energy_kwh, energy_source = _energy(chip_hours, hardware, cost,
                                      measured_kwh, measured_source)
  pue, co2e_kg, co2e_source = _co2e(energy_kwh, region, cost)
  return Footprint(device_hours, price_usd, price_source, energy_kwh,
                   energy_source, cost.region, pue, co2e_kg, co2e_source)


def total(amounts: Iterable[float | None]) -> float | None:
  """The sum of amounts of one unit; None where one of them is unknown."""
  amounts = list(amounts)
  return None if None in amounts else sum(amounts)


def check(cost: config_lib.CostConfig) -> None:
  """Raises where footprint() would, before there is anything to account.

  Raises:
    ConfigError: a field is negative, no number or absurd, or the region is
      unknown.
  """
  limits = {"price_usd_per_chip_hour": (0.0, _MOST_USD_PER_CHIP_HOUR),
            "tdp_watts": (0.0, _MOST_WATTS),
            "kg_co2e_per_kwh": (0.0, _MOST_KG_CO2E_PER_KWH),
            "pue": (1.0, _MOST_PUE), "tdp_fraction": (0.0, 1.0)}
  for name, (least, most) in limits.items():
    value = getattr(cost, name)
    if value is not None:
      problem = _problem(value, least, most)
      if problem:
        raise config_lib.ConfigError(f"cost.{name}", problem)
  if cost.region is not None:
    regions.find(cost.region)


def _price(chip_hours: float | None, hardware: hardware_lib.Hardware | None,
           cost: config_lib.CostConfig) -> tuple[float | None, str]:
  if chip_hours is None:
    return None, f"unknown: {_no_chips(hardware)}"
  price, source = cost.price_usd_per_chip_hour, "cost.price_usd_per_chip_hour"
  if price is None:
    price = hardware.price_usd_per_hour
    if price is None:
      return None, (f"unknown: no price of {hardware.label} is known; set "
                    "cost.price_usd_per_chip_hour")
    source = f"typical for {hardware.label}" + _bracket(
        hardware.price_date, hardware.sources.get("price_usd_per_hour"))
  return (price_usd_of(chip_hours, price),
          f"chip-hours x {price:g} USD, {source}")


def _energy(chip_hours: float | None, hardware: hardware_lib.Hardware | None,
            cost: config_lib.CostConfig, measured_kwh: float | None,
            measured_source: str | None) -> tuple[float | None, str]:
  if measured_kwh is not None:
    _checked("measured_kwh", measured_kwh)
    if not measured_source:
      raise ValueError("measured_source is missing: say what has measured the "
                       f"{measured_kwh:g} kWh of measured_kwh")
    return measured_kwh, measured_source
  unmeasured = _bracket(measured_source)
  if chip_hours is None:
    return None, f"unknown: not measured, and {_no_chips(hardware)}{unmeasured}"
  watts, of_what = cost.tdp_watts, "cost.tdp_watts"
  if watts is None:
    watts, of_what = hardware.tdp_watts, hardware.label
  if watts is None:
    return None, (f"unknown: not measured, and no TDP of {hardware.label} is "
                  f"known; set cost.tdp_watts{unmeasured}")
  return kwh_of(chip_hours, watts, cost.tdp_fraction), (
      f"estimated: chip-hours x TDP {watts:g} W of {of_what} x "
      f"cost.tdp_fraction {cost.tdp_fraction:g}, not measured; nothing else of "
      f"the machine is counted{unmeasured}")


def _co2e(energy_kwh: float | None, region: regions.Region | None,
          cost: config_lib.CostConfig
          ) -> tuple[float | None, float | None, str]:
  """PUE, CO2e in kg, and where both come from."""
  pue, pue_source = cost.pue, "cost.pue"
  if pue is None and region is not None:
    pue, pue_source = region.pue, region.pue_source
  intensity, source = cost.kg_co2e_per_kwh, "cost.kg_co2e_per_kwh"
  if intensity is None and region is not None:
    intensity, source = region.kg_co2e_per_kwh, region.described()
  if intensity is None:
    return pue, None, ("unknown: no carbon intensity; set cost.region or "
                       "cost.kg_co2e_per_kwh")
  if energy_kwh is None:
    return pue, None, "unknown: the energy is not known"
  if pue is None:
    return None, co2e_kg_of(energy_kwh, intensity), (
        f"energy x {intensity:g} kg/kWh ({source}); the PUE is unknown and "
        "left out")
  return pue, co2e_kg_of(energy_kwh, intensity, pue), (
      f"energy x PUE {pue:g} ({pue_source}) x {intensity:g} kg/kWh ({source})")


def _no_chips(hardware: hardware_lib.Hardware | None) -> str:
  if hardware is None:
    return ("the hardware is not known; set cost.hardware, or describe it in "
            "cost.hardware_file")
  return (f"how many devices a chip of {hardware.label} has is not known; give "
          "its devices_per_chip in cost.hardware_file")


def _bracket(*texts: str | None) -> str:
  known = "; ".join(text for text in texts if text)
  return f" ({known})" if known else ""


def _problem(value: float, least: float, most: float) -> str | None:
  if (not isinstance(value, (int, float)) or isinstance(value, bool)
      or not math.isfinite(value)):
    return f"{value!r} is no finite number"
  if value < least:
    return f"{value:g} must be at least {least:g}"
  if value > most:
    return f"{value:g} must be at most {most:g}"
  return None


def _checked(name: str, value: float, least: float = 0.0,
             most: float = math.inf) -> None:
  problem = _problem(value, least, most)
  if problem:
    raise ValueError(f"{name}: {problem}")
