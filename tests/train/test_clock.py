# SPDX-License-Identifier: Apache-2.0
"""Seconds of training, by hand, over interruptions and devices."""

import json

import pytest

from tfjax import config as config_lib
from tfjax.train import clock


@pytest.fixture(name="now")
def _now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  now = [100.0]
  monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
  return now


def test_device_seconds_add_up_over_parts(now: list[float]) -> None:
  one = clock.Clock(8, "TPU v4")
  with one:
    now[0] += 10
    one.add(600)
  now[0] += 1000  # an evaluation
  assert (one.seconds(), one.device_seconds()) == (10, 80)
  assert (one.rate(), one.device_rate()) == (60, 7.5)
  two = clock.Clock(2, "TPU v4", json.loads(json.dumps(one.counters())))
  assert (two.seconds(), two.device_seconds()) == (10, 80)
  with two:
    now[0] += 20
    assert two.device_seconds() == 80 + 40
    two.add(300)
    assert two.rate_since_last() == 15
  assert (two.seconds(), two.device_seconds()) == (30, 120)
  assert (two.rate(), two.device_rate()) == (30, 7.5)


def test_devices_of_two_kinds_have_no_common_rate(now: list[float]) -> None:
  one = clock.Clock(1, "TPU v4")
  with one:
    now[0] += 10
    one.add(100)
  two = clock.Clock(1, "TPU v5p", one.counters())
  assert two.device_kinds == ["TPU v4", "TPU v5p"]
  assert (two.rate(), two.device_rate()) == (10, None)


def test_nothing_done_has_no_rate() -> None:
  one = clock.Clock(1, "cpu")
  assert (one.rate(), one.device_rate(), one.rate_since_last()) == (
      None, None, None)


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
