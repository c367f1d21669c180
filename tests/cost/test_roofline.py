# SPDX-License-Identifier: Apache-2.0
"""Rooflines worked out by hand."""

import pytest

from tfjax.cost import hardware
from tfjax.cost import roofline

# 100 FLOP/s, 10 bytes/s of memory, 5 bytes/s of links.
DEVICE = hardware.Device(100.0, 1000, 10.0, 5.0)


def test_each_resource_at_its_peak() -> None:
  bound = roofline.roofline(
      roofline.Work(model_flops=300.0, recompute_flops=100.0,
                    memory_bytes=20.0, link_bytes=15.0), DEVICE, 80)
  assert (bound.compute_seconds, bound.memory_seconds,
          bound.link_seconds) == (4.0, 2.0, 3.0)
  assert bound.step_seconds == 4.0
  assert bound.bottleneck == "compute"
  assert bound.tokens_per_second == 20.0
  # Recomputation takes time and is no model FLOP: 300 of the 400 possible.
  assert bound.mfu == 0.75


@pytest.mark.parametrize("memory, links, name, seconds", [
    (90.0, 15.0, "memory", 9.0), (20.0, 35.0, "links", 7.0)])
def test_the_slowest_binds(memory: float, links: float, name: str,
                           seconds: float) -> None:
  bound = roofline.roofline(
      roofline.Work(300.0, 100.0, memory, links), DEVICE, 63)
  assert bound.bottleneck == name
  assert bound.step_seconds == seconds
  assert bound.tokens_per_second == 63 / seconds
  assert bound.mfu == pytest.approx(300 / (seconds * 100))


def test_what_is_not_known_is_none() -> None:
  unknown = roofline.roofline(roofline.Work(300.0, 0.0, 20.0, 15.0),
                              hardware.Device(), 80)
  assert unknown == roofline.Roofline(*[None] * 7)
  # A peak without the program's traffic, as where it does not fit.
  partly = roofline.roofline(roofline.Work(300.0), DEVICE, 80)
  assert partly.memory_seconds is None and partly.link_seconds is None
  assert partly.step_seconds == 3.0 and partly.bottleneck == "compute"


def test_a_device_that_sends_nothing_is_not_bound_by_links() -> None:
  bound = roofline.roofline(roofline.Work(100.0, 0.0, 0.0, 0.0), DEVICE, 1)
  assert bound.link_seconds == 0.0
  assert bound.bottleneck == "compute"
