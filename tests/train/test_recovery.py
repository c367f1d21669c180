# SPDX-License-Identifier: Apache-2.0
"""Steps that go wrong: skipped, rolled back, counted, and when it is enough."""

import dataclasses
import json
import math
import pathlib
import signal
from typing import Any, Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax import train
from tfjax.train import checkpoints as checkpoints_lib
from tfjax.train import records
from tfjax.train import recovery

Batches = objectives.TrainingBatches


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items() if k not in records.MEASURED}
          for row in records.read_metrics(run_dir / "metrics.jsonl")]


def state(run_dir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """A checkpoint's parameters and optimizer state, by name."""
  restored = ocp.PyTreeCheckpointer().restore(
      (run_dir / "checkpoints" / str(step) / "state").resolve())
  return {jax.tree_util.keystr(path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
          if "params" in str(path[0]) or "optimizer" in str(path[0])}


def assert_equal(left: dict[str, np.ndarray],
                 right: dict[str, np.ndarray]) -> None:
  assert left.keys() == right.keys() and len(left) > 20
  for name, leaf in left.items():
    np.testing.assert_array_equal(leaf, right[name], err_msg=name)


@pytest.fixture(name="spoil")
def _spoil(monkeypatch: pytest.MonkeyPatch
           ) -> Callable[..., list[int]]:
  """spoil(5, 7): these batches give no finite loss; lists those read."""
  read = Batches.__getitem__

  def spoil(*bad: int) -> list[int]:
    seen: list[int] = []

    def spoilt(self, index: int):
      seen.append(index)
      batch = read(self, index)
      if index in bad:
        batch = dataclasses.replace(
            batch, weights=np.full_like(batch.weights, math.nan))
      return batch
    monkeypatch.setattr(Batches, "__getitem__", spoilt)
    return seen
  return spoil


def bad_row(step: int, loss: float = math.nan) -> dict[str, Any]:
  return dict(step=step, loss=loss, grad_norm=1.0)


def test_a_rollback_moves_the_data_on_by_hand() -> None:
  config = config_lib.RecoveryConfig(action="rollback")
  one = recovery.Recovery(config)
  # Step 15 has read batch 14. Back at 10, batch 15 is the next, index 10 + 5.
  bad = one.judge_step(bad_row(15))
  assert bad == (15, "the loss of step 15 is nan", False)
  row = one.roll_back(bad, 10)
  assert one.offset == 5
  # Step 12 has now read batch 16: from 10 again batch 17, index 10 + 7.
  one.roll_back(one.judge_step(bad_row(12)), 10)
  assert one.offset == 7 and one.bad_steps == 2 and one.undone_steps == 7
  assert row == dict(kind="rollback", step=15, to_step=10, batch_offset=5,
                     reason="the loss of step 15 is nan")
  again = recovery.Recovery(config, json.loads(json.dumps(one.counters())))
  assert (again.offset, again.bad_steps, again.rollbacks) == (
      7, 2, one.rollbacks)


@pytest.mark.parametrize("action, verdicts", [
    ("stop", [True]), ("skip", [None, None, True]),
    ("rollback", [False, False, True])])
def test_when_it_is_enough(action: str, verdicts: list[bool | None]) -> None:
  one = recovery.Recovery(
      config_lib.RecoveryConfig(action=action, max_bad_steps=2))
  for step, diverged in enumerate(verdicts):
    bad = one.judge_step(bad_row(step))
    assert (None if bad is None else bad.diverged) is diverged
  assert one.bad_steps == len(verdicts)
  if action != "stop":
    assert "more bad steps than recovery.max_bad_steps=2" in bad.reason


def test_parameters_that_are_no_numbers_cannot_be_skipped() -> None:
  for action, diverged in (("stop", True), ("skip", True), ("rollback", False)):
    one = recovery.Recovery(
        config_lib.RecoveryConfig(action=action))
    assert one.judge_parameters(3, "held-out").diverged is diverged


def test_what_is_bad_is_said() -> None:
  one = recovery.Recovery(
      config_lib.RecoveryConfig(spike_factor=2.0, spike_window=8))
  assert one.judge_step(bad_row(3, math.inf)).reason == (
      "the loss of step 3 is inf")
  assert one.judge_step(dict(step=3, loss=1.0, grad_norm=math.nan)).reason == (
      "the gradient norm of step 3 is nan")
  assert one.judge_step(bad_row(3, 9.5)).reason == (
      "the loss of step 3, 9.5000, is more than 2 times the median of the 8 "
      "good steps before it")


def test_a_skipped_step_changes_nothing_but_its_number(
    make_config, tmp_path: pathlib.Path, spoil) -> None:
  spoil(3)
  record = train.run(make_config({
      "recovery.action": "skip", "checkpoint.every_steps": 1,
      "checkpoint.keep": 9}), tmp_path)
  run_dir = tmp_path / record.run_id
  assert (record.status, record.bad_steps, record.rollbacks) == (
      "complete", 1, 0)
  assert (record.steps, record.tokens_seen, record.tokens_undone) == (
      6, 6 * 128, 0)
  found = {row["step"]: row for row in rows(run_dir) if row["kind"] == "train"}
  assert list(found) == [1, 2, 3, 4, 5, 6]
  assert found[4]["bad"] is True and found[4]["loss"] is None
  assert not any("bad" in found[step] for step in (1, 2, 3, 5, 6))
  assert_equal(state(run_dir, 3), state(run_dir, 4))
  with pytest.raises(AssertionError):
    assert_equal(state(run_dir, 4), state(run_dir, 5))


def test_a_rollback_ends_like_a_run_without_the_bad_data(
    make_config, tmp_path: pathlib.Path, spoil,
    monkeypatch: pytest.MonkeyPatch) -> None:
  changes = {"duration.steps": 10, "checkpoint.every_steps": 4,
             "evaluation.every_steps": 5, "train.log_every_steps": 2}
  seen = spoil(6, 8)
  record = train.run(
      make_config(changes | {"recovery.action": "rollback"}), tmp_path)
  # The first is for the compiler. Batch 6 is step 7's, known to be bad when
  # step 8 has begun; from 4 again, batch 8 is step 6's.
  assert seen == [0, *range(8), 7, 8, 9, *range(9, 15)]
  assert (record.status, record.bad_steps, record.rollbacks) == (
      "complete", 2, 2)
  assert (record.steps, record.tokens_seen, record.tokens_undone) == (
      10, 10 * 128, (3 + 2) * 128)
  # The oracle: 4 to 8 are not there.
  spoilt = Batches.__getitem__
  monkeypatch.setattr(Batches, "__getitem__", lambda self, index: spoilt(
      self, index if index < 4 else index + 5))
  other = train.run(make_config(changes), tmp_path / "other")
  run_dir, other_dir = (tmp_path / record.run_id,
                        tmp_path / "other" / other.run_id)
  events = [row for row in rows(run_dir) if row["kind"] == "rollback"]
  assert events == [
      dict(kind="rollback", step=7, to_step=4, batch_offset=3,
           reason="the loss of step 7 is nan"),
      dict(kind="rollback", step=6, to_step=4, batch_offset=5,
           reason="the loss of step 6 is nan")]
  assert [row for row in rows(run_dir) if row not in events] == rows(other_dir)
  assert_equal(state(run_dir, 10), state(other_dir, 10))
  assert record.loss == other.loss


def test_without_a_checkpoint_it_goes_back_to_the_start(
    make_config, tmp_path: pathlib.Path, spoil) -> None:
  seen = spoil(2)
  record = train.run(make_config({"recovery.action": "rollback"}), tmp_path)
  assert seen == [0, *range(4), *range(3, 9)]
  assert (record.status, record.rollbacks, record.tokens_undone) == (
      "complete", 1, 3 * 128)
  assert [row["step"] for row in rows(tmp_path / record.run_id)
          if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_state_that_training_cannot_go_on_from_is_not_gone_back_to_twice(
    make_config, tmp_path: pathlib.Path, spoil, caplog) -> None:
  seen = spoil(4, 5)  # step 5, and again step 5 after the return to 4
  record = train.run(make_config({
      "recovery.action": "rollback", "checkpoint.every_steps": 2,
      "duration.steps": 8}), tmp_path)
  assert (record.status, record.bad_steps, record.rollbacks) == (
      "complete", 2, 2)
  run_dir = tmp_path / record.run_id
  found = rows(run_dir)
  assert [(row["step"], row["to_step"], row["batch_offset"]) for row in found
          if row["kind"] == "rollback"] == [(5, 4, 1), (5, 2, 4)]
  assert record.tokens_undone == (1 + 3) * 128
  # Every step once more from 2, with batches that were not read before.
  assert [row["step"] for row in found if row["kind"] == "train"] == list(
      range(1, 9))
  assert seen[-6:] == [6, 7, 8, 9, 10, 11]
  assert "checkpoints/4 is damaged (training cannot go on from it)" in (
      caplog.text)
  assert [path.name for path in (run_dir / "checkpoints" / "damaged").iterdir()
          ] == ["4"]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_more_bad_steps_than_allowed_are_a_divergence(
    action: str, make_config, tmp_path: pathlib.Path, spoil) -> None:
  spoil(*range(3, 100))
  record = train.run(make_config({
      "recovery.action": action, "recovery.max_bad_steps": 2,
      "checkpoint.every_steps": 2, "duration.steps": 20}), tmp_path)
  assert (record.status, record.bad_steps) == ("diverged", 3)
  assert "max_bad_steps=2" in record.status_reason
  assert record.rollbacks == (2 if action == "rollback" else 0)
  assert record.steps == (6 if action == "skip" else 3)
  assert record.loss is None


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
  def on_row(row: dict[str, Any]) -> None:
    if row["kind"] == "train" and row["step"] == step:
      signal.raise_signal(signal.SIGTERM)
  return on_row


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_an_interruption_forgets_nothing_of_it(
    action: str, make_config, tmp_path: pathlib.Path, spoil) -> None:
  config = make_config({
      "recovery.action": action, "recovery.max_bad_steps": 2,
      "recovery.spike_factor": 50.0, "checkpoint.every_steps": 3,
      "duration.steps": 16})
  spoil(4, 14)  # steps 5, and 13 or 15, each after a save by number
  whole = train.run(config, tmp_path / "whole")
  stopped = train.run(config, tmp_path, on_row=stop_at(8))
  assert (stopped.status, stopped.bad_steps) == ("interrupted", 1)
  assert stopped.steps < 11
  again = train.run(config, tmp_path)
  assert (again.status, again.bad_steps, again.resumes) == ("complete", 2, 1)
  assert again.rollbacks == whole.rollbacks
  assert again.tokens_undone == whole.tokens_undone
  run_dir, whole_dir = (tmp_path / again.run_id,
                        tmp_path / "whole" / whole.run_id)
  assert rows(run_dir) == rows(whole_dir)
  assert whole.rollbacks == (2 if action == "rollback" else 0)
  assert_equal(state(run_dir, 16), state(whole_dir, 16))


def test_a_spike_is_bad_too(
    make_config, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  read = Batches.__getitem__

  def spiking(self, index: int):
    batch = read(self, index)
    # An id that no text has: the model has learnt that it does not come.
    return batch if index != 19 else dataclasses.replace(
        batch, targets=np.full_like(batch.targets, 255))
  monkeypatch.setattr(Batches, "__getitem__", spiking)
  config = make_config({
      "recovery.action": "skip", "recovery.spike_factor": 1.3,
      "recovery.spike_window": 4, "duration.steps": 24,
      "optimizer.learning_rate": 0.03})
  record = train.run(config, tmp_path)
  bad = [row for row in rows(tmp_path / record.run_id) if row.get("bad")]
  before = [row["loss"] for row in rows(tmp_path / record.run_id)
            if row["kind"] == "train" and 16 <= row["step"] < 20]
  assert [row["step"] for row in bad] == [20]
  assert bad[0]["loss"] > 1.3 * np.median(before)
  assert (record.status, record.bad_steps) == ("complete", 1)


def test_nothing_bad_is_saved(
    make_config, tmp_path: pathlib.Path, spoil,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """Step 4 is due to be saved, and its own loss is the bad one."""
  saved = []
  save = checkpoints_lib.Checkpoints.save
  monkeypatch.setattr(
      checkpoints_lib.Checkpoints, "save", lambda self, step, *rest: (
          saved.append(step), save(self, step, *rest)))
  spoil(3)
  record = train.run(make_config({
      "recovery.action": "rollback", "checkpoint.every_steps": 2}), tmp_path)
  assert record.status == "complete" and record.rollbacks == 1
  assert saved == [2, 4, 6]
  kept = json.loads((tmp_path / record.run_id / "checkpoints" / "4" /
                     "counters" / "metadata").read_text("utf-8"))
  assert kept["bad_steps"] == 1 and kept["batch_offset"] == 2
