# SPDX-License-Identifier: Apache-2.0
"""What a run has taken, by hand: time, energy, money, over all that ends it.

Most runs here have a clock of their own: each thing that they do moves it by
seconds that are given, so that every number of the record can be added up.
"""

import dataclasses
import json
import math
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, Callable

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax import train
from tfjax.cost import card
from tfjax.cost import energy
from tfjax.cost import hardware
from tfjax.data import store as store_lib
from tfjax.train import checkpoints
from tfjax.train import clock
from tfjax.train import evaluation
from tfjax.train import records
from tfjax.train import sharding
from tfjax.train import spent
from tfjax.train import step as step_lib

# Of a second of a device: 360 W are 1e-4 kWh, 36 USD an hour are 1e-2 USD.
HARDWARE = """
[chip]
label = "a chip"
device_kinds = ["cpu"]
devices_per_chip = 1
tdp_watts = 360
price_usd_per_hour = 36
price_date = 2025-01-31
[chip.peak_flops_per_second]
float32 = 1e9
"""


class Killed(BaseException):
  """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(name="now")
def _now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Seconds: the data 3, the compiler 7, a batch 1, a step 2, an evaluation
  10, a save 5."""
  now = [1000.0]
  monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(clock, "_compiled_seconds", lambda: 0.0)

  def slow(where: Any, name: str, seconds: float) -> None:
    function = getattr(where, name)

    def call(*args: Any, **kwargs: Any) -> Any:
      now[0] += seconds
      return function(*args, **kwargs)
    monkeypatch.setattr(where, name, call)
  slow(store_lib, "build", 3)
  slow(step_lib, "put", 1)
  slow(checkpoints.Checkpoints, "save", 5)
  compiled_train = step_lib.Steps.compiled_train

  def compiled(self, batch: Any) -> Callable[..., Any]:
    now[0] += 7
    function = compiled_train(self, batch)

    def step(*args: Any) -> Any:
      now[0] += 2
      return jax.block_until_ready(function(*args))
    return step
  monkeypatch.setattr(step_lib.Steps, "compiled_train", compiled)

  def evaluate(*_) -> evaluation.Evaluation:
    now[0] += 10
    return evaluation.Evaluation(1.0, 0.1, 2.0, 256)
  monkeypatch.setattr(evaluation, "evaluate", evaluate)
  return now


