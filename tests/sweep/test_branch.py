# SPDX-License-Identifier: Apache-2.0
"""A run that branches off a trunk is the run that it would have been alone."""

import dataclasses
import json
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax import sweep
from tfjax import train
from tfjax.sweep import branch
from tfjax.sweep import forecast
from tfjax.train import records

WSD = {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.25,
       "optimizer.warmup_fraction": 0.25, "optimizer.learning_rate": 0.01,
       "sweep.share_trunk": True, "runtime.num_devices": 1,
       "tracking.wandb": "disabled", "evaluation.tokens": 256,
       "train.log_every_steps": 1}


def planned(base: Any, steps: list[int], changes: dict[str, Any] | None = None,
            ) -> list[sweep.RunSpec]:
  config = base.copy_and_resolve_references()
  config_lib.override(config, WSD | (changes or {}))
  return branch.align(sweep.plan(config, sweep.axis("duration.steps", steps)))


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items()
           if k not in (*records.MEASURED, "shared")}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def state(run_dir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  found = ocp.StandardCheckpointer().restore(
      (run_dir / "checkpoints" / str(step) / "state").resolve())
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
          jax.tree_util.tree_leaves_with_path(found)}


def assert_same_run(one: pathlib.Path, other: pathlib.Path,
                    steps: int) -> None:
  """Records but for what was spent, rows, parameters, optimizer state."""
  ours, theirs = records.read_result(one), records.read_result(other)
  for name in ("loss", "loss_stderr", "bits_per_byte", "train_loss",
               "tokens_seen", "flops_total", "steps", "status", "epochs",
               "unique_tokens", "bad_steps", "rollbacks", "tokens_undone"):
    assert ours[name] == theirs[name], name
  assert rows(one) == rows(other)
  left, right = state(one, steps), state(other, steps)
  assert left.keys() == right.keys() and len(left) > 20
  for name, leaf in left.items():
    np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def train_together(specs: list[sweep.RunSpec], workdir: pathlib.Path
                   ) -> dict[str, train.RunRecord]:
  """The trunk first; options as JSON carries them."""
  given = branch.options(specs)
  found = {}
  for spec in sorted(specs, key=lambda spec: -spec.budget.steps):
    options = json.loads(json.dumps(given.get(spec.run_id, {})))
    assert branch.is_ready(workdir, options)
    found[spec.run_id] = train.run(spec.config, workdir, run_id=spec.run_id,
                                   **options)
  return found


@pytest.mark.parametrize("changes", [
    {}, {"data.unique_tokens": 1000, "data.max_epochs": 100,
         "evaluation.every_steps": 3},
    {"objective.name": "masked", "model.family": "modernbert",
     "model.window": 8, "recovery.spike_factor": 3.0,
     "recovery.action": "skip"}], ids=["plain", "epochs", "masked"])
