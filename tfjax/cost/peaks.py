# SPDX-License-Identifier: Apache-2.0
"""Rates that `scripts/bench.py --peak` measured on this host, kept in a file.

They stand in where no vendor states a peak, as on CPUs. A rate is only used on
the CPU model that it was measured on, and for as many cores a device; measuring
itself is in scripts/bench_peak.py.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import platform
import tempfile
from typing import Any

import jax

from tfjax.cost import cores as cores_lib

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Measured:
  """What one JAX device of a host did while all of them worked.

  Attributes:
    cores_per_device: of a CPU; None: not a CPU.
    flops_per_second: of one device, by dtype.
    memory_bandwidth_bytes_per_second: of one device, read and written.
    date: ISO.
  """

  host_cpu: str
  device_kind: str
  num_devices: int
  cores_per_device: float | None
  flops_per_second: dict[str, float]
  memory_bandwidth_bytes_per_second: float
  date: str
  jax_version: str

  @property
  def source(self) -> str:
    return (f"measured {self.date} on {self.host_cpu} by scripts/bench.py "
            f"--peak, {self.num_devices} device(s) at work")

  @property
  def _key(self) -> tuple[Any, ...]:
    return (self.host_cpu, self.device_kind, self.num_devices,
            self.cores_per_device)


def path() -> pathlib.Path:
  """The file: TFJAX_PEAKS, else tfjax/peaks.json in the user's cache."""
  if "TFJAX_PEAKS" in os.environ:
    return pathlib.Path(os.environ["TFJAX_PEAKS"])
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "tfjax" / "peaks.json"


def host_cpu() -> str:
  """The CPU's model name."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines
           if line.startswith("model name")]
  return next(filter(None, names), platform.processor() or platform.machine())


def cores_per_device(device_kind: str) -> float | None:
  """Cores that this process has for each of its CPU devices; None: no CPU."""
  if device_kind != "cpu":
    return None
  return len(cores_lib.usable()) / jax.local_device_count("cpu")


def find(device_kind: str) -> Measured | None:
  """What was measured of such a device here; None: nothing, or elsewhere."""
  known = _read()
  if not known:
    return None
  here = host_cpu(), device_kind, cores_per_device(device_kind)
  matching = [one for one in known if here == (
      one.host_cpu, one.device_kind, one.cores_per_device)]
  # Devices slow each other down: the most similar occupation of the machine.
  count = jax.local_device_count() if matching else 0
  return min(matching, default=None,
             key=lambda one: abs(one.num_devices - count))


def keep(measured: Measured) -> pathlib.Path:
  """Writes it in place of what the file has of the same devices."""
  entries = [one for one in _read() if one._key != measured._key]
  text = json.dumps([dataclasses.asdict(one) for one in (*entries, measured)],
                    indent=1)
  target = path()
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(
      "w", dir=target.parent, prefix=target.name, delete=False,
      encoding="utf-8") as temporary:
    temporary.write(text + "\n")
  os.replace(temporary.name, target)
  return target


def _read() -> list[Measured]:
  """All that was measured; what is damaged is left out, with a warning."""
  try:
    entries = json.loads(path().read_text(encoding="utf-8"))
    if not isinstance(entries, list):
      raise ValueError("it is not a list")
    return [_checked(entry) for entry in entries]
  except FileNotFoundError:
    return []
  except (OSError, ValueError, TypeError) as error:
    _LOG.warning("%s is ignored (%s); scripts/bench.py --peak writes it anew",
                 path(), error)
    return []


def _checked(values: dict[str, Any]) -> Measured:
  """Raises ValueError or TypeError where an entry is not what `keep` wrote."""
  one = Measured(**values)
  rates = [*one.flops_per_second.values(),
           one.memory_bandwidth_bytes_per_second]
  texts = [one.host_cpu, one.device_kind, one.date, one.jax_version]
  if not all(type(x) is float and math.isfinite(x) and x > 0 for x in rates):
    raise ValueError(f"a rate of {rates}")
  if not all(isinstance(x, str) for x in texts) or (
      type(one.num_devices) is not int):
    raise ValueError(f"an entry of {one.device_kind!r}")
  return one
