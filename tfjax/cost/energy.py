# SPDX-License-Identifier: Apache-2.0
"""Energy by the machine's own counters: RAPL for CPUs, NVML for NVIDIA's GPUs.

Read through codecarbon, and only where there is a counter: what codecarbon
assumes elsewhere (watts by the CPU's name, memory by rule of thumb, power
samples of GPUs without a counter) is never used. Memory, fans, disks and
networks are not counted. What energy stands for is in `tfjax.cost.footprint`.
"""

from collections.abc import Sequence
import logging
import os
import pathlib
import threading
import time
import types
from typing import Any

import jax

from tfjax.cost import cores as cores_lib

_LOG = logging.getLogger("tfjax")

POWERCAP = pathlib.Path("/sys/class/powercap")
_CACHED_SECONDS = 1.0
# More than any CPU package draws: sets how soon its counter may wrap around.
_MOST_WATTS = 1000.0
_JOULES_PER_KWH = 3.6e6


class _Unmeasured(Exception):
  """There is no counter, or it has stopped; the message says why."""


class Meter:
  """What this process's part of the machine has used since `with` was entered.

  The CPUs' counters are shared by the cores that the process may run on over
  all cores, so that workers that are pinned to parts of a machine add up to
  it; of the GPUs those count that the process trains on. One process counts
  its own host; those of other hosts count theirs.

  Nothing here raises into training: without counters, or once one stops,
  kwh() is None and a log line says why.

  Attributes:
    source: which counters, and what share of them; None where nothing has
      been measured.
  """

  def __init__(self, mode: str, devices: Sequence[jax.Device] | None = None,
               powercap: pathlib.Path = POWERCAP):
    """Nothing is read before `with`.

    Args:
      mode: auto, or off, which measures nothing.
      devices: of this process, that it trains on; None: all that JAX shows.
      powercap: where Linux has RAPL.

    Raises:
      ValueError: there is no such mode.
    """
    if mode not in ("auto", "off"):
      raise ValueError(f"cost.measure_energy: {mode!r} is neither 'auto' nor "
                       "'off'")
    self.source: str | None = None
    self._mode, self._devices, self._powercap = mode, devices, powercap
    self._parts: list[_Part] = []
    self._kwh: float | None = None
    self._read_at = 0.0
    self._lock = threading.Lock()
    self._left = threading.Event()

  def __enter__(self) -> "Meter":
    if self._mode == "auto":
      try:
        self._start()
      except Exception as error:  # pylint: disable=broad-exception-caught
        self._parts = []
        _LOG.info("energy is not measured: %s", error)
    return self

  def __exit__(self, *exception: Any) -> None:
    self._left.set()
    with self._lock:
      self._update()
      self._parts = []

  def kwh(self, fresh: bool = False) -> float | None:
    """Energy in kWh since `with` was entered; None where it is not measured.

    Counters are read at most once a second, unless it must be `fresh`; leaving
    `with` reads them for a last time.
    """
    with self._lock:
      if fresh or time.monotonic() - self._read_at >= _CACHED_SECONDS:
        self._update()
      return self._kwh

  def _start(self) -> None:
    devices = jax.local_devices() if self._devices is None else self._devices
    platforms = {device.platform for device in devices}
    cpu = _cpu_part(self._powercap)
    if platforms == {"cpu"}:
      if cpu is None:
        raise _Unmeasured(f"{self._powercap} has no counter of a CPU package")
      parts = [cpu]
    elif platforms == {"gpu"}:
      parts = [_gpu_part(devices)] + ([cpu] if cpu else [])
    else:
      raise _Unmeasured(f"no counter is known for {', '.join(platforms)}")
    for part in parts:
      part.start()
    self._parts, self._kwh, self._read_at = parts, 0.0, time.monotonic()
    what = "; ".join(part.text for part in parts)
    left_out = "memory" if cpu else "the CPUs, memory"
    self.source = (f"measured: {what}; {left_out} and the rest of the machine "
                   "are not counted")
    if cpu:
      # RAPL's counters have 32 bits and wrap around within minutes, rows may
      # be further apart, and a compilation takes long.
      threading.Thread(target=self._keep_up, args=(cpu.wraps_seconds / 2,),
                       name="energy", daemon=True).start()

  def _keep_up(self, period_seconds: float) -> None:
    while not self._left.wait(period_seconds):
      with self._lock:
        self._update()

  def _update(self) -> None:
    """Reads every counter; the first failure ends the measurement."""
    if not self._parts:
      return
    try:
      self._kwh = sum(part.kwh() for part in self._parts)
      self._read_at = time.monotonic()
    except Exception as error:  # pylint: disable=broad-exception-caught
      _LOG.warning("energy is measured no longer: %s", error)
      self.source = f"{self.source}; stopped after {self._kwh:g} kWh: {error}"
      self._kwh, self._parts = None, []


class _Counter:
  """A counter of energy that only grows, until it wraps around.

  `reader` is a RAPLFile or a GPUDevice of codecarbon: start() reads the
  hardware's counter into last_energy, None where that fails. Their own deltas
  take a failed reading for no energy, or fall back to samples of power.
  """

  def __init__(self, name: str, reader: Any, range_kwh: float = 0.0):
    self._name, self._reader = name, reader
    self.range_kwh = range_kwh
    self._last = 0.0
    self.kwh = 0.0

  def read(self) -> float:
    self._reader.start()
    if self._reader.last_energy is None:
      raise _Unmeasured(f"the counter of {self._name} cannot be read")
    return self._reader.last_energy.kWh

  def start(self) -> None:
    self._last, self.kwh = self.read(), 0.0

  def update(self) -> None:
    now = self.read()
    grown = now - self._last
    if grown < 0:
      grown += self.range_kwh
    if grown < 0:
      raise _Unmeasured(f"the counter of {self._name} went backwards")
    self.kwh += grown
    self._last = now