def test_a_branch_is_bit_by_bit_the_run_alone(
    base, tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
  specs = planned(base, [8, 16, 24], changes)
  short, middle, long = specs
  assert branch.options(specs) == {
      long.run_id: dict(keep_steps=[6, 12]),
      short.run_id: dict(branch=dict(run_id=long.run_id, step=6)),
      middle.run_id: dict(branch=dict(run_id=long.run_id, step=12))}
  # A quarter of the shortest one's steps, of all.
  assert {spec.config.optimizer.warmup_steps for spec in specs} == {2}
  found = train_together(specs, tmp_path / "together")
  alone = tmp_path / "alone"
  for spec in specs:
    train.run(spec.config, alone, run_id=spec.run_id)
    assert_same_run(tmp_path / "together" / spec.run_id, alone / spec.run_id,
                    spec.budget.steps)
  trunk, record = found[long.run_id], found[middle.run_id]
  assert trunk.branched_from is trunk.shared_flops is None
  assert (record.branched_from, record.branch_step) == (long.run_id, 12)
  assert record.shared_flops == pytest.approx(trunk.flops_total / 2)
  assert record.flops_total == pytest.approx(trunk.flops_total * 16 / 24)
  assert 0 < record.shared_device_seconds < trunk.occupied_device_seconds


def test_what_is_shared_is_counted_once(base, tmp_path: pathlib.Path) -> None:
  specs = planned(base, [8, 16, 24])
  found = train_together(specs, tmp_path)
  # 24 steps of the trunk, 2 of the first decay, 4 of the second.
  own = sum(record.flops_total - (record.shared_flops or 0)
            for record in found.values())
  step = specs[0].budget.flops_total / 8
  assert own == pytest.approx(30 * step)
  assert forecast.here(specs, 1).total()["flops"] == pytest.approx(30 * step)
  assert branch.shared_flops(specs) == pytest.approx(
      {specs[0].run_id: 6 * step, specs[1].run_id: 12 * step})
  assert [spec.budget.steps for spec in branch.own_parts(specs)] == [2, 4, 24]
  metrics = records.read_metrics(tmp_path / specs[1].run_id / "metrics.jsonl")
  copied = [row for row in metrics if row.get("shared")]
  assert {row["step"] for row in copied} == set(range(1, 13))
  assert all(row.get(name) is None for row in copied
             for name in records.MEASURED if name != "shared_device_seconds")
  # What the trunk had taken so far, and at the branch step in all.
  trunk = records.read_metrics(tmp_path / specs[2].run_id / "metrics.jsonl")
  shared = [row["shared_device_seconds"] for row in metrics]
  assert shared[:len(copied)] == [
      row["device_seconds"] for row in trunk if row["step"] <= 12]
  (base,) = set(shared[len(copied):])
  assert base == found[specs[1].run_id].shared_device_seconds > shared[0]
  seconds = [row["device_seconds"] for row in metrics if row not in copied]
  record = found[specs[1].run_id]
  # It has its own decay's time, not that of the steps before.
  assert 0 < seconds[0] < seconds[-1] <= record.occupied_device_seconds
  assert record.tokens_per_second == pytest.approx(
      4 * record.batch_tokens / record.device_seconds)


def test_a_branch_goes_on_from_its_own_checkpoint(
    base, tmp_path: pathlib.Path) -> None:
  """Paused in its decay, with the trunk gone since; it is a branch still."""
  short, long = specs = planned(base, [16, 24])
  given = branch.options(specs)
  trunk = train.run(long.config, tmp_path, run_id=long.run_id,
                    **given[long.run_id])
  paused = train.run(short.config, tmp_path, run_id=short.run_id,
                     until_step=14, **given[short.run_id])
  assert (paused.status, paused.status_reason, paused.steps) == (
      "interrupted", "paused at step 14 of 16", 14)
  (tmp_path / long.run_id).rename(tmp_path / "elsewhere")
  record = train.run(short.config, tmp_path, run_id=short.run_id,
                     **given[short.run_id])
  train.run(short.config, tmp_path / "alone", run_id=short.run_id)
  assert_same_run(tmp_path / short.run_id, tmp_path / "alone" / short.run_id,
                  16)
  assert (record.branched_from, record.resumes) == (long.run_id, 1)
  assert record.shared_flops == pytest.approx(trunk.flops_total / 2)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
  """That batch gives no finite loss."""
  read = objectives.TrainingBatches.__getitem__

  def spoilt(self, index: int):
    batch = read(self, index)
    return batch if index != bad else dataclasses.replace(
        batch, weights=np.full_like(batch.weights, math.nan))
  monkeypatch.setattr(objectives.TrainingBatches, "__getitem__", spoilt)


def test_a_trunk_that_was_rolled_back_hands_on_its_place_in_the_data(
    base, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  spoil(monkeypatch, 5)
  short, _ = specs = planned(base, [16, 24], {
      "recovery.action": "rollback", "checkpoint.every_steps": 4})
  record = train_together(specs, tmp_path)[short.run_id]
  assert record.rollbacks == 1 and record.branch_step == 12
  train.run(short.config, tmp_path / "alone", run_id=short.run_id)
  assert_same_run(tmp_path / short.run_id, tmp_path / "alone" / short.run_id,
                  16)


def test_a_branch_without_a_checkpoint_rolls_back_to_its_trunk(
    base, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  short, long = specs = planned(base, [16, 24], {
      "recovery.action": "rollback"})
  given = branch.options(specs)
  train.run(long.config, tmp_path, run_id=long.run_id, **given[long.run_id])
  spoil(monkeypatch, 13)
  record = train.run(short.config, tmp_path, run_id=short.run_id,
                     **given[short.run_id])
  metrics = records.read_metrics(tmp_path / short.run_id / "metrics.jsonl")
  undone, = (row for row in metrics if row["kind"] == "rollback")
  assert (record.status, undone["step"], undone["to_step"]) == (
      "complete", 14, 12)
  assert [row["step"] for row in metrics if row["kind"] == "train"] == list(
      range(1, 17))


@pytest.mark.parametrize("bad", [3, 20])
def test_a_trunk_that_diverges_loses_no_branch(
    base, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog,
    bad: int) -> None:
  """Before the branch step: then so does the run, alone. After: it does not."""
  short, long = specs = planned(base, [16, 24])
  spoil(monkeypatch, bad)
  with caplog.at_level(logging.WARNING, "tfjax"):
    found = train_together(specs, tmp_path)
  assert found[long.run_id].status == "diverged"
  record = found[short.run_id]
  if bad == 20:
    assert (record.status, record.branch_step) == ("complete", 12)
  else:
    assert (record.status, record.branched_from, record.shared_flops) == (
        "diverged", None, None)
    assert "has left no checkpoint of step 12; it trains alone" in caplog.text


def test_who_is_ready_when(base, tmp_path: pathlib.Path) -> None:
  short, long = specs = planned(base, [16, 24])
  given = branch.options(specs)
  asked = given[short.run_id]
  assert branch.is_ready(tmp_path, {})
  assert branch.is_ready(tmp_path, given[long.run_id])
  assert not branch.is_ready(tmp_path, asked)  # the trunk has not begun
  train.run(long.config, tmp_path, run_id=long.run_id, until_step=11,
            **given[long.run_id])
  assert not branch.is_ready(tmp_path, asked)  # and has not come there
  train.run(long.config, tmp_path, run_id=long.run_id, until_step=12,
            **given[long.run_id])
  assert branch.is_ready(tmp_path, asked)
  for status, ready in (("failed", True), ("interrupted", False)):
    directory = tmp_path / status / long.run_id
    records.write_result(directory, dict(run_id="x", status=status))
    assert branch.is_ready(tmp_path / status, asked) == ready


def test_who_comes_when_its_trunk_is_past_it_begins_alone(
    base, tmp_path: pathlib.Path) -> None:
  """The trunk was not asked for that checkpoint when it came there."""
  short, long = specs = planned(base, [16, 24])
  asked = branch.options(specs)[short.run_id]
  saved = tmp_path / long.run_id / "checkpoints"
  for step, ready in ((11, False), (13, True)):
    (saved / str(step)).mkdir(parents=True)
    assert branch.is_ready(tmp_path, asked) == ready
    assert branch.is_alone(tmp_path, asked) == ready
  (saved / "12").mkdir()
  assert branch.is_ready(tmp_path, asked)
  assert not branch.is_alone(tmp_path, asked)


def test_warmup_in_steps_leaves_every_run_its_id(base) -> None:
  """Together and alone they are the same runs."""
  wsd = {"optimizer.warmup_steps": 2}
  apart = planned(base, [16, 24], wsd | {"sweep.share_trunk": False})
  together = planned(base, [16, 24], wsd)
  assert [spec.run_id for spec in together] == [
      spec.run_id for spec in apart]
  assert len(branch.options(together)) == 2 and not branch.options(apart)


def test_a_trunk_keeps_what_branches_need_until_all_have_ended(
    base, tmp_path: pathlib.Path) -> None:
  short, middle, long = specs = planned(
      base, [8, 16, 32], {"checkpoint.every_steps": 4, "checkpoint.keep": 1})
  given = branch.options(specs)

  def saved() -> list[int]:
    return sorted(int(path.name) for path in (
        tmp_path / long.run_id / "checkpoints").iterdir()
                  if path.name.isdigit())

  def go(spec: sweep.RunSpec) -> None:
    train.run(spec.config, tmp_path, run_id=spec.run_id, **given[spec.run_id])
  train.run(long.config, tmp_path, run_id=long.run_id, until_step=20,
            **given[long.run_id])
  go(short)
  assert branch.clean(tmp_path, specs) == []  # the trunk is not done
  go(long)
  assert saved() == [6, 12, 32]
  assert [path.name for path in branch.clean(tmp_path, specs)] == ["6"]
  assert saved() == [12, 32] and branch.clean(tmp_path, specs) == []
  go(middle)
  branch.clean(tmp_path, specs)
  assert saved() == [32]
  assert records.read_result(tmp_path / middle.run_id)["branch_step"] == 12


def test_a_checkpoint_of_another_run_is_refused(
    base, tmp_path: pathlib.Path) -> None:
  _, long = planned(base, [16, 24])
  other, _ = planned(base, [16, 24], {"optimizer.learning_rate": 0.02})
  train.run(long.config, tmp_path, run_id=long.run_id, keep_steps=[12, 20],
            until_step=21)
  asked = dict(run_id=long.run_id, step=12)
  with pytest.raises(records.RecordError, match=(
      "optimizer.learning_rate: 0.01 there, 0.02 here")):
    train.run(other.config, tmp_path, run_id="other", branch=asked)
  assert records.read_result(tmp_path / "other")["status"] == "failed"
  short, _ = planned(base, [16, 24])
  with pytest.raises(records.RecordError, match=(
      "decays that begin after 12 and 18")):
    train.run(short.config, tmp_path, run_id=short.run_id,
              branch=dict(run_id=long.run_id, step=20))


def test_a_run_too_short_for_steps_of_its_own_is_alone(base) -> None:
  specs = planned(base, [1, 2, 40], {"optimizer.warmup_fraction": 0.0})
  assert not {spec.run_id for spec in specs[:2]} & branch.options(specs).keys()
  assert all(spec.budget.steps for spec in branch.own_parts(specs))


def test_runs_that_share_nothing_are_left_alone(base) -> None:
  config = base.copy_and_resolve_references()
  config_lib.override(config, WSD)
  cells = sweep.product(sweep.axis("seed", [0, 1]),
                        sweep.axis("duration.steps", [8, 16]))
  specs = sweep.plan(config, [*cells, {"seed": 2}, {
      "seed": 3, "sweep.share_trunk": False}])
  given = branch.options(branch.align(specs))
  assert len(given) == 4
  assert {spec.config.seed for spec in specs if spec.run_id in given} == {0, 1}
  assert [spec.config.optimizer.warmup_steps for spec in branch.align(
      specs)] == [2, 2, 2, 2, None, None]
  # Decays are not shared: a run that decays from its first step is alone.
  assert not branch.options(planned(base, [8, 16], {
      "optimizer.decay_fraction": 1.0, "optimizer.warmup_fraction": 0.0}))


@pytest.mark.parametrize("changes, key", [
    ({"optimizer.schedule": "cosine"}, "optimizer.schedule"),
    ({"sweep.halving": 2}, "sweep.halving"),
    ({"optimizer.warmup_steps": 7}, "optimizer.warmup_steps")])
def test_what_cannot_share_a_trunk_is_refused(
    base, changes: dict[str, Any], key: str) -> None:
  with pytest.raises(config_lib.ConfigError) as caught:
    planned(base, [8, 16], changes)
  assert key in str(caught.value)
  if key != "optimizer.warmup_steps":
    assert "sweep.share_trunk" in str(caught.value)


@pytest.mark.slow
def test_one_switch_and_the_sweep_shares_its_trunk(
    base, tmp_path: pathlib.Path) -> None:
  """By two workers; what the trunk kept for the others is gone at the end."""
  specs = planned(base, [8, 16, 32], {"checkpoint.keep": 1})
  outcomes = sweep.launch(specs, tmp_path, workers=2)
  assert [outcome.state.status for outcome in outcomes] == ["complete"] * 3
  short, middle, long = (outcome.state.result for outcome in outcomes)
  assert short["branched_from"] == middle["branched_from"] == long["run_id"]
  kept = (tmp_path / long["run_id"] / "checkpoints").iterdir()
  assert [path.name for path in kept if path.name.isdigit()] == ["32"]
  own = sum(record["flops_total"] - (record["shared_flops"] or 0)
            for record in (short, middle, long))
  assert own == pytest.approx(long["flops_total"] * (32 + 2 + 4) / 32)
