# SPDX-License-Identifier: Apache-2.0
"""Runs in one step: the same runs, whatever becomes of the others."""

import dataclasses
import gc
import os
import pathlib
import signal
import time
from typing import Any, Sequence
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import train
from tfjax.cost import budget as budget_lib
from tfjax.sweep import ensemble
from tfjax.sweep import specs as specs_lib
from tfjax.train import claim
from tfjax.train import course
from tfjax.train import ensemble_loop
from tfjax.train import ensemble_step
from tfjax.train import records
from tfjax.train import step as step_lib

# One of each kind of value that members may differ in.
VALUES = (
    {"optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 2},
    {"seed": 1, "data.shuffle_seed": 7, "optimizer.weight_decay": 0.0},
    {"model.init_std": 0.1, "optimizer.beta1": 0.5, "optimizer.beta2": 0.8,
     "optimizer.epsilon": 1e-4, "optimizer.clip_norm": 0.1,
     "optimizer.final_fraction": 0.5},
)
ABSURD = {"optimizer.learning_rate": 1e30}


@pytest.fixture(name="make")
def make_fixture(make_config):
  def make(*values: dict[str, Any], **common: Any
           ) -> list[config_lib.ExperimentConfig]:
    common = {key.replace("__", "."): value for key, value in common.items()}
    return [make_config(common | one) for one in values]
  return make


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  """The metrics of a run, without what they took."""
  return [{k: v for k, v in row.items() if k not in records.MEASURED}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def rows_of_training(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return [row for row in records.read_metrics(run_dir / "metrics.jsonl")
          if row["kind"] == "train"]


def final_parameters(run_dir: pathlib.Path) -> list[np.ndarray]:
  with ocp.CheckpointManager(run_dir / "checkpoints") as manager:
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(
        state=ocp.args.StandardRestore()))
  return [np.asarray(x) for x in jax.tree.leaves(restored.state)]


def assert_same_rows(left: pathlib.Path, right: pathlib.Path,
                     **tolerance: float) -> None:
  """Of two runs; to the bit without a tolerance."""
  these, those = rows(left), rows(right)
  if tolerance:
    assert [sorted(row) for row in these] == [sorted(row) for row in those]
    those = [{name: pytest.approx(value, **tolerance) if isinstance(
        value, float) else value for name, value in row.items()}
             for row in those]
  assert these == those


def one_device(configs: Sequence[config_lib.ExperimentConfig]
               ) -> list[config_lib.ExperimentConfig]:
  return [config_lib.replace(c, runtime__num_devices=1) for c in configs]


# --- The same runs -----------------------------------------------------------


@pytest.mark.parametrize("form, devices", [
    ("map", 1), ("vmap", 1), ("map", 2)])
def test_members_are_the_runs_that_they_would_be_alone(
    form: str, devices: int, make, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(ensemble_step, "form", lambda *_: form)
  configs = make(*VALUES, runtime__num_devices=devices,
                 evaluation__every_steps=4, checkpoint__keep_every_steps=3)
  found = ensemble.run(configs, tmp_path / "together", sweep="grid")
  for config, record in zip(one_device(configs), found):
    alone = train.run(config, tmp_path / "alone", sweep="grid")
    left, right = (tmp_path / place / alone.run_id
                   for place in ("together", "alone"))
    # Rounding differs; its traces grow with the steps.
    assert_same_rows(left, right, rel=2e-5)
    assert rows(left)[0]["loss"] == pytest.approx(
        rows(right)[0]["loss"], rel=1e-6)
    for a, b in zip(final_parameters(left), final_parameters(right)):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert {path.name for path in left.iterdir()} == {
        path.name for path in right.iterdir()}
    assert sorted(os.listdir(left / "checkpoints")) == sorted(
        os.listdir(right / "checkpoints")) == ["3", "6"]
    assert (record.ensemble_members, alone.ensemble_members) == (3, None)
    assert (record.device_count, record.mesh) == (devices, {"run": devices})
    # Its own tokens, by the time on the wall: no share of that.
    assert record.tokens_per_second == pytest.approx(record.tokens_seen / (
        3 * (record.input_seconds + record.step_seconds)))
    taken = ("seconds", "_at", "tokens_per_second", "mfu", "ensemble_members",
             "device_count", "mesh", "goodput", "loss", "bits_per_byte",
             "compile_cache", "_usd")
    for name, value in dataclasses.asdict(alone).items():
      if not any(part in name for part in taken):
        assert getattr(record, name) == value, name
    assert record.loss == pytest.approx(alone.loss, rel=2e-5)
    assert record.loss_stderr == pytest.approx(alone.loss_stderr, rel=1e-3)


def test_members_start_from_the_bits_that_they_would_have_alone(
    make, tmp_path: pathlib.Path) -> None:
  mesh = ensemble_step.run_mesh(jax.devices()[:2])
  for config in make(*VALUES):
    member = ensemble_loop.Member(config, tmp_path / str(config.seed), None)
    member.claim()
    with ensemble_loop.energy.Meter("off", []) as meter:
      member.prepare(mesh, meter, 3)
    steps = step_lib.steps_for(
        member.run.parts.config, train.loop.sharding.make_mesh(config))
    expected = steps.init(jax.random.key(config.seed),
                          member.run.parts.hyperparameters)
    jax.tree.map(np.testing.assert_array_equal, member.run.state, expected)
    member.close()


def test_an_ensemble_compiles_one_step_whatever_its_size(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  compiled = []
  monkeypatch.setattr(
      ensemble_step.EnsembleSteps, "lower_train",
      lambda self, *args, original=ensemble_step.EnsembleSteps.lower_train: (
          compiled.append(self.size), original(self, *args))[1])
  events = []

  def count(event: str, *_: Any, **__: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      events.append(event)
  jax.monitoring.register_event_duration_secs_listener(count)
  counts = []
  try:
    for size in (2, 5):
      step_lib.forget_steps()
      jax.clear_caches()
      events.clear()
      ensemble.run(make(*({"seed": seed} for seed in range(size)),
                        duration__steps=2), tmp_path / str(size))
      counts.append(len(events))
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  # Of another size once more in the same process: nothing is compiled at all.
  ensemble.run(make(*({"optimizer.learning_rate": 0.1 * seed} for seed in
                      range(1, 6)), duration__steps=2), tmp_path / "again")
  assert compiled == [2, 5]
  assert counts[0] == counts[1]


# --- Those that go wrong -----------------------------------------------------


@pytest.mark.parametrize("form", ["map", "vmap"])
def test_a_member_that_diverges_disturbs_nobody(
    form: str, make, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(ensemble_step, "form", lambda *_: form)
  sane = make(*VALUES)
  bad, = make(ABSURD)
  found = ensemble.run([sane[0], bad, *sane[1:]], tmp_path / "with")
  without = ensemble.run(sane, tmp_path / "without")
  alone = train.run(bad, tmp_path / "alone")
  assert [r.status for r in found] == [
      "complete", "diverged", "complete", "complete"]
  assert (found[1].steps, found[1].status_reason, found[1].loss) == (
      alone.steps, alone.status_reason, None)
  assert alone.steps == 2
  assert_same_rows(tmp_path / "with" / alone.run_id,
                   tmp_path / "alone" / alone.run_id, rel=1e-5)
  for record in without:
    assert_same_rows(tmp_path / "with" / record.run_id,
                     tmp_path / "without" / record.run_id)
  # It is done for good.
  again = ensemble.run([bad], tmp_path / "with")
  assert again == [found[1]]


def test_steps_are_skipped_for_each_member(
    make, tmp_path: pathlib.Path) -> None:
  configs = make(ABSURD, VALUES[0], recovery__action="skip",
                 recovery__max_bad_steps=2)
  found = ensemble.run(configs, tmp_path / "together")
  for config, record in zip(configs, found):
    alone = train.run(config, tmp_path / "alone")
    assert (record.status, record.steps, record.bad_steps,
            record.status_reason) == (
                alone.status, alone.steps, alone.bad_steps,
                alone.status_reason)
  assert [record.bad_steps for record in found] == [3, 0]


def test_a_member_that_fails_leaves_the_others(
    make, tmp_path: pathlib.Path) -> None:
  configs = make(*VALUES)
  failing = tmp_path / records.run_id(configs[1])
  failing.mkdir()
  (failing / "checkpoints").write_text("in the way")
  found = ensemble.run(configs, tmp_path)
  assert [r.run_id for r in found] == [
      records.run_id(configs[0]), records.run_id(configs[2])]
  assert {r.status for r in found} == {"complete"}
  result = records.read_result(failing)
  assert result["status"] == "failed" and "checkpoints" in (
      result["status_reason"])
  assert not claim.is_held(failing)


def test_rows_that_cannot_be_written_end_their_own_run(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  configs = make(*VALUES[:2])
  full = records.run_id(configs[1])
  write = records.MetricsFile.write

  def refuse(self, row):
    if self._path.parent.name == full and row["step"] == 2:
      raise records.WriteError("no space left")
    write(self, row)
  monkeypatch.setattr(records.MetricsFile, "write", refuse)
  found = ensemble.run(configs, tmp_path)
  assert [r.status for r in found] == ["complete"]
  result = records.read_result(tmp_path / full)
  assert (result["status"], "no space left" in result["status_reason"]) == (
      "failed", True)
  monkeypatch.undo()
  assert ensemble.run(configs, tmp_path)[1].status == "complete"
  ensemble.run(configs, tmp_path / "other")
  assert_same_rows(tmp_path / full, tmp_path / "other" / full)


def test_what_ends_all_is_recorded_for_all(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def explode(*_: Any) -> None:
    raise RuntimeError("no step")
  monkeypatch.setattr(
      ensemble_step.EnsembleSteps, "compiled_train", explode)
  configs = make(*VALUES[:2])
  with pytest.raises(RuntimeError, match="no step"):
    ensemble.run(configs, tmp_path)
  for config in configs:
    result = records.read_result(tmp_path / records.run_id(config))
    assert (result["status"], result["status_reason"]) == (
        "failed", "RuntimeError: no step")


def test_who_is_finished_or_at_work_elsewhere_is_left_out(
    make, tmp_path: pathlib.Path) -> None:
  configs = make(*VALUES)
  first = train.run(configs[0], tmp_path)
  busy = tmp_path / records.run_id(configs[1])
  with claim.directory(busy):
    found = ensemble.run(configs, tmp_path)
    with pytest.raises(claim.RunDirectoryBusyError):
      ensemble.run(configs[1:2], tmp_path)
  assert found[0] == first and len(found) == 2
  assert found[1].ensemble_members == 1
  assert not (busy / "metrics.jsonl").exists()


# --- Interrupted -------------------------------------------------------------


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
  """The process gets a SIGTERM when a step has been read."""
  read = course.Run.read

  def told(self, ready):
    ready = list(ready)
    if any(number == step for number, _ in ready):
      os.kill(os.getpid(), signal.SIGTERM)
    return read(self, ready)
  monkeypatch.setattr(course.Run, "read", told)


def test_an_interrupted_ensemble_goes_on_in_any_company(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  configs = make(*VALUES, duration__steps=8)
  ids = [records.run_id(config) for config in configs]
  ensemble.run(configs, tmp_path / "whole")
  for place in ("ensemble", "alone"):
    with monkeypatch.context() as patched:
      stop_after(2, patched)
      found = ensemble.run(configs, tmp_path / place)
    assert {(r.status, r.steps, r.stopped_by) for r in found} == {
        ("interrupted", 3, "SIGTERM")}
  again = ensemble.run(configs, tmp_path / "ensemble")
  assert {(r.status, r.resumes) for r in again} == {("complete", 1)}
  for run_id in ids:
    assert_same_rows(tmp_path / "ensemble" / run_id,
                     tmp_path / "whole" / run_id)
    for a, b in zip(final_parameters(tmp_path / "ensemble" / run_id),
                    final_parameters(tmp_path / "whole" / run_id)):
      np.testing.assert_array_equal(a, b)
  # One goes on alone and is stopped; the others take it in where it stands.
  with monkeypatch.context() as patched:
    stop_after(4, patched)
    assert train.run(configs[1], tmp_path / "alone").steps == 6
  acted = []
  active = ensemble_step.EnsembleSteps.active
  with monkeypatch.context() as patched:
    patched.setattr(ensemble_step.EnsembleSteps, "active", lambda self, who: (
        acted.append(list(who)), active(self, who))[1])
    found = ensemble.run(configs, tmp_path / "alone")
  # Steps 4 to 6 without it, 7 and 8 with it, and the evaluation.
  assert acted == [[0, 2]] * 3 + [[0, 1, 2]] * 3
  assert [r.resumes for r in found] == [1, 2, 1]
  for run_id in ids:
    assert_same_rows(tmp_path / "alone" / run_id, tmp_path / "whole" / run_id,
                     rel=2e-5)
  # A new one joins them: those that are done wait for nobody.
  more = make({"seed": 9}, duration__steps=8)
  found = ensemble.run([*configs, *more], tmp_path / "alone")
  assert [r.ensemble_members for r in found] == [3, 3, 3, 1]


# --- What is saved when ------------------------------------------------------


@pytest.mark.parametrize("every_seconds", [5.0, None])
def test_members_are_saved_by_time_together(
    every_seconds: float | None, make, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """Whatever else some of them are saved for."""
  saved, flushed, now = [], [], [0.0]
  save, read = course.Run.save, ensemble_loop._Ensemble._read

  def note(self, step, state):
    saved.append((step, self.config.seed))
    now[0] += 1  # a save takes its time, and none starts an hour of its own
    save(self, step, state)

  def tick(self, step, acting, metrics):
    flushed.append(self._pending is None)
    now[0] += 1
    read(self, step, acting, metrics)
  monkeypatch.setattr(course.Run, "save", note)
  monkeypatch.setattr(ensemble_loop._Ensemble, "_read", tick)
  monkeypatch.setattr(
      ensemble_loop.clock_lib.time, "monotonic", lambda: now[0])
  configs = make(
      {"seed": 0, "checkpoint.every_seconds": every_seconds},
      {"seed": 1, "checkpoint.every_seconds": 1000.0,
       "checkpoint.every_steps": 2},
      {"seed": 2, "checkpoint.every_seconds": None},
      duration__steps=12)
  assert {r.status for r in ensemble.run(configs, tmp_path)} == {"complete"}
  steps = {seed: [step for step, who in saved if who == seed]
           for seed in range(3)}
  if every_seconds is None:
    assert steps == {0: [12], 1: [2, 4, 6, 8, 10, 12], 2: [12]}
  else:
    # By its steps one of them is saved more often, which puts off nobody.
    assert steps[0] == steps[2] and 3 <= len(steps[0]) < 6
    assert set(steps[1]) == {2, 4, 6, 8, 10, 12} | set(steps[0])


def test_first_states_are_not_kept_on_the_host(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  kept: list[weakref.ref] = []
  living = []
  stack, put = (ensemble_step.EnsembleSteps.stack,
                ensemble_step.EnsembleSteps.put)

  def note(self, states):
    kept.extend(weakref.ref(x) for x in jax.tree.leaves(list(states)))
    return stack(self, states)

  def look(self, batches):
    gc.collect()
    living.append(sum(one() is not None for one in kept))
    return put(self, batches)
  monkeypatch.setattr(ensemble_step.EnsembleSteps, "stack", note)
  monkeypatch.setattr(ensemble_step.EnsembleSteps, "put", look)
  ensemble.run(make(*VALUES, duration__steps=2), tmp_path)
  assert len(kept) > 30 and set(living) == {0}


# --- What it takes -----------------------------------------------------------


def test_what_is_spent_is_shared_out(make, tmp_path: pathlib.Path) -> None:
  chip = tmp_path / "hardware.toml"
  chip.write_text('[chip]\nlabel = "a chip"\ndevice_kinds = ["cpu"]\n'
                  "devices_per_chip = 1\n[chip.peak_flops_per_second]\n"
                  "float32 = 1e12\n", "utf-8")
  configs = make(*VALUES, ABSURD, runtime__num_devices=2,
                 cost__hardware_file=str(chip))
  begin = time.perf_counter()
  found = ensemble.run(configs, tmp_path)
  elapsed = time.perf_counter() - begin
  walls = [record.wall_seconds for record in found]
  # Until the last record there is next to nothing that is nobody's.
  assert 0.9 * elapsed < sum(walls) <= elapsed
  assert sum(r.occupied_device_seconds for r in found) == pytest.approx(
      2 * sum(walls))
  assert walls[3] < min(walls[:3])  # it had a part of the first steps only
  for record in found[:3]:
    last = rows_of_training(tmp_path / record.run_id)[-1]
    # FLOP/s of all three, on two devices.
    assert last["mfu"] == pytest.approx(
        3 * last["tokens_per_second"] * last["flops"] / last["tokens"] / 2e12)


def test_a_shared_meter_counts_each_kilowatt_hour_once() -> None:
  class Meter:
    source, total = "a counter", 0.0

    def kwh(self, fresh: bool = False) -> float:
      del fresh
      return self.total
  meter = Meter()
  meter.total = 5.0  # before its time
  member = ensemble_loop.SharedMeter(meter, 0.25)
  meter.total = 9.0
  assert member.kwh() == 1.0 and member.source == "a counter"
  meter.total = 11.0
  member.share(0.5)
  meter.total = 12.0
  assert member.kwh(fresh=True) == 1.0 + 0.5 + 0.5
  meter.kwh = lambda fresh=False: None
  assert member.kwh() is None


# --- Which runs --------------------------------------------------------------


def spec_of(config: config_lib.ExperimentConfig) -> specs_lib.RunSpec:
  config = config_lib.replace(config, model__vocab_size=257)
  return specs_lib.RunSpec(records.run_id(config), config, {},
                           budget_lib.plan(config, None))


def sizes(configs: Sequence[config_lib.ExperimentConfig],
          workers: int) -> list[int]:
  specs = [spec_of(config) for config in configs]
  found = ensemble.groups(specs, workers)
  assert sorted(s.run_id for group in found for s in group) == sorted(
      s.run_id for s in specs)
  return [len(group) for group in found]


EIGHT = [{"seed": seed} for seed in range(8)]


def test_groups_are_of_runs_that_differ_in_values_alone(make) -> None:
  on = dict(sweep__ensemble="on")
  assert sizes(make(*VALUES, **on), 1) == [3]
  assert sizes(make(*VALUES), 1) == sizes(make(*VALUES), 0)
  for other in ({"train.batch_size": 4}, {"optimizer.schedule": "linear"},
                {"duration.steps": 7}, {"optimizer.clip_norm": None},
                {"model.norm_epsilon": 1e-3}, {"data.split_seed": 1},
                {"objective.separate_documents": True},
                {"train.dtype": "bfloat16"}, {"evaluation.tokens": 512}):
    assert sizes(make({}, {"seed": 1}, other, **on), 1) == [2, 1], other
  # The same steps, however they are given.
  assert sizes(make({}, {"duration.tokens": 6 * 128, "seed": 1}, **on),
               1) == [2]
  # What only says where to report, save and look.
  assert sizes(make({}, {"seed": 1, "train.log_every_steps": 3,
                         "evaluation.every_steps": 2, "name": "other",
                         "tracking.project": "other",
                         "checkpoint.every_steps": 2}, **on), 1) == [2]


def test_groups_keep_all_workers_busy(make) -> None:
  on = make(*EIGHT, sweep__ensemble="on")
  assert [sizes(on, workers) for workers in (1, 2, 3, 4)] == [
      [8], [4, 4], [3, 3, 2], [2, 2, 2, 2]]
  assert sizes(on, 8) == [2, 2, 2, 2]
  assert sizes(on[:1], 1) == [1]


def test_the_switch_and_what_cannot_be_grouped(
    make, caplog: pytest.LogCaptureFixture) -> None:
  assert sizes(make(*EIGHT, sweep__ensemble="off"), 1) == [1] * 8
  for changes, word in (
      (dict(recovery__action="rollback"), "rollback"),
      (dict(mesh__fsdp=2, runtime__num_devices=2), "mesh"),
      (dict(runtime__distributed="on"), "distributed")):
    caplog.clear()
    configs = make(*EIGHT[:2], sweep__ensemble="on", **changes)
    assert sizes(configs, 1) == [1, 1]
    assert word in caplog.text and "alone" in caplog.text
    with pytest.raises(config_lib.ConfigError, match=word):
      ensemble.run(configs, "/nowhere")


def test_configs_that_do_not_fit_together_are_named(make) -> None:
  with pytest.raises(ValueError, match="train.batch_size"):
    ensemble.run(make({}, {"train.batch_size": 4}), "/nowhere")


def test_auto_groups_where_it_was_found_to_pay(
    make, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture) -> None:
  caplog.set_level("INFO", "tfjax")
  monkeypatch.setattr(ensemble.cores_lib, "usable", lambda: [0, 1])
  long = dict(duration__steps=5_000)
  small, large = make(*EIGHT, **long), make(
      *EIGHT, model__d_model=64, model__num_layers=2, model__num_heads=2,
      **long)
  step = spec_of(large[0]).budget
  assert step.batch_tokens * step.flops_per_token > ensemble.CPU_FLOPS
  # A worker a core.
  assert sizes(small, 2) == [4, 4]
  assert "mostly overhead" in caplog.text
  assert sizes(large, 2) == [1] * 8
  assert sizes(small, 8) == [1] * 8  # all have something to do as it is
  # Too short to win back the compilation.
  assert sizes(make(*EIGHT, duration__steps=4_999), 2) == [1] * 8
  # One worker with two cores, each of them with runs of its own.
  caplog.clear()
  assert sizes(large, 1) == [1] * 8  # one device a run
  free = [dataclasses.replace(config, runtime=dataclasses.replace(
      config.runtime, num_devices=None)) for config in large]
  assert sizes(free, 1) == [8]
  assert "2 cores" in caplog.text
  with monkeypatch.context() as patched:
    patched.setattr(ensemble, "CPU_SPREAD_FLOPS", 1e7)
    assert sizes(free, 1) == [1] * 8
  # What does not fill an accelerator.
  monkeypatch.setattr(ensemble.tuning, "has_accelerator", lambda: True)
  assert sizes(large, 1) == [8]
  monkeypatch.setattr(ensemble, "ACCELERATOR_FLOPS", 1e6)
  assert sizes(large, 1) == [1] * 8


def test_as_many_train_at_a_time_as_memory_allows(
    make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  class Device:
    platform = "cpu"

    def __init__(self, limit: int | None):
      self._limit = limit

    def memory_stats(self) -> dict[str, int] | None:
      return None if self._limit is None else {"bytes_limit": self._limit}
  config, = make({})
  needed = ensemble.memory_lib.estimate(
      config_lib.replace(config, model__vocab_size=257), {}, "cpu").total

  def at_a_time(count: int, *limits: int | None) -> int:
    return ensemble._at_a_time(config, count, [Device(x) for x in limits])
  assert at_a_time(8, None) == 8
  assert at_a_time(8, 100 * needed) == 8
  assert at_a_time(8, 5 * needed) == 3  # 3.5 fit: 3, 3, 2
  assert at_a_time(10, 6 * needed) == 4  # 4.2 fit: 4, 4, 2
  assert at_a_time(8, 5 * needed, 6 * needed) == 4
  assert at_a_time(8, needed // 2) == 1
  monkeypatch.setattr(ensemble, "_at_a_time", lambda *_: 2)
  found = ensemble.run(make(*VALUES), tmp_path)
  assert [(r.status, r.ensemble_members) for r in found] == [
      ("complete", 2), ("complete", 2), ("complete", 1)]
