# SPDX-License-Identifier: Apache-2.0
"""Figures as vendors state them, the user's own, and measured peaks; unknown
stays unknown."""

import dataclasses
import json
import logging
import os
import pathlib
import re

import jax
import pytest

from tfjax import config as config_lib
from tfjax.cost import hardware
from tfjax.cost import peaks

TABLE = (pathlib.Path(__file__).parents[3] / "shared" / "refdata" /
         "cost_fixtures" / "accelerators.json")
NAMES = [
    "tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7",
    "v100-16gb", "v100-32gb", "t4", "a100-40gb", "a100-80gb", "a100-pcie-40gb",
    "a100-pcie-80gb", "h100", "h100-pcie", "h100-nvl", "h200", "b200", "gb200",
    "l4", "mi250x", "mi300x"]
FIGURES = ["peak_flops_per_second", "memory_bytes",
           "memory_bandwidth_bytes_per_second",
           "link_bandwidth_bytes_per_second", "tdp_watts",
           "price_usd_per_hour"]


@pytest.fixture(autouse=True, name="file")
def fixture_file(tmp_path: pathlib.Path,
                 monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """Where measured peaks are; none at first."""
  monkeypatch.setenv("TFJAX_PEAKS", str(tmp_path / "kept" / "peaks.json"))
  return tmp_path / "kept" / "peaks.json"


# --- The table ---------------------------------------------------------------


def test_figures_by_data_sheets() -> None:
  """bfloat16 TFLOP/s, GiB, GB/s and GB/s over links in one direction."""
  sheets = {
      # docs.cloud.google.com/tpu/docs: v3, v4 (six links of 50 GB/s), v5e
      # (1600 Gbit/s one way), v5p (1200 GB/s both ways), v6e, tpu7x.
      "tpu-v3": (123, 32, 900, 328), "tpu-v4": (275, 32, 1200, 300),
      "tpu-v5e": (197, 16, 819, 1600 / 8),
      "tpu-v5p": (459, 95, 2765, 1200 / 2),
      "tpu-v6e": (918, 32, 1600, 400), "tpu-v7": (2307, 192, 7380, 600),
      # NVIDIA's sheets of A100, H100 and H200; NVLink 600 and 900 GB/s.
      "a100-40gb": (312, 40, 1555, 300), "a100-80gb": (312, 80, 2039, 300),
      "h100": (989.4, 80, 3350, 450), "h200": (989.4, 141, 4800, 450)}
  for name, (flops, memory, bandwidth, links) in sheets.items():
    chip = hardware.find(name)
    assert (chip.peak_flops_per_second["bfloat16"], chip.memory_bytes,
            chip.memory_bandwidth_bytes_per_second,
            chip.link_bandwidth_bytes_per_second) == (
                flops * 1e12, memory * 2**30, bandwidth * 1e9, links * 1e9)


@pytest.mark.parametrize("name, dtype, sparse", [
    ("a100-80gb", "bfloat16", 624), ("a100-80gb", "int8", 1248),
    ("h100", "bfloat16", 1979), ("h100", "tensorfloat32", 989),
    ("h100", "float8", 3958), ("h100-pcie", "bfloat16", 1513),
    ("h100-nvl", "bfloat16", 1671), ("h200", "int8", 3958),
    ("b200", "bfloat16", 4500), ("gb200", "bfloat16", 5000),
    ("l4", "bfloat16", 242), ("l4", "float8", 485),
    ("mi300x", "bfloat16", 2614.9)])
def test_peaks_are_without_sparsity(name: str, dtype: str,
                                    sparse: float) -> None:
  """What vendors print with 2:4 sparsity, in TFLOP/s, is twice ours."""
  peak = hardware.find(name).peak_flops_per_second[dtype]
  assert peak == pytest.approx(sparse * 1e12 / 2, rel=2e-3)


def test_figures_agree_with_a_published_table() -> None:
  """Within the rounding of other people's tables: bfloat16 (float16 where
  there is none), int8, memory, bandwidth, TDP."""
  if not TABLE.exists():
    pytest.skip(f"no published figures to compare with at {TABLE}")
  rows = json.loads(TABLE.read_text())["rows"]
  names = {"TPU v7 Ironwood": "tpu-v7", "V100 SXM2": "v100-32gb",
           "A100 SXM": "a100-80gb", "H100 SXM": "h100", "H200 SXM": "h200",
           "GB200 (per GPU)": "gb200"}
  for label, bf16, int8, fp8, gigabytes, bandwidth, tdp, _ in rows:
    chip = hardware.find(names.get(label, label.lower().replace(" ", "-")))
    peaks_ = chip.peak_flops_per_second
    assert peaks_.get("bfloat16", peaks_.get("float16")) == pytest.approx(
        bf16, rel=2e-3), label
    for dtype, value in (("int8", int8), ("float8", fp8)):
      if value is not None:
        assert peaks_[dtype] == pytest.approx(value, rel=5e-3), label
    # A B200 has 192 GB, of which 180 are to be used, a GB200's GPU 186.
    assert chip.memory_bytes == pytest.approx(gigabytes * 2**30, rel=0.07)
    assert chip.memory_bandwidth_bytes_per_second == pytest.approx(
        bandwidth, rel=0.02), label
    assert chip.tdp_watts == tdp, label


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_is_plausible(name: str) -> None:
  """A slip of a unit shows: computing is some hundred FLOPs a byte of memory
  bandwidth, links are slower than memory, and a watt gives up to some TFLOP."""
  chip = hardware.find(name)
  best = max(chip.peak_flops_per_second.get(dtype, 0)
             for dtype in ("bfloat16", "float16"))
  assert 60 < best / chip.memory_bandwidth_bytes_per_second < 1000
  # Without links of their own cards send over PCIe.
  assert 1.9 < (chip.memory_bandwidth_bytes_per_second /
                chip.link_bandwidth_bytes_per_second) < 65
  assert 15e9 < chip.memory_bytes < 300e9
  if chip.tdp_watts is not None:
    assert 0.1e12 < best / chip.tdp_watts < 3e12
  if chip.price_usd_per_hour is not None:
    assert 0.3 < chip.price_usd_per_hour < 20
  order = [chip.peak_flops_per_second.get(dtype, 0) for dtype in (
      "float32", "tensorfloat32", "bfloat16", "float8")]
  known = [peak for peak in order if peak]
  assert known == sorted(known)
  assert chip.devices_per_chip in (1, 2)


@pytest.mark.parametrize("name", [*NAMES, "cpu"])
def test_every_figure_has_a_source_and_every_price_a_date(name: str) -> None:
  chip = hardware.find(name)
  for figure in FIGURES:
    known = getattr(chip, figure) not in (None, {})
    assert known == bool(chip.sources.get(figure)), figure
    assert "your file" not in chip.sources.get(figure, ""), figure
  assert (chip.price_date is None) == (chip.price_usd_per_hour is None)
  if chip.price_date:
    assert re.fullmatch(r"20[12]\d-\d\d-\d\d", chip.price_date)


def test_names_aliases_and_device_kinds_are_unique() -> None:
  entries = [hardware.find(name) for name in (*NAMES, "cpu")]
  names = [x for entry in entries for x in (entry.name, *entry.aliases)]
  kinds = [x for entry in entries for x in entry.device_kinds]
  assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)
  for entry in entries:
    assert all(hardware.find(alias) is not None and
               hardware.find(alias).name == entry.name
               for alias in entry.aliases)
    assert all(hardware.of_device(kind).name == entry.name
               for kind in entry.device_kinds)