@pytest.fixture(name="meter")
def _meter(now: list[float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Counters that draw so many kWh a second; None: there are none."""
  drawn = [None]

  class Meter:
    """Of `energy.Meter`, what is used."""

    def __init__(self, mode: str, _):
      assert mode == "auto"
      self.source = None if drawn[0] is None else "measured: a counter"
      self._begin = now[0]

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def kwh(self, fresh: bool = False) -> float | None:
      del fresh  # it always is
      if drawn[0] is None:
        return None
      return (now[0] - self._begin) * drawn[0]
  monkeypatch.setattr(energy, "Meter", Meter)
  return drawn


@pytest.fixture(name="costly")
def _costly(make_config, tmp_path: pathlib.Path
            ) -> Callable[..., config_lib.ExperimentConfig]:
  """make_config on `HARDWARE`, 12 steps, a checkpoint every 4."""
  path = tmp_path / "hardware.toml"
  path.write_text(HARDWARE, "utf-8")

  def make(changes: dict[str, Any] | None = None):
    return make_config({
        "duration.steps": 12, "checkpoint.every_steps": 4,
        "checkpoint.every_seconds": None, "cost.hardware_file": str(path),
        "cost.kg_co2e_per_kwh": 0.5, "cost.pue": 1.2} | (changes or {}))
  return make


def phases(record: train.RunRecord | dict[str, Any]) -> dict[str, float]:
  values = record if isinstance(record, dict) else dataclasses.asdict(record)
  return {name: values[f"{name}_seconds"] for name in (
      "startup", "compile", "input", "step", "evaluation", "checkpoint",
      "lost", "wall")}


def raise_at(step: int, error: BaseException
             ) -> Callable[[dict[str, Any]], None]:
  """Ends training when a row is written, one step later."""
  def on_row(row: dict[str, Any]) -> None:
    if row["step"] == step:
      raise error
  return on_row


# --- Time --------------------------------------------------------------------


def test_every_second_of_a_run_is_somewhere(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  record = train.run(costly({"runtime.num_devices": 2}), tmp_path)
  # Twelve steps, three saves; the batch for the compiler is its time.
  assert phases(record) == dict(
      startup=3, compile=8, input=12, step=24, evaluation=10, checkpoint=15,
      lost=0, wall=72)
  assert now[0] == 1072
  assert record.goodput == 24 / 72
  assert (record.device_seconds, record.occupied_device_seconds) == (72, 144)
  assert record.tokens_per_second == 12 * 128 / 36
  flops = 46_176 * 12 * 128  # see the budget's test
  assert record.mfu == pytest.approx(flops / (72 * 1e9), rel=1e-12)
  assert record.peak_flops_per_second == 1e9 and "a chip" in record.peak_source
  rows = records.read_metrics(tmp_path / record.run_id / "metrics.jsonl")
  first, second, last = rows[0], rows[1], rows[-1]
  # Read one step late: after two steps, of 3 s each.
  assert (first["seconds"], first["device_seconds"]) == (6, 2 * (11 + 6))
  assert first["mfu"] == pytest.approx(46_176 * 128 / 6 / 2e9)
  assert second["mfu"] == pytest.approx(46_176 * 128 / 3 / 2e9)
  assert (last["kind"], last["device_seconds"]) == ("evaluation", 2 * 67)


def test_input_that_the_devices_do_not_wait_for_is_hidden(
    now: list[float], costly, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """Where the step before is still on its way when the next batch is there."""
  compiled_train = step_lib.Steps.compiled_train

  class Running:
    """A metric that is not there until it is asked for."""

    def __init__(self, value: Any):
      self._value = value

    def is_ready(self) -> bool:
      return False

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
      return np.asarray(self._value)

  def compiled(self, batch: Any) -> Callable[..., Any]:
    function = compiled_train(self, batch)

    def step(*args: Any) -> Any:
      state, metrics = function(*args)
      return state, metrics | dict(loss=Running(metrics["loss"]))
    return step
  monkeypatch.setattr(step_lib.Steps, "compiled_train", compiled)
  record = train.run(costly({"checkpoint.every_steps": None}), tmp_path)
  # Before the first step there is none to wait for.
  assert (record.input_seconds, record.step_seconds) == (1, 24 + 11)
  assert record.device_seconds == 36 and now[0] == 1000 + record.wall_seconds


def test_parts_on_different_devices_add_up(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  def stop(row: dict[str, Any]) -> None:
    if row["step"] == 5:
      signal.raise_signal(signal.SIGTERM)
  changes = {"checkpoint.every_steps": None}
  one = train.run(costly(changes), tmp_path, on_row=stop)
  assert (one.steps, one.status) == (7, "interrupted")
  assert phases(one) == dict(
      startup=3, compile=8, input=7, step=14, evaluation=0, checkpoint=5,
      lost=0, wall=37)
  now[0] += 10_000  # nobody trains
  two = train.run(costly(changes | {"runtime.num_devices": 2}), tmp_path)
  assert phases(two) == dict(
      startup=6, compile=16, input=12, step=24, evaluation=10, checkpoint=10,
      lost=0, wall=78)
  assert two.goodput == 24 / 78
  assert two.occupied_device_seconds == 37 + 2 * 41
  assert two.device_seconds == 21 + 2 * 15
  assert two.price_usd == pytest.approx(1.19)


def test_what_kills_have_lost_is_paid_for(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  config, begin = costly({"train.log_every_steps": 1}), now[0]
  with pytest.raises(Killed):
    train.run(config, tmp_path, on_row=raise_at(6, Killed()))
  # 11 until the first step; the checkpoint of step 4 is at 23, row 6 at 37.
  assert now[0] - begin == 37
  with pytest.raises(Killed):  # restored, 3 s later; killed with no row
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(step_lib.Steps, "compiled_train", lambda *_: (
          _ for _ in ()).throw(Killed()))
      train.run(config, tmp_path)
  # The rows beyond the checkpoint are cut by now, and what they told is kept.
  record = train.run(config, tmp_path)
  # The batch for the compiler was the second part's, and nobody has told.
  assert phases(record) == dict(
      startup=9, compile=16, input=12, step=24, evaluation=10, checkpoint=10,
      lost=14, wall=95)
  assert now[0] - begin == 95 + 1
  assert record.goodput == 24 / 95
  assert record.occupied_device_seconds == 95
  assert (record.device_seconds, record.tokens_seen) == (36, 12 * 128)
  assert record.tokens_per_second == 12 * 128 / 36  # done again, not counted
  assert record.price_usd == pytest.approx(0.95)
  assert record.energy_kwh == pytest.approx(0.0095)
  rows = records.read_metrics(tmp_path / record.run_id / "metrics.jsonl")
  taken = [row["device_seconds"] for row in rows]
  assert taken == sorted(taken) and rows[-1]["energy_kwh"] == pytest.approx(
      0.0090)


def test_a_kill_before_the_first_checkpoint_is_paid_for_too(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  config = costly()
  with pytest.raises(Killed):
    train.run(config, tmp_path, on_row=raise_at(2, Killed()))
  assert now[0] == 1000 + 11 + 9
  record = train.run(config, tmp_path)
  assert (record.resumes, record.lost_seconds) == (0, 9)
  assert record.wall_seconds == 20 + 72 == now[0] - 1000
  assert sum(phases(record).values()) == 2 * record.wall_seconds


def test_what_others_took_of_lost_steps_is_in_no_rate() -> None:
  saved = spent.NOTHING | dict(others_seconds=3.0)
  last = spent.NOTHING | dict(others_seconds=7.0, lost_seconds=5.0)
  noted = dict(step=None, counters=last, row=dict(
      device_seconds=0.0, energy_kwh=None))
  assert spent.resumed(saved, noted, 4)["others_seconds"] == 3
  # Checkpoints of before this was counted.
  assert spent.resumed(spent.NOTHING, noted, 4)["others_seconds"] == 0


@pytest.fixture(name="spoilt")
def _spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
  """Step 5 is bad."""
  read = objectives.TrainingBatches.__getitem__

  def spoilt(self, index: int):
    batch = read(self, index)
    if index != 4:
      return batch
    return dataclasses.replace(
        batch, weights=np.full_like(batch.weights, np.nan))
  monkeypatch.setattr(objectives.TrainingBatches, "__getitem__", spoilt)


@pytest.mark.usefixtures("spoilt")
def test_steps_that_a_rollback_undoes_are_spent_and_not_good(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  record = train.run(costly({"recovery.action": "rollback"}), tmp_path)
  assert (record.status, record.rollbacks) == ("complete", 1)
  # Step 5 is found bad after step 6: two more than the twelve.
  assert phases(record) == dict(
      startup=3, compile=8, input=14, step=28, evaluation=10, checkpoint=15,
      lost=0, wall=78)
  assert record.goodput == 24 / 78
  assert now[0] == 1078


@pytest.mark.usefixtures("spoilt")
def test_a_kill_after_a_rollback_forgets_nothing(
    now: list[float], costly, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """The rows of the steps that it has undone are gone."""
  config = costly({"recovery.action": "rollback", "train.log_every_steps": 1})
  put = step_lib.put

  def kill(*args: Any) -> Any:
    if list(tmp_path.rglob("metrics.jsonl")) and any(
        row["kind"] == "rollback" for row in records.read_metrics(
            next(tmp_path.rglob("metrics.jsonl")))):
      raise Killed()
    return put(*args)
  with monkeypatch.context() as patch:
    patch.setattr(step_lib, "put", kill)
    with pytest.raises(Killed):
      train.run(config, tmp_path)
  assert now[0] == 1000 + 11 + 12 + 5 + 6
  record = train.run(config, tmp_path)
  # Step 5 was bad twice, each time found after step 6.
  assert phases(record) == dict(
      startup=6, compile=16, input=16, step=32, evaluation=10, checkpoint=15,
      lost=0, wall=95)
  assert record.goodput == 24 / 95
  assert now[0] == 1000 + 95


def test_the_phases_of_a_real_run_are_its_time(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config({"duration.steps": 60, "evaluation.every_steps": 20,
                        "checkpoint.every_steps": 20})
  write, ends = records.write_result, []

  def write_result(*args: Any) -> None:
    ends.append(time.perf_counter())  # a busy disk takes its time from here
    write(*args)
  monkeypatch.setattr(records, "write_result", write_result)
  begin = time.perf_counter()
  # Mostly asleep: a moment that a busy machine takes between two clocks is
  # small beside 2% of it.
  record = train.run(config, tmp_path, on_row=lambda row: time.sleep(0.1))
  own = ends[0] - begin
  found = phases(record)
  wall = found.pop("wall")
  assert wall == pytest.approx(own, rel=0.02)
  assert sum(found.values()) == pytest.approx(own, rel=0.02)
  assert all(value > 0 for name, value in found.items() if name != "lost")
  assert record.occupied_device_seconds == pytest.approx(wall)


# --- Energy and money --------------------------------------------------------


def test_what_counters_measure_is_kept_over_a_kill(
    now: list[float], meter: list[float], costly,
    tmp_path: pathlib.Path) -> None:
  meter[0] = 0.001
  config = costly()
  with pytest.raises(Killed):
    train.run(config, tmp_path, on_row=raise_at(6, Killed()))
  record = train.run(config, tmp_path)
  assert (record.lost_seconds, record.wall_seconds) == (14, 92)
  assert record.energy_kwh == pytest.approx(0.092)
  assert record.energy_source == "measured: a counter"
  assert record.co2e_kg == pytest.approx(0.092 * 1.2 * 0.5)
  rows = records.read_metrics(tmp_path / record.run_id / "metrics.jsonl")
  for row in rows:
    assert row["energy_kwh"] == pytest.approx(row["device_seconds"] / 1000)
  assert now[0] == 1000 + 92


def test_the_last_second_is_measured_too(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """A meter that is asked again within a second may give what it has read."""
  class Meter(energy.Meter):
    """Two readings of a counter."""

    def __enter__(self):
      self.source = "measured: a counter"
      return self

    def kwh(self, fresh: bool = False) -> float:
      return 0.5 if fresh else 0.25
  monkeypatch.setattr(energy, "Meter", Meter)
  assert train.run(make_config(), tmp_path).energy_kwh == 0.5


@pytest.mark.parametrize("measured_first", [True, False])
def test_what_was_measured_and_what_was_not_are_told_apart(
    measured_first: bool, now: list[float], meter: list[float], costly,
    tmp_path: pathlib.Path) -> None:
  config = costly()
  meter[0] = 0.001 if measured_first else None
  with pytest.raises(Killed):
    train.run(config, tmp_path, on_row=raise_at(6, Killed()))
  meter[0] = None if measured_first else 0.001
  record = train.run(config, tmp_path)
  # 37 s in the first part, 55 in the second; else 1e-4 kWh by TDP.
  first, second = ((0.037, 0.0055) if measured_first else (0.0037, 0.055))
  assert record.energy_kwh == pytest.approx(first + second)
  kwh, hours = (("0.037", 55) if measured_first else ("0.055", 37))
  assert record.energy_source.startswith(
      f"{kwh} kWh measured: a counter; {hours / 3600:.4g} device-hours on cpu "
      "estimated: ")
  assert record.co2e_kg == pytest.approx((first + second) * 0.6)
  rows = records.read_metrics(tmp_path / record.run_id / "metrics.jsonl")
  assert rows[-1]["energy_kwh"] == pytest.approx(
      record.energy_kwh - 5 * (1e-4 if measured_first else 1e-3))
  assert now[0] == 1000 + 92


COUNTERS = spent.NOTHING | dict(
    occupied_device_seconds={"old": 3600.0, "new": 7200.0},
    unmeasured_device_seconds={"old": 3600.0, "new": 7200.0},
    device_kind="new")
OLD = hardware.Hardware("old", "an old chip", devices_per_chip=1,
                        tdp_watts=100.0, price_usd_per_hour=2.0)
NEW = hardware.Hardware("new", "a new chip", devices_per_chip=2,
                        tdp_watts=500.0, price_usd_per_hour=8.0)


def test_devices_of_two_kinds_each_have_their_price() -> None:
  cost = config_lib.CostConfig(price_usd_per_chip_hour=5.0, pue=1.1,
                               kg_co2e_per_kwh=0.4)
  found = spent.footprint(COUNTERS, {"old": OLD, "new": NEW}, cost, None)
  assert found.device_hours == 3
  # An hour of a chip at its own price, and one at the config's.
  assert found.price_usd == pytest.approx(2 + 5)
  assert "old: " in found.price_source and "new: " in found.price_source
  assert found.energy_kwh == pytest.approx(0.1 + 0.5)
  assert found.co2e_kg == pytest.approx(0.6 * 1.1 * 0.4)


def test_one_unknown_part_makes_the_sum_unknown_and_says_so() -> None:
  cost = config_lib.CostConfig(kg_co2e_per_kwh=0.4)
  found = spent.footprint(COUNTERS, {"old": None, "new": NEW}, cost, None)
  assert (found.price_usd, found.energy_kwh, found.co2e_kg) == (
      None, None, None)
  for text in (found.price_source, found.energy_source):
    assert "hardware is not known" in text
  assert "2 device-hours on new estimated" in found.energy_source
  # Measured where its power is not known, and the other way round.
  measured = COUNTERS | dict(
      measured_kwh=0.7, measured_sources=["measured: a counter"],
      unmeasured_device_seconds={"new": 7200.0})
  found = spent.footprint(measured, {"old": None, "new": NEW}, cost, None)
  assert found.energy_kwh == pytest.approx(0.7 + 0.5)
  assert found.price_usd is None
  found = spent.footprint(measured, {"old": OLD, "new": None}, cost, None)
  assert (found.energy_kwh, found.co2e_kg) == (None, None)
  assert "0.7 kWh measured: a counter" in found.energy_source


@pytest.mark.parametrize("kwh, usable, total", [
    ([0.25, 0.5], [8, 8], 0.75), ([0.25, math.nan], [8, 8], None),
    ([0.25, 0.5], [16, 8], None)])
def test_processes_of_one_host_must_have_shares_of_their_own(
    kwh: list[float], usable: list[int], total: float | None,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(spent.cluster, "barrier", lambda: None)
  monkeypatch.setattr(spent.os, "cpu_count", lambda: 16)
  monkeypatch.setattr(spent.tuning, "available_cores", lambda: usable[0])

  def gather(words: np.ndarray) -> np.ndarray:
    own = words.view(np.float64)
    assert own[0] == kwh[0] and words.dtype == np.uint32
    other = np.array([kwh[1], 16, usable[1], own[3]])
    return np.stack([words, other.view(np.uint32)])
  monkeypatch.setattr(spent.multihost_utils, "process_allgather", gather)
  assert spent._over_processes(kwh[0]) == total


def test_rows_of_several_processes_do_not_guess_at_the_others(
    now: list[float], meter: list[float], costly, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  meter[0], config = 0.001, costly()
  with energy.Meter("auto", None) as one:
    these = spent.Spent(config, sharding.make_mesh(config), tmp_path,
                        clock.Clock(), one)
    assert these.columns()["energy_kwh"] == 0
    monkeypatch.setattr(spent.jax, "process_count", lambda: 2)
    monkeypatch.setattr(spent, "_over_processes", lambda kwh: (
        None if kwh is None else 2 * kwh))
    monkeypatch.setattr(spent.claim, "shared", lambda action: action())
    these.start(None, 0)
    now[0] += 100
    assert these.columns() == dict(device_seconds=100, energy_kwh=None)
    these.gather()
    counters = these.counters()
    assert counters["measured_kwh"] == pytest.approx(0.2)
    assert "each of 2 processes" in counters["measured_sources"][0]
    # What another process has measured is gone with it.
    now[0] += 100
    failed = these.fail()
    assert failed["energy_kwh"] == pytest.approx(200 * 1e-4)
    assert "estimated" in failed["energy_source"]
    assert "was not told" in failed["energy_source"]


# --- What is wrong, and what fails -------------------------------------------


@pytest.mark.parametrize("key, value", [
    ("cost.hardware", "h10"), ("cost.region", "atlantis"),
    ("cost.hardware_file", "nowhere.toml"), ("cost.kg_co2e_per_kwh", 90.0)])
def test_costs_that_cannot_be_told_stop_a_run_before_any_compute(
    key: str, value: Any, make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(store_lib, "build", lambda _: pytest.fail("built"))
  with pytest.raises(config_lib.ConfigError) as error:
    train.run(make_config({key: value}), tmp_path)
  assert error.value.key == key
  assert not list(tmp_path.rglob("result.json"))


def test_a_failed_run_has_what_it_spent(
    now: list[float], costly, tmp_path: pathlib.Path) -> None:
  config = costly()
  with pytest.raises(RuntimeError):
    train.run(config, tmp_path, on_row=raise_at(6, RuntimeError("fire")))
  run_dir = tmp_path / records.run_id(config)
  result = records.read_result(run_dir)
  assert result["status"] == "failed"
  # A save waits in it too: 11 + 7 steps + 5.
  assert phases(result) == dict(
      startup=3, compile=8, input=7, step=14, evaluation=0, checkpoint=5,
      lost=0, wall=37)
  assert result["occupied_device_seconds"] == 37
  assert result["price_usd"] == pytest.approx(0.37)
  assert result["energy_kwh"] == pytest.approx(0.0037)
  # Fails again before it has begun, as the data is gone.
  with pytest.MonkeyPatch.context() as patch:
    def gone(_):
      now[0] += 2
      raise OSError("gone")
    patch.setattr(store_lib, "build", gone)
    with pytest.raises(OSError):
      train.run(config, tmp_path)
  result = records.read_result(run_dir)
  assert (result["wall_seconds"], result["occupied_device_seconds"]) == (
      39, 39)
  record = train.run(config, tmp_path)
  # From the checkpoint at 23 s: 14 and 2 are lost, and 55 to the end.
  assert (record.wall_seconds, record.lost_seconds) == (23 + 16 + 55, 16)
  assert now[0] == 1000 + 94


def test_a_damaged_file_is_named_with_the_remedy(
    costly, tmp_path: pathlib.Path) -> None:
  config = costly()
  with pytest.raises(Killed):
    train.run(config, tmp_path, on_row=raise_at(2, Killed()))
  path = tmp_path / records.run_id(config) / spent.FILE
  for text in ("{", "[]", '{"step": 3, "counters": {}}', '{"counters": 1}'):
    path.write_text(text, "utf-8")
    with pytest.raises(records.RecordError, match="spent.json is damaged.*"
                       "delete it"):
      train.run(config, tmp_path)
  path.unlink()
  record = train.run(config, tmp_path)
  assert (record.status, record.lost_seconds) == ("complete", 0)


def test_a_model_card_lies_beside_what_was_saved(
    make_config, tmp_path: pathlib.Path) -> None:
  def stop(row: dict[str, Any]) -> None:
    if row["step"] == 2:
      signal.raise_signal(signal.SIGTERM)
  config = make_config()
  stopped = train.run(config, tmp_path, on_row=stop)
  path = tmp_path / stopped.run_id / "MODEL_CARD.md"
  assert stopped.run_id in path.read_text("utf-8")
  assert f"| Weights of step | {stopped.steps} |" in path.read_text("utf-8")
  record = train.run(config, tmp_path)
  result = records.read_result(path.parent)
  assert path.read_text("utf-8") == card.model_card(
      result | dict(checkpoint_step=record.steps))
  # Nothing was saved: there is no model.
  diverged = train.run(make_config({
      "optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}), tmp_path)
  assert diverged.status == "diverged"
  assert not (tmp_path / diverged.run_id / "MODEL_CARD.md").exists()


def test_a_card_that_cannot_be_written_fails_nothing(
    make_config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture) -> None:
  def fail(_):
    raise ValueError("no words")
  monkeypatch.setattr(card, "model_card", fail)
  record = train.run(make_config(), tmp_path)
  assert record.status == "complete"
  assert "no MODEL_CARD.md (ValueError('no words'))" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_flops_of_the_record_make_up_the_whole(
    family: str, make_config, tmp_path: pathlib.Path) -> None:
  record = train.run(make_config({"model.family": family}), tmp_path)
  assert sum(record.flops_by_component.values()) == pytest.approx(
      record.flops_total, rel=1e-12)
  assert record.flops_by_convention[record.flops_convention] == pytest.approx(
      record.flops_total, rel=1e-12)
  if family == "gpt2":  # of t5 each token passes through one of two stacks
    assert record.flops_by_convention["6N_total"] == pytest.approx(
        6 * 7680 * 768)


def test_the_command_says_in_a_line_what_a_run_took() -> None:
  program = (
      "import sys; sys.argv = ['train.py']; sys.path.insert(0, 'scripts')\n"
      "import train as script; from tfjax import train; import json\n"
      "for values in json.loads(sys.stdin.read()):\n"
      "  print(script._taken(train.RunRecord('r', 'complete', **values)))\n")
  full = dict(
      wall_seconds=100.0, startup_seconds=5.0, compile_seconds=20.0,
      input_seconds=1.0, step_seconds=50.0, evaluation_seconds=10.0,
      checkpoint_seconds=4.0, lost_seconds=8.0, goodput=0.45, mfu=0.321,
      peak_flops_per_second=1e12, energy_kwh=0.0123, price_usd=1.5,
      co2e_kg=0.00456)
  dear = full | dict(energy_kwh=12345.678, price_usd=1234.5, co2e_kg=1.0)
  unknown = {name: full[name] for name in full if name.endswith("_seconds")}
  ended = subprocess.run(
      [sys.executable, "-c", program], check=True, text=True,
      capture_output=True, cwd=pathlib.Path(__file__).parents[2],
      input=json.dumps([full, dear, unknown, {}]))
  assert ended.stdout.splitlines() == [
      "took 100.0 s (startup 5.0, compile 20.0, input 1.0, step 50.0, "
      "evaluation 10.0, checkpoint 4.0, lost 8.0, other 2.0), goodput 45%, "
      "MFU 32.1%, 0.0123 kWh, 1.50 USD, 0.00456 kg CO2e",
      "took 100.0 s (startup 5.0, compile 20.0, input 1.0, step 50.0, "
      "evaluation 10.0, checkpoint 4.0, lost 8.0, other 2.0), goodput 45%, "
      "MFU 32.1%, 12,345.68 kWh, 1,234.50 USD, 1.00 kg CO2e",
      "took 100.0 s (startup 5.0, compile 20.0, input 1.0, step 50.0, "
      "evaluation 10.0, checkpoint 4.0, lost 8.0, other 2.0), goodput "
      "unknown, MFU unknown (no peak of this device is known), energy "
      "unknown, price unknown, CO2e unknown",
      "what it took is not on record"]
