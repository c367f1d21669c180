# SPDX-License-Identifier: Apache-2.0
"""Seconds of a run, by hand, over phases, interruptions and devices."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tfjax import config as config_lib
from tfjax.train import clock


@pytest.fixture(name="now")
def _now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  now = [100.0]
  monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
  return now


def saved(one: clock.Clock) -> dict[str, Any]:
  return json.loads(json.dumps(one.counters()))


def test_phases_follow_without_a_gap(now: list[float]) -> None:
  one = clock.Clock()
  now[0] += 1
  one.go_on(2, "TPU v4")
  now[0] += 2
  for phase, seconds in (("compile", 4), ("input", 8), ("step", 16),
                         ("evaluation", 32), ("checkpoint", 64),
                         ("input", 128), ("step", 256), ("other", 512)):
    one.enter(phase)
    now[0] += seconds
  assert one.phase_seconds() == dict(
      startup=3, compile=4, input=136, step=272, evaluation=32, checkpoint=64,
      other=512)
  assert clock.wall_seconds(one.counters()) == 1023
  assert one.occupied_device_seconds() == {"TPU v4": 2046}
  assert (one.seconds(), one.device_seconds()) == (408, 816)
  assert clock.goodput(one.counters()) == 272 / 1023


def test_what_a_phase_was_can_turn_out_at_its_end(now: list[float]) -> None:
  one = clock.Clock()
  one.enter("input")
  now[0] += 5  # hidden behind a step on the devices
  one.enter("step", was="step")
  now[0] += 2
  one.enter("input", was=None)
  assert one.phase_seconds() == clock.NOTHING["phase_seconds"] | {"step": 7}


def test_what_is_compiled_in_another_phase_is_compilation(
    now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
  compiled = [50.0]
  monkeypatch.setattr(clock, "_compiled_seconds", lambda: compiled[0])
  one = clock.Clock()
  one.enter("evaluation")
  now[0] += 9
  compiled[0] += 6
  assert one.phase_seconds()["compile"] == 6
  assert one.phase_seconds()["evaluation"] == 3
  now[0] += 1
  compiled[0] += 4  # by another count of time
  assert one.phase_seconds()["compile"] == 7
  assert clock.wall_seconds(one.counters()) == 10


def test_jax_tells_what_it_compiles() -> None:
  before = clock._compiled_seconds()
  jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((7, 7))).block_until_ready()
  after = clock._compiled_seconds()
  assert after > before
  jnp.ones((7, 7)).block_until_ready()
  assert clock._compiled_seconds() == after


def test_device_seconds_add_up_over_parts(now: list[float]) -> None:
  one = clock.Clock()
  one.go_on(8, "TPU v4")
  now[0] += 3
  one.enter("step")
  now[0] += 10
  one.add(600)
  one.enter("evaluation")
  now[0] += 1000
  assert (one.seconds(), one.device_seconds()) == (10, 80)
  assert (one.rate(), one.device_rate()) == (60, 7.5)
  assert one.occupied_device_seconds() == {"TPU v4": 8 * 1013}
  counters = saved(one)
  two = clock.Clock()
  now[0] += 7
  two.go_on(2, "TPU v4", counters)
  assert (two.seconds(), two.device_seconds()) == (10, 80)
  two.enter("step")
  now[0] += 20
  assert two.device_seconds() == 80 + 40
  two.add(300)
  assert two.rates_since_last() == (15, 15)
  assert (two.seconds(), two.device_seconds()) == (30, 120)
  assert (two.rate(), two.device_rate()) == (30, 7.5)
  assert clock.wall_seconds(two.counters()) == 1013 + 27
  assert two.occupied_device_seconds() == {"TPU v4": 8 * 1013 + 2 * 27}
  assert counters["phase_seconds"]["step"] == 10  # given, and not changed


def test_devices_of_two_kinds_have_no_common_rate(now: list[float]) -> None:
  one = clock.Clock()
  one.go_on(1, "TPU v4")
  one.enter("step")
  now[0] += 10
  one.add(100)
  two = clock.Clock()
  two.go_on(3, "TPU v5p", one.counters())
  now[0] += 4
  assert two.occupied_device_seconds() == {"TPU v4": 10, "TPU v5p": 12}
  assert (two.rate(), two.device_rate()) == (10, None)


def test_tokens_a_second_of_a_share_are_by_the_time_on_the_wall(
    now: list[float]) -> None:
  one = clock.Clock()
  one.share(1 / 4)
  one.go_on(2, "cpu")
  now[0] += 100  # no training
  one.enter("step")
  now[0] += 8
  one.add(160)
  assert one.rates_since_last() == (160 / 8, 160 / 2)
  one.share(1 / 2)
  now[0] += 4
  one.add(20)
  assert one.rates_since_last() == (20 / 4, 20 / 2)
  assert (one.seconds(), one.rate(), one.device_rate()) == (
      4, 180 / 12, 180 / 4 / 2)
  counters = saved(one)
  alone = clock.Clock()
  alone.go_on(2, "cpu", counters)
  alone.enter("step")
  now[0] += 8
  alone.add(20)
  assert alone.rates_since_last() == (20 / 8, 20 / 8)
  assert (alone.rate(), alone.device_rate()) == (200 / 20, 200 / 12 / 2)
  # A checkpoint of before this was counted.
  del counters["others_seconds"]
  old = clock.Clock()
  old.go_on(2, "cpu", counters)
  assert old.rate() == 180 / 4


def test_what_a_rollback_undoes_is_spent_and_not_kept(
    now: list[float]) -> None:
  one = clock.Clock()
  one.enter("step")
  now[0] += 10
  first = saved(one)
  now[0] += 5
  one.undo(first)
  one.enter("checkpoint")
  now[0] += 5
  assert one.phase_seconds()["step"] == 15
  assert clock.wall_seconds(one.counters()) == 20
  assert clock.goodput(one.counters()) == 10 / 20
  one.enter("step")
  now[0] += 4
  second = saved(one)  # kept: 14 of 19
  now[0] += 2
  one.undo(second)
  assert clock.goodput(one.counters()) == 14 / 26
  two = clock.Clock()
  two.go_on(1, "cpu", saved(one))
  assert clock.goodput(two.counters()) == 14 / 26
  two.undo(first)
  assert clock.goodput(two.counters()) == 10 / 26
  two.undo(None)  # back to the start
  assert clock.goodput(two.counters()) == 0


def test_nothing_done_has_no_rate(now: list[float]) -> None:
  one = clock.Clock()
  one.go_on(1, "cpu")
  assert (one.rate(), one.device_rate(), *one.rates_since_last(),
          clock.goodput(one.counters())) == (None,) * 5
  assert now == [100.0]


def test_a_save_is_due_once(now: list[float]) -> None:
  timer = clock.SaveTimer(config_lib.CheckpointConfig(every_seconds=60.0))
  now[0] += 59
  assert not timer.due()
  now[0] += 1
  assert timer.due() and not timer.due()
  now[0] += 59
  timer.reset()
  now[0] += 59
  assert not timer.due()
  never = clock.SaveTimer(config_lib.CheckpointConfig(every_seconds=None))
  now[0] += 1e9
  assert not never.due()
