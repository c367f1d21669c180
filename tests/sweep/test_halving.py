# SPDX-License-Identifier: Apache-2.0
"""Successive halving: who goes on, whoever asks, in whatever order."""

import dataclasses
import json
import math
import pathlib
import random
from typing import Any

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import scaling
from tfjax import sweep
from tfjax import train
from tfjax.sweep import halving
from tfjax.train import records

RATES = [0.001, 0.002, 0.004, 0.008, 0.016]


def planned(base: ml_collections.ConfigDict, changes: dict[str, Any]
            ) -> list[sweep.RunSpec]:
  config = base.copy_and_resolve_references()
  config_lib.override(config, {
      "sweep.halving": 2, "sweep.halving_start": 0.25, "duration.steps": 80,
      "train.log_every_steps": 1, "tracking.wandb": "disabled"} | changes)
  return sweep.plan(config, sweep.axis("optimizer.learning_rate", RATES))


class Written:
  """Runs whose files are written here: their losses by step are given."""

  def __init__(self, specs: list[sweep.RunSpec], workdir: pathlib.Path,
               losses: list[Any]):
    self.specs, self.workdir, self.losses = specs, workdir, losses
    self.group, = halving.groups(specs)

  def turn(self, index: int) -> Any:
    return halving.turn(self.workdir, self.group, self.specs[index])

  def train(self, index: int, until: int | None, status: str | None = None,
            every: int = 1) -> None:
    """Rows up to `until`, or to the end, and a record."""
    spec = self.specs[index]
    run_dir = self.workdir / spec.run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    last = until or spec.budget.steps
    (run_dir / "metrics.jsonl").write_text("".join(
        json.dumps(dict(kind="train", step=step, loss=self.losses[index](step)))
        + "\n" for step in range(1, last + 1) if step % every == 0),
                                           encoding="utf-8")
    records.write_result(run_dir, dataclasses.asdict(records.RunRecord(
        run_id=spec.run_id, steps=last, flops_total=7.0 * last,
        status=status or ("interrupted" if until else "complete"))))

  def work_off(self, choose: random.Random | None = None) -> dict[int, Any]:
    """Until nobody can be gone on with; the record of each."""
    found: dict[int, Any] = {}
    while len(found) < len(self.specs):
      order = [index for index in range(len(self.specs)) if index not in found]
      if choose:
        choose.shuffle(order)
      turns = {index: self.turn(index) for index in order}
      index = next(index for index in order
                   if not isinstance(turns[index], halving.Wait))
      turn = turns[index]
      if isinstance(turn, halving.Go):
        self.train(index, turn.until_step)
        if turn.until_step is not None:
          continue
      else:
        halving.stop(self.workdir, self.specs[index], "s", turn.reason)
      found[index] = records.read_result(
          self.workdir / self.specs[index].run_id)
    return found


def constant(*losses: float) -> list[Any]:
  return [lambda step, loss=loss: loss for loss in losses]


def test_rungs_lie_at_powers_of_eta_and_have_rows(base) -> None:
  assert halving.rungs(planned(base, {})[0]) == [20, 40]
  assert halving.rungs(planned(base, {
      "sweep.halving": 3, "sweep.halving_start": 0.1})[0]) == [8, 24, 72]
  # 0.0625 x 80 = 5 and its doubles, at the next step that has a row.
  assert halving.rungs(planned(base, {
      "sweep.halving_start": 0.0625, "train.log_every_steps": 7})[0]) == [
          7, 14, 21, 42]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_best_half_goes_on_whoever_comes_first(
    base, tmp_path: pathlib.Path, seed: int | None) -> None:
  """5 -> 3 at step 20 -> 2 at step 40 -> the end."""
  runs = Written(planned(base, {}), tmp_path, [
      lambda step: 5.0,
      lambda step: 3.0 if step <= 20 else 4.0,  # second, then last of three
      lambda step: 2.0 if step > 35 else 3.5,  # third, then first
      lambda step: 2.5,
      lambda step: math.nan if step > 15 else 0.1])
  found = runs.work_off(None if seed is None else random.Random(seed))
  assert {index: (result["status"], result["steps"])
          for index, result in found.items()} == {
              0: ("stopped", 20), 1: ("stopped", 40), 2: ("complete", 80),
              3: ("complete", 80), 4: ("stopped", 20)}
  assert found[0]["status_reason"] == (
      "stopped after step 20 of 80, at a rung of sweep.halving=2: with a "
      "training loss of 5.0000 it was number 4 of 5, and the first 3 went on, "
      "the best with 2.5000")
  assert "of no number it was number 5 of 5" in found[4]["status_reason"]
  assert "with a training loss of 4.0000 it was number 3 of 3, and the first "\
      "2 went on" in found[1]["status_reason"]
  assert found[1]["flops_total"] == 280 and found[1]["sweep"] == "s"


def test_equals_are_taken_from_the_smallest_rate(
    base, tmp_path: pathlib.Path) -> None:
  specs = planned(base, {})
  runs = Written([specs[2], specs[0], specs[4]], tmp_path, constant(1, 1, 1))
  found = runs.work_off()
  assert [found[index]["status"] for index in range(3)] == [
      "stopped", "complete", "stopped"]
  assert [found[index]["steps"] for index in (0, 2)] == [40, 20]


