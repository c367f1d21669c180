# SPDX-License-Identifier: Apache-2.0
"""Carbon intensity by region: numbers of their sources, names that exist."""

import csv
import pathlib

import pytest

from tfjax import config as config_lib
from tfjax.cost import regions

# What some of the numbers were taken from, kept outside of the repository.
MLCO2 = pathlib.Path(__file__).parents[2] / "../shared/refdata/mlco2"


@pytest.mark.parametrize("name,kg,year,pue,source", [
    # GoogleCloudPlatform/region-carbon-info, 2024: 103.37 g in Belgium.
    ("gcp:europe-west1", 0.10337, 2024, 1.09, "Google Cloud"),
    ("gcp:us-central1", 0.41272, 2024, 1.11, "Google Cloud"),
    # eGRID by mlco2/impact: 367.8 g in Virginia.
    ("aws:us-east-1", 0.3678, None, None, "eGRID"),
    ("FRA", 0.056039, 2023, None, "Our World in Data"),
    # electricityMap: 54.84 g in Ontario in 2021.
    ("CA-ON", 0.05484, 2021, None, "electricityMap"),
    ("aws:eu-west-3", 0.056039, 2023, None, "average of FRA, France: Our"),
    ("azure:canadaeast", 0.02, None, None, "Hydro-Québec")])
def test_numbers_are_those_of_the_sources(
    name: str, kg: float, year: int | None, pue: float | None,
    source: str) -> None:
  found = regions.find(name)
  assert (found.name, found.kg_co2e_per_kwh, found.year, found.pue) == (
      name, kg, year, pue)
  assert found.source.startswith(source) or source in found.source
  assert (found.pue_source is None) == (pue is None)
  assert found.described().startswith(f"{name}, {found.place}, ")
  assert ("year not stated" in found.described()) == (year is None)


def test_every_entry_is_a_grid_of_this_earth() -> None:
  """In kg, not g: from Sweden's water to Turkmenistan's old gas turbines."""
  assert len(regions.table()) > 400
  for region in regions.table().values():
    assert 0.001 < region.kg_co2e_per_kwh < 1.4, region
    assert region.year is None or 2018 <= region.year <= 2024, region
    assert region.pue is None or 1.05 <= region.pue <= 1.2, region
    assert region.place and region.source, region


@pytest.mark.parametrize("name,close", [
    ("us-east-1", "did you mean 'aws:us-east-1'?"),
    ("Germany", "did you mean 'DEU'?"), ("fra", "did you mean 'FRA'?"),
    ("aws:us-est-1", "'aws:us-east-1'"), ("zzzzzzzz", "gcp:us-central1")])
def test_an_unknown_region_is_refused_with_close_names(
    name: str, close: str) -> None:
  with pytest.raises(config_lib.ConfigError) as raised:
    regions.find(name)
  assert raised.value.key == "cost.region"
  assert close in str(raised.value)
  assert "cost.kg_co2e_per_kwh" in str(raised.value)


@pytest.mark.skipif(not MLCO2.exists(), reason="no data beside the checkout")
def test_numbers_from_mlco2_are_its() -> None:
  with open(MLCO2 / "impact.csv", encoding="utf-8") as file:
    impact = {f"{row['provider']}:{row['region']}": row
              for row in csv.DictReader(file)}
  with open(MLCO2 / "2021-10-27yearly_averages.csv",
            encoding="utf-8") as file:
    zones = {(row["zone_key"], int(row["year"])): row
             for row in csv.DictReader(file)}
  newest = {zone: max(year for key, year in zones if key == zone and
                      int(zones[key, year]["no_hours_with_data"]) >= 4380)
            for zone, _ in zones if any(
                key == zone and int(row["no_hours_with_data"]) >= 4380
                for (key, _), row in zones.items())}
  compared = set()
  for region in regions.table().values():
    if region.pue is not None:
      assert region.pue == float(impact[region.name]["PUE"])
      compared.add("pue")
    if "mlco2" not in region.source or "average of" in region.source:
      continue
    if region.name in impact:
      grams = float(impact[region.name]["impact"])
    else:
      assert region.year == newest[region.name]
      grams = float(zones[region.name, region.year]["carbon_intensity_avg"])
    assert region.kg_co2e_per_kwh == pytest.approx(grams / 1000, abs=6e-7)
    compared.add(region.name)
  assert len(compared) > 140
