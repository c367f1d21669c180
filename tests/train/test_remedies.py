# SPDX-License-Identifier: Apache-2.0
"""What is tried, in which order and for how long, with a compiler of known
answers."""

from typing import Any

import pytest

from tfjax import config as config_lib
from tfjax.train import ahead
from tfjax.train import remedies

AVAILABLE = 1000


def outcome(needed: int | None, available: int = AVAILABLE) -> ahead.Outcome:
  fits = needed is not None and needed <= available
  memory = ahead.Memory(0, 0, 0, 0, 0, needed, 0) if fits else None
  return ahead.Outcome(fits, needed, available, memory, None, None, 0, 0.0)


def test_changes_are_made_in_a_complete_config(make_config) -> None:
  config = make_config()
  changed = remedies.changed(config, {"model.remat": "full", "mesh.fsdp": 4})
  assert (changed.model.remat, changed.mesh.fsdp) == ("full", 4)
  assert config.model.remat == "none"
  assert changed.model.d_model == config.model.d_model


def keys(config: config_lib.ExperimentConfig, devices: int,
         excess: float = 1e9) -> list[dict[str, Any]]:
  return list(remedies.candidates(config, devices, lambda: excess))


def test_candidates_build_on_each_other_and_keep_the_batch(
    make_config) -> None:
  config = make_config({"runtime.num_devices": None, "model.size": "98k",
                        "train.batch_size": 16})
  found = keys(config, 8)
  assert found[:4] == [
      {"mesh.data": 1, "mesh.fsdp": 8},
      {"mesh.data": 1, "mesh.fsdp": 8, "model.remat": "dots"},
      {"mesh.data": 1, "mesh.fsdp": 8, "model.remat": "full"},
      {"mesh.data": 1, "mesh.fsdp": 8, "model.remat": "full",
       "model.scan_layers": True}]
  assert found[4]["train.accumulation_steps"] == 2  # one sequence a device
  assert [(c["mesh.fsdp"], c["mesh.tensor"]) for c in found[5:]] == [
      (4, 2), (2, 4), (1, 8)]


def test_what_is_set_is_not_tried(make_config) -> None:
  config = make_config({
      "runtime.num_devices": None, "mesh.fsdp": 8, "model.remat": "full",
      "model.scan_layers": True, "model.size": "98k", "train.batch_size": 8})
  assert keys(config, 8)[0] == {
      "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.mark.parametrize("excess, parts", [
    (1.5, [2, 4, 8]), (3.0, [4, 8]), (100.0, [8])])
def test_parts_are_as_many_as_the_excess_asks_for(
    make_config, excess: float, parts: list[int]) -> None:
  config = make_config({"runtime.num_devices": None, "mesh.fsdp": 1,
                        "train.batch_size": 8})
  found = [c["train.accumulation_steps"] for c in keys(config, 1, excess)
           if set(c) & {"train.accumulation_steps"} and "mesh.tensor" not in c]
  assert found == parts


def test_the_search_ends_with_the_first_that_fits(make_config) -> None:
  tried = []
  def compile_(config):
    return outcome(500 if config.model.remat == "dots" else 2000)
  config = make_config({"runtime.num_devices": None})
  found = remedies.search(config, 8, outcome(4000), compile_, lambda _: 10,
                          tried.append)
  assert found.changes == {"mesh.data": 1, "mesh.fsdp": 8,
                           "model.remat": "dots"}
  assert [one.fits for one in tried] == [False, True]


def test_parts_follow_from_the_candidate_before(make_config) -> None:
  """64 times too much at first, 3 times without what remat saves."""
  tried = []
  def compile_(config):
    return outcome(3000 // config.train.accumulation_steps)
  config = make_config({"runtime.num_devices": None, "mesh.data": 1,
                        "train.batch_size": 64})
  remedies.search(config, 1, outcome(64000), compile_, lambda _: 10,
                  tried.append)
  assert tried[-1].fits
  assert tried[-1].changes["train.accumulation_steps"] == 4


def test_hopeless_candidates_are_not_compiled(make_config) -> None:
  tried = []
  def compile_(config):
    raise AssertionError("compiled")
  found = remedies.search(
      make_config({"runtime.num_devices": None}), 8, outcome(4000), compile_,
      lambda _: 2 * 2**30, tried.append)
  assert found is None
  assert tried and all(one.outcome is None for one in tried)
  assert "alone take 2 GiB" in tried[0].reason


def test_a_mesh_that_does_not_do_is_passed_over(make_config) -> None:
  tried = []
  def state_of(config):
    if config.model.remat == "none":
      raise config_lib.ConfigError("mesh", "does not divide")
    return 1
  found = remedies.search(
      make_config({"runtime.num_devices": None}), 8, outcome(4000),
      lambda _: outcome(1), state_of, tried.append)
  assert "does not divide" in tried[0].reason
  assert found is tried[1]


def test_less_recomputation(make_config) -> None:
  lighter = [remedies.lighter(make_config({"model.remat": remat}))
             for remat in ("full", "dots", "none")]
  assert lighter == [{"model.remat": "dots"}, {"model.remat": "none"}, None]


@pytest.mark.parametrize("start", [8, 64, 4096])
def test_the_largest_batch_is_found_from_either_side(
    make_config, start: int) -> None:
  """200 bytes and 4 a sequence: 195 to 200 sequences take 98% to 100%; in
  steps of 8 the largest that fits is 200."""
  compiles = []
  def compile_(config):
    compiles.append(config.train.batch_size)
    return outcome(200 + 4 * config.train.batch_size)
  found = remedies.largest_batch(
      make_config({"train.batch_size": start}), 8, outcome(200 + 4 * start),
      compile_, lambda _: None, most_compiles=5)
  assert found == {"fits": 200, "does_not": 208}
  assert len(compiles) <= 5
  assert all(batch % 8 == 0 for batch in compiles)


def test_the_search_for_a_batch_is_bounded(make_config) -> None:
  compiles = []
  def compile_(config):
    compiles.append(config.train.batch_size)
    return outcome(10 + len(compiles))  # hardly grows: never near the end
  found = remedies.largest_batch(
      make_config({"train.batch_size": 8}), 8, outcome(10), compile_,
      lambda _: None, most_compiles=2)
  assert len(compiles) == 2
  assert found == {"fits": max(compiles), "does_not": None}


def test_what_is_nearly_full_is_left_alone(make_config) -> None:
  def compile_(config):
    raise AssertionError("compiled")
  found = remedies.largest_batch(
      make_config({"train.batch_size": 800}), 8, outcome(970), compile_,
      lambda _: None)
  assert found == {"fits": 800, "does_not": None}


def test_no_batch_fits(make_config) -> None:
  found = remedies.largest_batch(
      make_config({"train.batch_size": 8}), 8, outcome(5000),
      lambda _: outcome(5000), lambda _: None)
  assert found == {"fits": None, "does_not": 8}