def test_losses_count_in_the_last_tenth_before_the_rung(
    base, tmp_path: pathlib.Path) -> None:
  """Of steps 37 to 40; where rows are few, of the last three of them."""
  specs = planned(base, {"sweep.halving_start": 0.5})[:2]
  runs = Written(specs, tmp_path, [
      lambda step: 1.0 if step <= 36 else 3.0,
      lambda step: 9.0 if step <= 36 else 4.0 if step == 38 else 2.6])
  assert [runs.work_off()[index]["status"] for index in (0, 1)] == [
      "stopped", "complete"]
  runs.train(0, 40, every=10)
  runs.train(1, 40, every=10)  # 1, 1, 3 against 9, 9, 2.6
  assert isinstance(runs.turn(1), halving.Stop)
  assert runs.turn(0) == halving.Go(None)


def test_one_that_failed_or_diverged_is_the_worst_and_holds_up_nobody(
    base, tmp_path: pathlib.Path) -> None:
  runs = Written(planned(base, {})[:3], tmp_path, constant(0.1, 5, 3))
  runs.train(0, 10, "failed")
  runs.train(1, 20)
  assert runs.turn(1) == halving.Wait()
  runs.train(2, 15, "diverged")
  assert runs.turn(1) == halving.Go(40)
  runs.train(1, 40)
  assert runs.turn(1) == halving.Go(None)  # the last one left
  # What failed is tried again: it goes on by its own loss, and so does what
  # went on without it.
  assert runs.turn(0) == halving.Go(20)
  runs.train(0, 20)
  assert runs.turn(0) == halving.Go(40)
  assert runs.turn(1) == halving.Wait()
  runs.train(0, 40)
  assert isinstance(runs.turn(1), halving.Stop)


def test_who_was_let_past_stays_in_the_running(
    base, tmp_path: pathlib.Path) -> None:
  """Number 3 of 3 at step 20, were it asked again, as the best one failed
  there at first."""
  runs = Written(planned(base, {})[:3], tmp_path, constant(0.1, 5, 3))
  runs.train(0, 10, "failed")
  for index in (1, 2):
    runs.train(index, 20)
  for index in (1, 2):
    assert runs.turn(index) == halving.Go(40)
    runs.train(index, 40)
  runs.train(0, 20)
  assert runs.turn(0) == halving.Go(40)
  runs.train(0, 40)
  assert "it was number 3 of 3, and the first 2 went on" in runs.turn(1).reason
  assert runs.turn(2) == runs.turn(0) == halving.Go(None)


def test_what_a_kill_leaves_without_a_record_is_recorded_before_it_stops(
    base, tmp_path: pathlib.Path) -> None:
  runs = Written(planned(base, {})[:2], tmp_path, constant(1, 2))
  runs.train(0, 20)
  runs.train(1, 20)
  (tmp_path / runs.specs[1].run_id / "result.json").unlink()
  assert runs.turn(1) == halving.Go(20)
  with pytest.raises(records.RecordError, match="has not paused"):
    halving.stop(tmp_path, runs.specs[1], None, "why")
  runs.train(1, 20)
  stop = runs.turn(1)
  halving.stop(tmp_path, runs.specs[1], None, stop.reason)
  again = halving.stop(tmp_path, runs.specs[1], None, "another")
  assert (again.status, again.status_reason) == ("stopped", stop.reason)


def test_groups_differ_in_their_learning_rate_alone(base) -> None:
  config = base.copy_and_resolve_references()
  config.duration.steps = 80
  specs = sweep.plan(config, sweep.product(
      sweep.axis("sweep.halving", [2]), sweep.axis("seed", [0, 1]),
      sweep.axis("optimizer.learning_rate", [0.2, 0.1])))
  specs += sweep.plan(config, sweep.axis("optimizer.learning_rate", [1, 2]))
  assert [[(s.config.seed, s.config.optimizer.learning_rate) for s in group]
          for group in halving.groups(specs)] == [
              [(0, 0.1), (0, 0.2)], [(1, 0.1), (1, 0.2)]]


def test_real_runs_of_which_one_diverges(base, tmp_path: pathlib.Path) -> None:
  """A run that is let on ends as one that never paused; none of the others
  is in a fit."""
  config = base.copy_and_resolve_references()
  config_lib.override(config, {
      "sweep.halving": 2, "sweep.halving_start": 0.25, "duration.steps": 24,
      "train.log_every_steps": 2, "tracking.wandb": "disabled",
      "runtime.num_devices": 1})
  specs = sweep.plan(config, sweep.axis(
      "optimizer.learning_rate", [1e-5, 1e-2, 1e9]))
  group, = halving.groups(specs)
  left = list(specs)
  while left:
    for spec in list(left):
      turn = halving.turn(tmp_path, group, spec)
      if isinstance(turn, halving.Stop):
        left.remove(spec)
        halving.stop(tmp_path, spec, "s", turn.reason)
      elif isinstance(turn, halving.Go):
        record = train.run(spec.config, tmp_path, run_id=spec.run_id,
                           until_step=turn.until_step)
        if record.status != "interrupted":
          left.remove(spec)
        else:
          assert record.status_reason == (
              f"paused at step {turn.until_step} of 24")
  found = [records.read_result(tmp_path / spec.run_id) for spec in specs]
  assert [result["status"] for result in found] == [
      "stopped", "complete", "diverged"]
  assert found[0]["steps"] == 12 and found[0]["loss"] is None
  assert found[0]["wall_seconds"] > 0 and found[0]["flops_total"] > 0
  reference = train.run(specs[1].config, tmp_path / "alone",
                        run_id=specs[1].run_id)
  assert reference.loss == found[1]["loss"] and found[1]["resumes"] >= 1
  frame = scaling.load(tmp_path)
  assert set(frame["status"]) == {"stopped", "complete", "diverged"}
