# SPDX-License-Identifier: Apache-2.0
"""Counters of energy, through codecarbon's own readers of RAPL and NVML."""

import builtins
import logging
import os
import pathlib
import socket
import threading
import types
from typing import Any, Iterator

import pytest

from tfjax.cost import energy

pytest.importorskip("codecarbon")
# pylint: disable=wrong-import-position
from codecarbon.core import gpu
from codecarbon.core import gpu_nvidia

CPU = (types.SimpleNamespace(platform="cpu", local_hardware_id=0),)
KWH = 3.6e12  # microjoules; codecarbon rounds this to 7 digits
RANGE = 262_143_328_850  # microjoules, as Intel's servers have it


@pytest.fixture(autouse=True)
def two_of_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(os, "cpu_count", lambda: 4)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})


@pytest.fixture(name="clock")
def fixture_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
  """The time in seconds, which stands still."""
  now = [1000.0]
  monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
  yield now


class Powercap:
  """A tree as Linux has it under /sys/class/powercap."""

  def __init__(self, root: pathlib.Path):
    self.root = root

  def set(self, domain: str, name: str, joules: float,
          highest: int = RANGE) -> None:
    path = self.root / domain
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{round(1e6 * joules)}\n")
    (path / "max_energy_range_uj").write_text(f"{highest}\n")


@pytest.fixture(name="powercap")
def fixture_powercap(tmp_path: pathlib.Path) -> Powercap:
  """Two packages; their parts, and the platform's sum, which must not count."""
  found = Powercap(tmp_path)
  found.set("intel-rapl:0", "package-0", 100)
  found.set("intel-rapl:0:0", "core", 50)
  found.set("intel-rapl:1", "package-1", 5000)
  found.set("intel-rapl:2", "psys", 90_000)
  (tmp_path / "intel-rapl").mkdir()
  return found


def joules(meter: energy.Meter) -> float:
  return pytest.approx(meter.kwh() * KWH / 1e6, rel=1e-5)


def test_packages_count_by_the_share_of_cores(
    powercap: Powercap, clock: list[float]) -> None:
  with energy.Meter("auto", CPU, powercap.root) as meter:
    assert meter.kwh() == 0
    powercap.set("intel-rapl:0", "package-0", 700)
    powercap.set("intel-rapl:0:0", "core", 400)
    powercap.set("intel-rapl:1", "package-1", 5300)
    powercap.set("intel-rapl:2", "psys", 99_000)
    assert meter.kwh() == 0  # within a second nothing is read
    assert meter.kwh(fresh=True) > 0  # unless it has to be
    assert joules(meter) == (600 + 300) / 2
    powercap.set("intel-rapl:1", "package-1", 5400)
    clock[0] += 1
    assert joules(meter) == (600 + 400) / 2
    powercap.set("intel-rapl:1", "package-1", 5500)
  # Leaving reads for a last time, and then no more.
  assert joules(meter) == (600 + 500) / 2
  powercap.set("intel-rapl:1", "package-1", 5900)
  clock[0] += 10
  assert joules(meter) == (600 + 500) / 2
  assert meter.source == (
      "measured: RAPL (package-0, package-1), 2 of 4 cores' share; memory and "
      "the rest of the machine are not counted")


def test_a_counter_wraps_around(powercap: Powercap, clock: list[float]) -> None:
  powercap.set("intel-rapl:0", "package-0", 262_100)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    powercap.set("intel-rapl:0", "package-0", 50)
    clock[0] += 1
    assert joules(meter) == (50 + RANGE / 1e6 - 262_100) / 2


def test_what_may_have_wrapped_twice_is_unknown(
    powercap: Powercap, clock: list[float],
    caplog: pytest.LogCaptureFixture) -> None:
  """262 kJ at a thousand watts are 262 s."""
  with energy.Meter("auto", CPU, powercap.root) as meter:
    clock[0] += 262
    assert meter.kwh() == 0
    clock[0] += 263
    assert meter.kwh() is None
  assert "wrapped around more than once" in caplog.text


def test_one_package_may_be_there_twice(
    powercap: Powercap, clock: list[float]) -> None:
  powercap.set("intel-rapl-mmio:0", "package-0", 100)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    powercap.set("intel-rapl-mmio:0", "package-0", 300)
    powercap.set("intel-rapl:0", "package-0", 300)
    clock[0] += 1
    assert joules(meter) == 100


def test_dies_that_mirror_one_counter_count_once(
    powercap: Powercap, clock: list[float]) -> None:
  powercap.set("intel-rapl:1", "package-1", 100.2)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    powercap.set("intel-rapl:0", "package-0", 300)
    powercap.set("intel-rapl:1", "package-1", 300.2)
    clock[0] += 1
    assert joules(meter) == 100
  assert "RAPL (package-0)," in meter.source


