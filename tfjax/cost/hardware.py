# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do: peak rates, memory and its bandwidth, links.

A device that is not listed, or a figure that its vendor does not state, is
None, never a guess. CPUs are not listed; their rate depends on the machine and
`scripts/bench.py` measures it.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one chip, as its vendor states them.

  Attributes:
    bfloat16_flops: dense matrix products, FLOP/s, without sparsity.
    memory_bytes: of HBM, what the runtime reserves included.
    memory_bandwidth: of HBM, bytes a second.
    link_bandwidth: bytes a second that it sends over all its links to other
      chips of the slice or node together; vendors state twice that, the sum
      of both directions.
    devices: as how many devices JAX shows it.
  """

  bfloat16_flops: float
  memory_bytes: int
  memory_bandwidth: float
  link_bandwidth: float
  devices: int = 1


_GIB = 2**30

# docs.cloud.google.com/tpu/docs/v5p, and JAX's kind of it in topologies.
_V5P = Chip(459e12, 95 * _GIB, 2765e9, 600e9)

# By `jax.Device.device_kind`.
CHIPS = {
    # A100 data sheet, 2021: NVLink 600 GB/s.
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GIB, 2039e9, 300e9),
    # H100 data sheet, 2023, SXM: NVLink 900 GB/s.
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * _GIB, 3350e9, 450e9),
    # H200 data sheet, 2024, SXM; its 141 GB are decimal.
    "NVIDIA H200": Chip(989.4e12, 141 * 10**9, 4800e9, 450e9),
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, six
    # links of 50 GB/s each way.
    "TPU v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9),
    # docs.cloud.google.com/tpu/docs/v5e: 819 GB/s, links of 1600 Gbit/s.
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9, 200e9),
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    # docs.cloud.google.com/tpu/docs/v6e: 1600 GB/s, links of 800 GB/s.
    "TPU v6 lite": Chip(918e12, 32 * _GIB, 1600e9, 400e9),
    # docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s,
    # links of 1200 GB/s.
    "TPU7x": Chip(2307e12, 192 * _GIB, 7380e9, 600e9, devices=2),
}


@dataclasses.dataclass(frozen=True)
class Device:
  """The same of one device as JAX shows it; None: not known."""

  flops: float | None = None
  memory_bytes: int | None = None
  memory_bandwidth: float | None = None
  link_bandwidth: float | None = None


def device(kind: str, dtype: str, devices_per_chip: int | None = None) -> (
    Device):
  """What one device can do, in bytes and seconds.

  Args:
    kind: `jax.Device.device_kind`.
    dtype: what the matrix products are computed in.
    devices_per_chip: where it is not what JAX shows on the machine itself, as
      in compile-only topologies.
  """
  chip = CHIPS.get(kind)
  if chip is None:
    return Device()
  share = devices_per_chip or chip.devices
  return Device(
      flops=chip.bfloat16_flops / share if dtype == "bfloat16" else None,
      memory_bytes=chip.memory_bytes // share,
      memory_bandwidth=chip.memory_bandwidth / share,
      link_bandwidth=chip.link_bandwidth / share)


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak FLOP/s of one device, or None where it is not known."""
  return device(device_kind, dtype).flops
