# SPDX-License-Identifier: Apache-2.0
"""How much CO2e a kWh of electricity stands for, and the PUE, by region.

The numbers are in regions.toml, each with its year and its source: yearly
averages of the grid where the machines stand, whatever certificates their
owner buys. What they are multiplied with is in `tfjax.cost.footprint`.
"""

import dataclasses
import difflib
import functools
import pathlib
import tomllib

from tfjax import config as config_lib

TABLE = pathlib.Path(__file__).with_name("regions.toml")


@dataclasses.dataclass(frozen=True)
class Region:
  """A cloud's region, a country or a zone of its grid.

  Attributes:
    name: as `cost.region` has it: gcp:europe-west1, FRA, JP-TK.
    place: where that is.
    kg_co2e_per_kwh: carbon intensity of the electricity there.
    year: that it is of; None: the source does not say.
    source: of the carbon intensity.
    pue: power usage effectiveness of the building; None: not known.
    pue_source: of that.
  """

  name: str
  place: str
  kg_co2e_per_kwh: float
  year: int | None
  source: str
  pue: float | None
  pue_source: str | None

  def described(self) -> str:
    """In one line, for a record."""
    year = "year not stated" if self.year is None else str(self.year)
    return f"{self.name}, {self.place}, {year}: {self.source}"


def find(name: str) -> Region:
  """The region of this name.

  Raises:
    ConfigError: there is none; the message has close names.
  """
  known = table()
  if name in known:
    return known[name]
  close = _close(name)
  hint = (f"did you mean {' or '.join(map(repr, close))}" if close else
          "is it one such as gcp:us-central1, aws:eu-west-3, FRA, US-TX")
  raise config_lib.ConfigError(
      "cost.region", f"{name!r} is not in {TABLE.name}; {hint}? Where yours is "
      "not listed, set cost.kg_co2e_per_kwh and cost.pue")


@functools.cache
def table() -> dict[str, Region]:
  """Every region by its name."""
  sections = tomllib.loads(TABLE.read_text(encoding="utf-8"))
  sources, pue_source = sections.pop("sources"), sections.pop("pue_source")
  on_grids = sections.pop("on_the_grid_of")
  found = {}
  for section, entries in sections.items():
    for name, (intensity, place, *more) in entries.items():
      year, pue = (*more, None, None)[:2]
      found[name] = Region(name, place, intensity, year, sources[section],
                           pue, None if pue is None else pue_source)
  for name, (grid, place) in on_grids.items():
    whole = found[grid]
    found[name] = dataclasses.replace(
        whole, name=name, place=place,
        source=f"average of {grid}, {whole.place}: {whole.source}")
  return found


def _close(name: str) -> list[str]:
  """Names of regions that may be meant, the place's name being one of them."""
  wanted = name.casefold()
  meant = [region.name for region in table().values() if wanted in (
      region.name.casefold(), region.name.casefold().partition(":")[2],
      region.place.casefold())]
  if meant:
    return meant[:3]
  names = {known.casefold(): known for known in table()}
  return [names[close] for close in difflib.get_close_matches(wanted, names)]