def test_an_unknown_name_says_what_is_close() -> None:
  with pytest.raises(config_lib.ConfigError, match="h100") as error:
    hardware.find("h1000")
  assert error.value.key == "cost.hardware"
  assert hardware.find(" TPU7x ").name == "tpu-v7"


def test_an_unknown_device_is_unknown_in_everything() -> None:
  for kind in ("cpu", "NVIDIA A100", "NVIDIA GeForce RTX 4090", ""):
    assert set(dataclasses.astuple(hardware.device(kind, "bfloat16"))) == {
        None}
    assert hardware.peak(kind, "bfloat16") == hardware.Peak(None, None)
    assert hardware.device(kind, "bfloat16", 2) == hardware.Device()
  assert hardware.of_device("NVIDIA A100") is None


# --- What one device can do --------------------------------------------------


def test_devices_share_a_chip() -> None:
  # JAX shows two for a TPU7x, and one for a v4, but both cores in topologies.
  assert hardware.device("TPU7x", "bfloat16").flops == 2307e12 / 2
  assert hardware.device("TPU v4", "bfloat16").flops == 275e12
  half = hardware.device("TPU v4", "bfloat16", devices_per_chip=2)
  assert half == hardware.Device(137.5e12, 16 * 2**30, 600e9, 150e9)
  assert hardware.peak("TPU v3", "bfloat16").flops_per_second == 123e12 / 2
  assert hardware.device("TPU v5", "bfloat16") == hardware.device(
      "TPU v5p", "bfloat16")