def test_a_counter_that_stops_is_unknown_from_then_on(
    powercap: Powercap, clock: list[float],
    caplog: pytest.LogCaptureFixture) -> None:
  with energy.Meter("auto", CPU, powercap.root) as meter:
    powercap.set("intel-rapl:0", "package-0", 7300)
    clock[0] += 1
    assert joules(meter) == 3600
    (powercap.root / "intel-rapl:1" / "energy_uj").write_text("")
    clock[0] += 1
    assert meter.kwh() is None
    powercap.set("intel-rapl:1", "package-1", 5000)
    clock[0] += 1
    assert meter.kwh() is None
  assert meter.source.startswith("measured: RAPL")
  assert "; stopped after 0.001 kWh: the counter of package-1 cannot" in (
      meter.source)
  assert caplog.text.count("measured no longer") == 1


def readers() -> list[threading.Thread]:
  return [one for one in threading.enumerate() if one.name == "energy"]


def test_counters_are_read_while_nobody_asks(powercap: Powercap) -> None:
  """5 J wrap around within 5 ms at a thousand watts."""
  low = 5_000_000
  powercap.set("intel-rapl:1", "package-1", 3, low)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    thread, = readers()
    read = threading.Event()
    update = meter._update
    meter._update = lambda: (update(), read.set())
    assert read.wait(10)
  thread.join(10)
  assert not readers()