class _Part:
  """Counters of one kind, and this process's share of them."""

  def __init__(self, counters: Sequence[_Counter], share: float, text: str):
    self._counters, self._share, self.text = counters, share, text
    ranges = [one.range_kwh for one in counters if one.range_kwh]
    self.wraps_seconds = min(ranges, default=float("inf")) * (
        _JOULES_PER_KWH / _MOST_WATTS)
    self._read_at = 0.0

  def start(self) -> None:
    for counter in self._counters:
      counter.start()
    self._read_at = time.monotonic()

  def kwh(self) -> float:
    now = time.monotonic()
    if now - self._read_at > self.wraps_seconds:
      raise _Unmeasured(
          f"nothing was read for {now - self._read_at:.0f} s, in which a "
          "counter may have wrapped around more than once")
    for counter in self._counters:
      counter.update()
    self._read_at = now
    return self._share * sum(counter.kwh for counter in self._counters)


def _cpu_part(powercap: pathlib.Path) -> _Part | None:
  """The CPU packages; None where not all of them can be read."""
  domains: dict[str, pathlib.Path] = {}
  # A package may be there twice, by MMIO and by MSR, under the same name.
  for path in sorted(powercap.glob("intel-rapl*:*")):
    name = (path / "name").read_text(encoding="utf-8").strip()
    if name.startswith("package"):
      domains.setdefault(name, path)
  if not domains:
    return None
  _, rapl = _codecarbon()
  counters = {}
  for name, path in domains.items():
    file = rapl.RAPLFile(name, str(path / "energy_uj"),
                         str(path / "max_energy_range_uj"))
    counters[name] = _Counter(name, file, file.max_energy_reading.kWh)
  try:
    values = [(name, counter.read()) for name, counter in counters.items()]
  except _Unmeasured as error:
    _LOG.info("the CPUs' energy is not measured: %s; the administrator can "
              "make %s/*/energy_uj readable", error, powercap)
    return None
  # Some packages of several dies show the socket's one counter once a die.
  for mirror in rapl.find_mirrored_counters(
      values, rapl.SEQUENTIAL_READ_TOLERANCE_KWH):
    del counters[mirror]
  usable, cores = _cores()
  return _Part(list(counters.values()), usable / cores,
               f"RAPL ({', '.join(counters)}), {usable} of {cores} cores' "
               "share")


def _cores() -> tuple[int, int]:
  """Cores that this process may run on, and all."""
  cores = os.cpu_count() or 1
  return min(len(cores_lib.usable()), cores), cores


def _gpu_part(devices: Sequence[jax.Device]) -> _Part:
  """The GPUs that are trained on.

  Raises:
    _Unmeasured: not every one of them has a counter of its own.
  """
  gpu, _ = _codecarbon()
  if not gpu.PYNVML_AVAILABLE:
    raise _Unmeasured("there is no NVML, which has NVIDIA's counters")
  everything = [one for one in gpu.AllGPUDevices().devices
                if isinstance(one, gpu.NvidiaGPUDevice)]
  visible = _visible(everything, os.environ)
  counters = []
  for device in devices:
    if device.local_hardware_id >= len(visible):
      raise _Unmeasured(
          f"JAX trains on GPU {device.local_hardware_id}, of which NVML shows "
          f"{len(visible)}")
    found = visible[device.local_hardware_id]
    if _is_sliced(gpu.pynvml, found.handle):
      raise _Unmeasured("slices of a GPU (MIG) share its counter")
    counters.append(_Counter(f"GPU {found.gpu_index}", found))
  return _Part(counters, 1.0, f"NVML, {len(counters)} GPU" + (
      "s" if len(counters) > 1 else ""))


def _visible(gpus: Sequence[Any], environment: Any) -> list[Any]:
  """GPUs in the order in which CUDA numbers them for this process."""
  setting = environment.get("CUDA_VISIBLE_DEVICES")
  names = {one.get_static_details()["name"] for one in gpus}
  # NVML goes by the bus; so does CUDA among GPUs of one kind.
  if len(names) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
    raise _Unmeasured("which of several kinds of GPUs is which is not known; "
                      "set CUDA_DEVICE_ORDER=PCI_BUS_ID")
  if setting is None:
    return list(gpus)
  chosen = []
  for entry in map(str.strip, setting.split(",")):
    found = [one for one in gpus if entry == str(one.gpu_index) or (
        entry.startswith("GPU-") and
        one.get_static_details()["uuid"].startswith(entry))]
    if len(found) != 1:
      break  # CUDA ignores what follows the first wrong entry
    chosen += found
  return chosen


def _is_sliced(pynvml: Any, handle: Any) -> bool:
  try:
    return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
  except pynvml.NVMLError:
    return False  # cannot be sliced


def _codecarbon() -> tuple[types.ModuleType, types.ModuleType]:
  """Its modules of GPUs and of RAPL; neither starts a thread or a tracker.

  Raises:
    _Unmeasured: it is not installed.
  """
  # What matters of its own log lines is logged here.
  logging.getLogger("codecarbon").disabled = True
  try:
    # pylint: disable-next=import-outside-toplevel
    from codecarbon.core import gpu, rapl
  except ImportError as error:
    raise _Unmeasured("codecarbon is not there; it comes with the extra "
                      f"tfjax[energy] ({error})") from error
  return gpu, rapl