def test_float32_counts_as_jax_computes_it() -> None:
  """At its default precision (jax.lax.Precision): TF32, where the GPU has it,
  and bfloat16 on TPUs."""
  h100 = hardware.peak("NVIDIA H100 80GB HBM3", "float32")
  assert h100.flops_per_second == 494.7e12
  assert "tensorfloat32" in h100.source
  assert hardware.find("h100").peak_flops_per_second["float32"] == 66.9e12
  assert hardware.peak("Tesla T4", "float32").flops_per_second == 8.1e12
  assert hardware.peak("TPU v4", "float32").flops_per_second == 275e12
  assert hardware.peak("AMD Instinct MI300X", "float32").flops_per_second == (
      163.4e12)


def test_a_type_that_a_chip_does_not_compute_has_no_peak() -> None:
  assert hardware.peak("Tesla V100-SXM2-16GB", "bfloat16").source is None
  assert hardware.device("Tesla V100-SXM2-16GB", "bfloat16") == (
      hardware.Device(None, 16 * 2**30, 900e9, 150e9))


def test_the_config_chooses() -> None:
  cost = config_lib.CostConfig()
  assert hardware.resolve(cost, "NVIDIA L4").name == "l4"
  assert hardware.resolve(cost, "who knows") is None
  cost = config_lib.CostConfig(hardware="a100")
  assert hardware.resolve(cost, "NVIDIA L4").name == "a100-80gb"
  peak = hardware.peak("NVIDIA L4", "bfloat16", cost)
  assert peak.flops_per_second == 312e12
  assert "A100" in peak.source


def test_a_config_that_contradicts_jax_is_told_apart(
    tmp_path: pathlib.Path) -> None:
  cost = config_lib.CostConfig(hardware="a100")
  assert hardware.contradicted(cost, "NVIDIA L4").name == "l4"
  assert hardware.resolve(cost, "NVIDIA L4").label == (
      "NVIDIA A100 SXM4 80 GB (as cost.hardware says of 'NVIDIA L4')")
  assert "of 'NVIDIA L4'): NVIDIA A100 data" in hardware.peak(
      "NVIDIA L4", "bfloat16", cost).source
  file = write(tmp_path, "[ours]\ntdp_watts = 300\ndevices_per_chip = 1\n")
  for name, kind in (("l4", "NVIDIA L4"), ("a100", "who knows"),
                     ("ours", "NVIDIA L4"), (None, "NVIDIA L4")):
    cost = config_lib.CostConfig(hardware=name, hardware_file=file)
    assert hardware.contradicted(cost, kind) is None
    assert "cost.hardware" not in str(hardware.resolve(cost, kind))


# --- The user's own ----------------------------------------------------------


def write(tmp_path: pathlib.Path, text: str) -> str:
  path = tmp_path / "mine.toml"
  path.write_text(text)
  return str(path)