@pytest.mark.parametrize("missing", ["tree", "packages", "permission"])
def test_without_a_cpus_counter_nothing_is_measured(
    missing: str, powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
  root = powercap.root
  if missing == "tree":
    root = root / "nothing"
  for package in ("intel-rapl:0", "intel-rapl:1"):
    if missing == "packages":
      powercap.set(package, "uncore", 100)
  if missing == "permission":
    monkeypatch.setattr(builtins, "open", _refusing("intel-rapl:1/energy_uj"))
  with energy.Meter("auto", CPU, root) as meter:
    assert meter.kwh() is None
  assert meter.kwh() is None and meter.source is None


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_codecarbon_may_be_absent_or_break(
    error: type[Exception], powercap: Powercap,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
  real = builtins.__import__
  def refuse(name: str, *arguments: Any) -> Any:
    if name.startswith("codecarbon"):
      raise error("no such luck")
    return real(name, *arguments)
  monkeypatch.setattr(builtins, "__import__", refuse)
  caplog.set_level(logging.INFO, "tfjax")
  with energy.Meter("auto", CPU, powercap.root) as meter:
    assert meter.kwh() is None
  assert meter.source is None and "no such luck" in caplog.text
  assert ("tfjax[energy]" in caplog.text) == (error is ImportError)


def test_off_reads_nothing(powercap: Powercap) -> None:
  with energy.Meter("off", CPU, powercap.root) as meter:
    assert meter.kwh() is None and meter.source is None
  with pytest.raises(ValueError, match="cost.measure_energy: 'on'"):
    energy.Meter("on")


def test_this_machine_without_counters_has_none(tmp_path: pathlib.Path) -> None:
  """By JAX's own devices, whatever they are here."""
  with energy.Meter("auto", powercap=tmp_path) as meter:
    assert meter.kwh() is None


def test_nothing_opens_a_connection(
    powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
  def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a socket")
  monkeypatch.setattr(socket, "socket", refuse)
  monkeypatch.setattr(energy, "_CACHED_SECONDS", 0.0)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    assert meter.kwh() == 0


def test_codecarbons_own_log_is_silent(
    powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
  """It would warn of a forbidden file at every reading."""
  log, lines = logging.getLogger("codecarbon"), []
  handler = logging.Handler()
  handler.emit = lines.append
  monkeypatch.setattr(log, "disabled", False)
  monkeypatch.setattr(log, "handlers", [handler])
  monkeypatch.setattr(energy, "_CACHED_SECONDS", 0.0)
  with energy.Meter("auto", CPU, powercap.root) as meter:
    monkeypatch.setattr(builtins, "open", _refusing("energy_uj"))
    assert meter.kwh() is None
  assert lines == []


def _refusing(ending: str) -> Any:
  """open(), but for files that end so; root may read what is forbidden."""
  real = builtins.open
  def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
    if str(path).endswith(ending):
      raise PermissionError(13, "Permission denied", str(path))
    return real(path, *arguments, **options)
  return refuse


# --- GPUs --------------------------------------------------------------------


class Nvml:
  """NVML as pynvml shows it, of GPUs whose counters a test sets."""

  NVML_TEMPERATURE_GPU = 0

  class NVMLError(Exception):
    pass

  def __init__(self, *names: str):
    self.names = names
    self.millijoules: list[float | None] = [1e9] * len(names)
    self.sliced: set[int] = set()

  def nvmlInit(self) -> None:
    pass

  def nvmlDeviceGetCount(self) -> int:
    return len(self.names)

  def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
    return index

  def nvmlDeviceGetName(self, handle: int) -> str:
    return self.names[handle]

  def nvmlDeviceGetUUID(self, handle: int) -> str:
    return f"GPU-{handle}a"

  def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
    return 700_000

  def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
    return types.SimpleNamespace(total=1, free=1, used=0)

  def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
    return 500_000

  def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
    if self.millijoules[handle] is None:
      raise self.NVMLError("not supported")
    return self.millijoules[handle]

  def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
    if handle in self.sliced:
      return [1, 1]
    raise self.NVMLError("not supported")


@pytest.fixture(name="nvml")
def fixture_nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
  """A node of four H100s."""
  nvml = Nvml(*["H100"] * 4)
  for module in (gpu, gpu_nvidia):
    monkeypatch.setattr(module, "pynvml", nvml)
    monkeypatch.setattr(module, "PYNVML_AVAILABLE", True)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
  return nvml


def gpus(*ids: int) -> list[Any]:
  return [types.SimpleNamespace(platform="gpu", local_hardware_id=i)
          for i in ids]


def test_gpus_that_are_trained_on_count_and_the_cpus(
    nvml: Nvml, powercap: Powercap, clock: list[float]) -> None:
  with energy.Meter("auto", gpus(0, 2), powercap.root) as meter:
    nvml.millijoules = [1e9 + 3e6, 9e9, 1e9 + 1e6, 9e9]
    powercap.set("intel-rapl:0", "package-0", 300)
    clock[0] += 1
    assert joules(meter) == 4000 + 100
  assert meter.source == (
      "measured: NVML, 2 GPUs; RAPL (package-0, package-1), 2 of 4 cores' "
      "share; memory and the rest of the machine are not counted")


@pytest.mark.parametrize("visible,device,counter", [
    ("2,3", 1, 3), ("GPU-1a,GPU-0a", 0, 1), ("3", 0, 3), (None, 2, 2)])
def test_devices_go_by_what_cuda_shows(
    visible: str | None, device: int, counter: int, nvml: Nvml,
    clock: list[float], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  if visible is not None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  with energy.Meter("auto", gpus(device), tmp_path) as meter:
    nvml.millijoules = [9e9] * 4
    nvml.millijoules[counter] = 1e9 + 2e6
    clock[0] += 1
    assert joules(meter) == 2000
  assert meter.source == ("measured: NVML, 1 GPU; the CPUs, memory and the "
                          "rest of the machine are not counted")


@pytest.mark.parametrize("case,why", [
    ("no counter", "the counter of GPU 0 cannot be read"),
    ("slice", "slices of a GPU"),
    ("not shown", "JAX trains on GPU 0, of which NVML shows 0"),
    ("after a wrong one", "JAX trains on GPU 1, of which NVML shows 1"),
    ("several kinds", "which of several kinds"),
    ("a TPU", "no counter is known for tpu"), ("no NVML", "there is no NVML")])
def test_gpus_without_a_counter_of_their_own_are_unmeasured(
    case: str, why: str, nvml: Nvml, powercap: Powercap,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
  """The CPUs' counter alone would pass a part for the whole."""
  caplog.set_level(logging.INFO, "tfjax")
  devices = gpus(0)
  if case == "no counter":  # codecarbon would take samples of its power
    nvml.millijoules[0] = None
  elif case == "slice":
    nvml.sliced = {0}
  elif case == "not shown":
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
  elif case == "after a wrong one":
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9,1")
    devices = gpus(0, 1)
  elif case == "several kinds":
    nvml.names = ("H100", "T4", "H100", "T4")
  elif case == "a TPU":
    devices = [types.SimpleNamespace(platform="tpu", local_hardware_id=0)]
  elif case == "no NVML":
    monkeypatch.setattr(gpu, "PYNVML_AVAILABLE", False)
  with energy.Meter("auto", devices, powercap.root) as meter:
    assert meter.kwh() is None and meter.source is None
  assert f"energy is not measured: {why}" in caplog.text


def test_a_gpus_counter_that_fails_or_restarts_ends_the_measurement(
    nvml: Nvml, clock: list[float], tmp_path: pathlib.Path) -> None:
  for value, problem in ((None, "cannot be read"), (5.0, "went backwards")):
    nvml.millijoules = [1e9] * 4
    with energy.Meter("auto", gpus(0), tmp_path) as meter:
      nvml.millijoules[0] = 1e9 + 3.6e6
      clock[0] += 1
      assert joules(meter) == 3600
      nvml.millijoules[0] = value
      clock[0] += 1
      assert meter.kwh() is None
    assert f"stopped after 0.001 kWh: the counter of GPU 0 {problem}" in (
        meter.source)
