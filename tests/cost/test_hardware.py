# SPDX-License-Identifier: Apache-2.0
"""Figures of chips as their vendors state them; unknown stays unknown."""

import dataclasses

import pytest

from tfjax.cost import hardware


def test_a_v5e_by_its_data_sheet() -> None:
  """docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps,
  1600 Gbps."""
  device = hardware.device("TPU v5 lite", "bfloat16")
  assert device.flops == 197e12
  assert device.memory_bytes == 16 * 2**30
  assert device.memory_bandwidth == 819e9
  assert device.link_bandwidth == 1600e9 / 8


def test_links_count_one_direction() -> None:
  """The v5p's page has 1200 GBps in both, as earlier 4800 Gbps in one."""
  assert hardware.device("TPU v5p", "bfloat16").link_bandwidth == (
      4800e9 / 8) == 1200e9 / 2


def test_a_topologys_name_of_a_chip_is_the_machines() -> None:
  assert hardware.device("TPU v5", "bfloat16") == hardware.device(
      "TPU v5p", "bfloat16")


def test_float32_has_memory_and_no_known_peak() -> None:
  device = hardware.device("NVIDIA H200", "float32")
  assert device.flops is None
  assert device.memory_bytes == 141e9
  assert hardware.peak_flops("NVIDIA H200", "bfloat16") == 989.4e12


def test_an_unknown_device_is_unknown_in_everything() -> None:
  for kind in ("cpu", "NVIDIA A100", "TPU v3"):
    assert set(dataclasses.astuple(hardware.device(kind, "bfloat16"))) == {
        None}


def test_devices_share_a_chip() -> None:
  # JAX shows two for a TPU7x, and one for a v4, but both cores in topologies.
  assert hardware.device("TPU7x", "bfloat16").flops == 2307e12 / 2
  assert hardware.device("TPU v4", "bfloat16").flops == 275e12
  half = hardware.device("TPU v4", "bfloat16", devices_per_chip=2)
  assert half == hardware.Device(137.5e12, 16 * 2**30, 600e9, 150e9)


@pytest.mark.parametrize("kind", hardware.CHIPS)
def test_every_chip_is_plausible(kind: str) -> None:
  """A slip of a unit shows: computing is some hundred FLOPs a byte of memory
  bandwidth, and links are slower than memory."""
  chip = hardware.CHIPS[kind]
  assert 100 < chip.bfloat16_flops / chip.memory_bandwidth < 1000
  assert 2 < chip.memory_bandwidth / chip.link_bandwidth < 20
  assert 10e9 < chip.memory_bytes < 300e9