def test_a_file_of_the_users_own(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path, """
[our-card]
device_kinds = ["NVIDIA L4", "ACME 1"]
devices_per_chip = 4
tdp_watts = 100
[our-card.peak_flops_per_second]
bfloat16 = 8e13
[h100]
price_usd_per_hour = 2.5
price_date = 2026-01-31
[h100.sources]
price_usd_per_hour = "our contract"
[cpu]
devices_per_chip = 32
tdp_watts = 270
""")
  ours = hardware.find("our-card", file)
  assert ours.tdp_watts == 100 and ours.price_usd_per_hour is None
  assert ours.sources["tdp_watts"] == f"your file {file}"
  # Theirs come before the table's.
  assert hardware.of_device("NVIDIA L4", file) == ours
  assert hardware.of_device("NVIDIA L4").name == "l4"
  # What is not replaced stays, with its source.
  h100 = hardware.find("h100-sxm", file)
  assert (h100.price_usd_per_hour, h100.price_date) == (2.5, "2026-01-31")
  assert h100.sources["price_usd_per_hour"] == "our contract"
  assert h100.memory_bytes == 80 * 2**30
  assert h100.sources["memory_bytes"] == (
      hardware.find("h100").sources["memory_bytes"])
  assert hardware.find("h100").price_usd_per_hour != 2.5
  cpu = hardware.find("cpu", file)
  assert cpu.devices_per_chip == 32 and cpu.device_kinds == ("cpu",)
  cost = config_lib.CostConfig(hardware="our-card", hardware_file=file)
  assert hardware.peak("ACME 1", "bfloat16", cost) == hardware.Peak(
      2e13, f"our-card: your file {file}")


@pytest.mark.parametrize("text, words", [
    ("[x]\ntdp_wats = 3\n", ["[x]", "tdp_wats", "tdp_watts"]),
    ("[x]\ntdp_watts = -3\n", ["[x] tdp_watts", "-3"]),
    ("[x]\ntdp_watts = true\n", ["[x] tdp_watts", "not a number"]),
    ("[x]\ntdp_watts = '300'\n", ["[x] tdp_watts", "not a number"]),
    ("[x]\ntdp_watts = nan\n", ["[x] tdp_watts", "nan"]),
    ("[x]\nmemory_bytes = inf\n", ["[x] memory_bytes", "inf"]),
    ("[x]\nmemory_bytes = 80\n", ["[x] memory_bytes", "bytes"]),
    ("[x]\nprice_usd_per_hour = 3\n", ["[x] price_date", "missing"]),
    ("[x]\nprice_usd_per_hour = 3\nprice_date = '2025'\n",
     ["[x] price_date", "date"]),
    ("[x.peak_flops_per_second]\nbfloat16 = 989\n",
     ["[x] peak_flops_per_second", "bfloat16", "989"]),
    ("[x.peak_flops_per_second]\nbf16 = 989e12\n",
     ["[x] peak_flops_per_second", "bf16", "bfloat16"]),
    ("[x]\npeak_flops_per_second = 989e12\n",
     ["[x] peak_flops_per_second", "table"]),
    ("[x]\ndevices_per_chip = 0\n", ["[x] devices_per_chip"]),
    ("[x]\ntdp_watts = 270\n", ["[x] devices_per_chip", "missing"]),
    ("[cpu.peak_flops_per_second]\nfloat32 = 1e12\n",
     ["[cpu] devices_per_chip", "missing"]),
    ("[x]\ndevice_kinds = 'cpu'\n", ["[x] device_kinds", "list"]),
    ("[x]\nfloat32_computed_as = 'tf32'\n", ["[x] float32_computed_as"]),
    ("[cpu]\ntdp_watts = 270\n", ["[cpu] devices_per_chip", "missing"]),
    ("[h100-sxm]\ntdp_watts = 270\n", ["[h100-sxm]", "h100"]),
    ("[x]\naliases = ['y']\n[y]\n", ["[y]", "x"]),
    ("tdp_watts = 3\n", ["tdp_watts", "table"]),
    ("[x\n", ["mine.toml"])])
def test_a_wrong_file_names_entry_and_field(
    tmp_path: pathlib.Path, text: str, words: list[str]) -> None:
  file = write(tmp_path, text)
  with pytest.raises(config_lib.ConfigError) as error:
    hardware.of_device("cpu", file)
  assert error.value.key == "cost.hardware_file"
  assert file in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_a_name_in_capitals_is_found(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path, "[Big-Card]\ndevice_kinds = ['Big']\n")
  assert hardware.find("big-card", file).name == "Big-Card"
  assert list(hardware.entries(file))[0] == "Big-Card"
  assert list(hardware.entries()) == [*NAMES, "cpu"]


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(config_lib.ConfigError, match="nowhere.toml"):
    hardware.find("h100", str(tmp_path / "nowhere.toml"))


# --- Measured peaks ----------------------------------------------------------


