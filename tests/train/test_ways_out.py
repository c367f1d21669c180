# SPDX-License-Identifier: Apache-2.0
"""Ways out of too little memory: they fit, they go together, cheapest first."""

import dataclasses
from typing import Any

import pytest

from tfjax import config as config_lib
from tfjax.cost import estimates
from tfjax.cost import memory
from tfjax.train import remedies
from tfjax.train import ways_out

GIB = 2**30


def config(**changes: Any) -> config_lib.ExperimentConfig:
  values = {
      "model.d_model": 1024, "model.num_layers": 12, "model.num_heads": 16,
      "model.context_length": 1024, "model.vocab_size": 4096,
      "model.remat": "none", "duration.steps": 10, "train.batch_size": 64,
      "train.dtype": "bfloat16", "cost.hardware": "a100-40gb"}
  made = config_lib.default()
  config_lib.override(made, values | {
      key.replace("__", "."): value for key, value in changes.items()})
  return config_lib.resolve(made)


def machine(asked: config_lib.ExperimentConfig, devices: int,
            available: float | None = None) -> estimates.Machine:
  found = estimates.machine_of(asked, devices)
  return found if available is None else dataclasses.replace(
      found, available_bytes=int(available))


def needed(asked: config_lib.ExperimentConfig, devices: int) -> int:
  return memory.estimate(
      asked, estimates.mesh_shape(asked, devices), "gpu").total


def test_every_way_fits_and_none_is_idle() -> None:
  asked = config()
  place = machine(asked, 8, 0.3 * needed(asked, 8))
  found = ways_out.find(asked, place)
  assert len(found) == 3
  for way in found:
    changed = remedies.changed(asked, way.changes)
    hardware = way.hardware and remedies.changed(
        changed, {"cost.hardware": way.hardware})
    there = machine(hardware, 8) if hardware else place
    assert way.memory_bytes == needed(changed, way.num_devices or 8)
    assert way.memory_bytes <= 0.9 * way.available_bytes
    assert hardware is None or (
        way.available_bytes == there.available_bytes > place.available_bytes)
    for key, value in way.changes.items():
      group, name = key.split(".")
      assert getattr(getattr(asked, group), name) != value
  # The same machine first, with what costs no FLOPs before what does.
  first, second, _ = found
  assert first.hardware is first.num_devices is None
  assert first.extra_flops <= second.extra_flops


def test_recomputing_costs_what_it_costs() -> None:
  asked = config(train__batch_size=1, model__context_length=4096,
                 model__scan_layers=True)
  place = machine(asked, 1, needed(asked, 1) - 1)
  found = {tuple(way.changes): way for way in ways_out.find(asked, place, 9)}
  way = found["model.remat",]
  assert way.changes == {"model.remat": "dots"} or (
      way.changes == {"model.remat": "full"})
  assert 0 < way.extra_flops < 1 / 3


def test_a_width_that_does_not_divide_is_cut_as_far_as_it_does() -> None:
  # 5140 = 4 x 5 x 257.
  asked = config(model__d_model=5140, model__num_heads=40, model__head_dim=128)
  found = ways_out.find(asked, machine(asked, 64))
  assert found and found[0].changes["mesh.fsdp"] == 4


def test_this_machine_is_not_exchanged() -> None:
  asked = config()
  place = dataclasses.replace(
      machine(asked, 1, GIB), is_assumed=False)
  assert all(way.hardware is way.num_devices is None
             for way in ways_out.find(asked, place))


def test_nothing_may_do() -> None:
  asked = config()
  place = dataclasses.replace(machine(asked, 8, 1000), is_assumed=False)
  assert ways_out.find(asked, place) == []


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_than_was_asked_for(most: int) -> None:
  asked = config()
  place = machine(asked, 8, 0.3 * needed(asked, 8))
  assert len(ways_out.find(asked, place, most)) == most
