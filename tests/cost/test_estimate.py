# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, against numbers worked out by hand."""

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import tfjax.cost
from tfjax import config as config_lib
from tfjax.cost import budget as budget_lib
from tfjax.cost import estimates
from tfjax.cost import hardware
from tfjax.data import store

GPT3 = pathlib.Path(__file__).resolve().parents[2] / "experiments/gpt3.py"


def gpt3(**changes: Any) -> config_lib.ExperimentConfig:
  return config_lib.load(GPT3, {"model.size": "175b"} | {
      key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
  def refuse(*_: Any) -> None:
    raise AssertionError("data were looked at")
  monkeypatch.setattr(store, "build", refuse)


def test_hours_price_and_energy_by_hand(tmp_path: pathlib.Path) -> None:
  table = tmp_path / "own.toml"
  table.write_text("""
[mine]
devices_per_chip = 2
peak_flops_per_second = {bfloat16 = 1e15}
memory_bytes = 160_000_000_000
tdp_watts = 700
price_usd_per_hour = 3.0
price_date = 2026-01-01
""")
  config = gpt3(cost__hardware_file=str(table), cost__kg_co2e_per_kwh=0.4,
                cost__pue=1.1)
  found = tfjax.cost.estimate(config, "mine", 1024, mfu=0.5)
  # 5e14 FLOP/s a device, half of them used, 1024 devices.
  flops = budget_lib.plan(config, None).flops_total
  seconds = flops / (5e14 * 0.5 * 1024)
  assert found.seconds == pytest.approx(seconds, rel=1e-12)
  assert "MFU 0.5, given" in found.seconds_source
  assert found.device_seconds == found.seconds * 1024
  chip_hours = seconds * 512 / 3600
  assert found.footprint.price_usd == pytest.approx(3 * chip_hours)
  assert found.footprint.energy_kwh == pytest.approx(0.7 * chip_hours)
  assert found.footprint.co2e_kg == pytest.approx(0.7 * chip_hours * 0.44)
  assert found.machine.available_bytes == 80_000_000_000
  assert found.fits is False  # 174.6e9 parameters, whole on every device
  assert found.memory_bytes["parameters"] >= 4 * 174_604_836_864
  # Brown et al. 2020, Table D.1: 3.14e23 FLOPs for 175B and 300B tokens, six
  # a parameter; ours has all of the vocabulary.
  assert found.flops_by_convention["6N_total"] == pytest.approx(
      3.14e23, rel=0.005)
  assert sum(found.flops_by_component.values()) == pytest.approx(flops)


def test_an_unknown_mfu_is_assumed_and_said_to_be() -> None:
  found = tfjax.cost.estimate(gpt3(), "h100", 1024)
  assert found.mfu == 0.4
  assert "assumed" in found.seconds_source
  peak = hardware.find("h100").peak_of("bfloat16")
  assert found.seconds == pytest.approx(
      found.budget.flops_total / (peak * 0.4 * 1024))
  assert found.footprint.co2e_kg is None  # no region


def test_an_unknown_peak_gives_no_hours(tmp_path: pathlib.Path) -> None:
  table = tmp_path / "own.toml"
  table.write_text("[mine]\ndevices_per_chip = 1\n")
  found = tfjax.cost.estimate(
      gpt3(cost__hardware_file=str(table)), "mine", 8, mfu=0.5)
  assert found.seconds is None and found.device_seconds is None
  assert found.seconds_source == "unknown: the peak FLOP/s is"
  assert found.footprint is None and found.fits is None
  assert found.mfu is None


def test_seconds_that_are_known_tell_the_mfu() -> None:
  found = tfjax.cost.estimate(gpt3(), "h100", 512, seconds=1e6,
                              seconds_source="the log")
  peak = hardware.find("h100").peak_of("bfloat16")
  assert found.mfu == pytest.approx(
      found.budget.flops_total / (1e6 * peak * 512))
  assert found.seconds_source == "the log"


def test_devices_follow_from_the_mesh_where_they_are_not_said() -> None:
  found = tfjax.cost.estimate(
      gpt3(mesh__fsdp=64, mesh__tensor=8, cost__hardware="h100"))
  assert found.mesh == dict(data=1, fsdp=64, sequence=1, tensor=8)
  assert found.machine.num_devices == 512
  found = tfjax.cost.estimate(gpt3(mesh__fsdp=64), "h100", 128)
  assert found.mesh == dict(data=2, fsdp=64, sequence=1, tensor=1)


def test_all_of_it_is_json() -> None:
  values = json.loads(json.dumps(
      tfjax.cost.estimate(gpt3(), "h100", 64).to_dict(), allow_nan=False))
  assert values["machine"]["hardware"] == "h100"
  assert values["budget"]["params_total"] == 174_604_836_864
  assert values["budget"]["epochs"] is None


@pytest.mark.parametrize("arguments, words", [
    (dict(num_devices=0), "num_devices: 0"),
    (dict(num_devices=8, mfu=1.5), "mfu: 1.5"),
    (dict(num_devices=8, mfu=math.nan), "mfu: nan"),
    (dict(num_devices=8, seconds=-1.0), "seconds: -1"),
    (dict(num_devices=8, seconds=math.inf), "seconds: inf")],
    ids=lambda x: str(x))
def test_what_cannot_be_is_refused(arguments: dict[str, Any],
                                   words: str) -> None:
  with pytest.raises(ValueError, match=words):
    tfjax.cost.estimate(gpt3(), "h100", **arguments)


@pytest.mark.parametrize("changes, devices, key", [
    (dict(cost__hardware="h1000"), 8, "cost.hardware"),
    (dict(), 8, "cost.hardware"),
    (dict(cost__hardware="h100", cost__region="atlantis"), 8, "cost.region"),
    (dict(cost__hardware="h100", mesh__fsdp=3), 8, "mesh"),
    (dict(cost__hardware="h100"), 1000, "train.batch_size")],
    ids=lambda x: str(x))
def test_what_does_not_go_together_names_the_key(
    changes: dict[str, Any], devices: int, key: str) -> None:
  with pytest.raises(config_lib.ConfigError) as error:
    tfjax.cost.estimate(gpt3(**changes), num_devices=devices)
  assert error.value.key == key


def test_the_package_is_cheap_to_import() -> None:
  done = subprocess.run(
      [sys.executable, "-c", "import sys, tfjax.cost; "
       "assert 'jax' not in sys.modules; from tfjax.cost import estimate"],
      check=False, capture_output=True, text=True,
      cwd=GPT3.parents[1])
  assert done.returncode == 0, done.stderr
  with pytest.raises(AttributeError, match="estimat"):
    tfjax.cost.estimat  # pylint: disable=pointless-statement


def test_the_machine_s_backend() -> None:
  def backend(kind: str | None) -> str:
    return estimates.Machine(None, kind, 1, None, "", True).backend
  assert [backend(x) for x in ("TPU v5p", "cpu", "NVIDIA H200", None)] == [
      "tpu", "cpu", "gpu", "gpu"]