def measured(**changes: object) -> peaks.Measured:
  values = dict(
      host_cpu=peaks.host_cpu(), device_kind="cpu",
      num_devices=jax.local_device_count(),
      cores_per_device=peaks.cores_per_device("cpu"),
      flops_per_second={"float32": 5e10},
      memory_bandwidth_bytes_per_second=1e10, date="2026-02-03",
      jax_version="0.10.2")
  return peaks.Measured(**{**values, **changes})


def test_a_measured_peak_stands_in_where_there_is_none(
    file: pathlib.Path) -> None:
  assert peaks.keep(measured()) == file
  peak = hardware.peak("cpu", "float32")
  assert peak.flops_per_second == 5e10
  assert peak.source.startswith(
      f"measured 2026-02-03 on {peaks.host_cpu()} by scripts/bench.py --peak")
  assert hardware.peak("cpu", "bfloat16") == hardware.Peak(None, None)
  # Not where the table has one, nor for other hardware that a config names.
  peaks.keep(measured(device_kind="NVIDIA L4", cores_per_device=None,
                      flops_per_second={"bfloat16": 9e13}))
  assert hardware.peak("NVIDIA L4", "bfloat16").flops_per_second == 121e12
  cost = config_lib.CostConfig(hardware="v100")
  assert hardware.peak("NVIDIA L4", "bfloat16", cost).source is None
  assert hardware.peak("cpu", "bfloat16", cost).source is None
  cost = config_lib.CostConfig(hardware="cpu")
  assert hardware.peak("cpu", "float32", cost).flops_per_second == 5e10


@pytest.mark.parametrize("other", [
    dict(host_cpu="another"), dict(cores_per_device=64.0),
    dict(cores_per_device=None), dict(device_kind="Radeon")])
def test_what_was_measured_elsewhere_is_not_taken(
    other: dict[str, object]) -> None:
  peaks.keep(measured(**other))
  assert hardware.peak("cpu", "float32") == hardware.Peak(None, None)


def test_measuring_again_replaces(file: pathlib.Path) -> None:
  peaks.keep(measured())
  peaks.keep(measured(num_devices=jax.local_device_count() + 7,
                      flops_per_second={"float32": 1e10}))
  peaks.keep(measured(flops_per_second={"float32": 7e10}))
  assert len(json.loads(file.read_text())) == 2
  # Of two, that with about as many devices at work.
  assert hardware.peak("cpu", "float32").flops_per_second == 7e10
  assert [x.name for x in file.parent.iterdir()] == ["peaks.json"]


@pytest.mark.parametrize("damage", [
    "", "{", "{}", "[1]", '[{"host_cpu": "x"}]', "nan-rate", "text-rate",
    "negative-rate", "bytes"])
def test_a_damaged_file_is_ignored_with_a_warning(
    file: pathlib.Path, damage: str,
    caplog: pytest.LogCaptureFixture) -> None:
  peaks.keep(measured())
  text = file.read_text()
  rates = {"nan-rate": "NaN", "text-rate": '"fast"', "negative-rate": "-1.0"}
  if damage in rates:
    text = text.replace("50000000000.0", rates[damage])
    assert rates[damage] in text
    file.write_text(text)
  elif damage == "bytes":
    file.write_bytes(b"\xff\xfe\x00")
  else:
    file.write_text(damage)
  with caplog.at_level(logging.WARNING):
    assert hardware.peak("cpu", "float32") == hardware.Peak(None, None)
  assert str(file) in caplog.text
  # The next measurement mends it.
  peaks.keep(measured())
  assert hardware.peak("cpu", "float32").flops_per_second == 5e10


def test_the_chip_of_a_cpu_is_the_machine(
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(os, "cpu_count", lambda: 16)
  cost = config_lib.CostConfig()
  # A worker on 2 of the 16 cores, with a device on each, or four on them.
  assert hardware.resolve(cost, "cpu", 1.0).devices_per_chip == 16
  assert hardware.resolve(cost, "cpu", 0.5).devices_per_chip == 32
  assert hardware.resolve(cost, "cpu").devices_per_chip == (
      16 / peaks.cores_per_device("cpu"))
  # A user's file knows better, and other hardware is no CPU of this machine.
  named = config_lib.CostConfig(hardware="v100")
  assert hardware.resolve(named, "cpu", 1.0).devices_per_chip == 1
